"""Attention, its distance, spectra, Grad-CAM and maps of features against slow, obvious versions."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from models_lut import LUT, Encoder, MomentumEncoder, patchify
from models_vit import Classifier, LinearProbe
from util.analysis.attention import (
    DISTANCE_BINS,
    RunningCovariance,
    attention_distance,
    attention_maps,
    class_score,
    effective_rank,
    feature_score,
    feature_spectra,
    grad_cam,
    observe_attention,
    patch_distances,
    query_maps,
)
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.vit import num_prefix_tokens, tokens_of

TINY = dict(embed_dim=24, depth=2, num_heads=3)
SIZE = dict(img_size=(16, 24), patch_size=8, in_chans=3)  # 2 x 3 patches

quick = settings(max_examples=20, deadline=None)


def shaken(model, seed=0, by=0.3):
    """Give a model random weights everywhere, so that no norm, bias or attention is trivial; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += by * torch.randn(p.shape, generator=generator)
    return model.eval().requires_grad_(False)


def encoder(**changes):
    return shaken(Encoder(**TINY | SIZE | changes))


def classifier(kind=Classifier, pool="avg", **changes):
    return shaken(kind(TINY, num_classes=5, pool=pool, **SIZE | changes))


def timm_vit(**changes):
    vit = dict(img_size=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return shaken(VisionTransformer(**vit | changes))


MODELS = {
    "ours": encoder,
    "classifier": classifier,
    "timm": timm_vit,
    "timm with registers": lambda: timm_vit(reg_tokens=2, qk_norm=True),
    "timm without cls": lambda: timm_vit(class_token=False, global_pool="avg"),
}
some_images = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(5))

# ---- attention ---------------------------------------------------------------------------------------------


def tokens_before_blocks(model, images):
    if isinstance(model, Encoder):
        x = model.embed(patchify(images, 8)) + model.pos_embed[:, 1:]
        return torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def slow_attention(attention, x, head):
    """softmax(QKᵀ/√d) of one head, from slices of the weights."""
    d = 24 // 3
    rows = [slice(part * 24 + head * d, part * 24 + (head + 1) * d) for part in (0, 1)]
    q, k = (x @ attention.qkv.weight[r].T + attention.qkv.bias[r] for r in rows)
    q, k = attention.q_norm(q), attention.k_norm(k)
    weights = (q @ k.transpose(1, 2) / math.sqrt(d)).exp()
    return weights / weights.sum(dim=2, keepdim=True)


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_the_softmax_by_hand_in_every_layer_and_head(name):
    model = MODELS[name]()
    x = tokens_before_blocks(model, some_images)
    for layer, block in enumerate(model.blocks):
        maps = attention_maps(model, some_images, layer)
        assert maps.shape == (4, 3, x.shape[1], x.shape[1])
        for head in range(3):
            torch.testing.assert_close(maps[:, head], slow_attention(block.attn, block.norm1(x), head))
        x = block(x)


@pytest.mark.parametrize("name", MODELS)
def test_watching_leaves_the_model_as_it_was_bit_by_bit_and_fused(name):
    model = MODELS[name]()
    before = tokens_of(model, some_images)
    observed_layers = []
    with observe_attention(model, [0, 1], lambda layer, attention: observed_layers.append(layer)):
        during = tokens_of(model, some_images)
    assert torch.equal(before, during)
    assert torch.equal(before, tokens_of(model, some_images))
    assert observed_layers == [0, 1]
    for block in model.blocks:
        assert block.attn.fused_attn
        assert not block.attn._forward_pre_hooks


def count_fused(monkeypatch):
    """Calls of fused attention, in a list."""
    calls, fused = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*tensors, **options):
        calls.append(tensors[0].shape)
        return fused(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_takes_the_fused_path_watched_or_not(name, monkeypatch):
    model, calls = MODELS[name](), count_fused(monkeypatch)
    tokens_of(model, some_images)
    assert len(calls) == 2  # one for each block
    with observe_attention(model, [1], lambda *_: None):
        tokens_of(model, some_images)
    assert len(calls) == 4


def test_training_takes_the_fused_path_before_and_after_somebody_looked(monkeypatch):
    decoder = dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=3)
    student = LUT(**TINY | SIZE, **decoder, heads=dict(hidden_dim=16)).train()
    momentum_encoder = MomentumEncoder(student)
    attention_maps(student, some_images, 1)
    calls = count_fused(monkeypatch)
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    losses = student(some_images[None], noise, momentum_encoder(some_images[None], noise))
    (losses.mim + losses.bc).backward()
    # two blocks of each encoder; of the decoder's the first one, for the last one asks with hidden patches alone
    assert [shape[2] for shape in calls] == [7, 7, 2, 2, 7, 5]


def test_hooks_go_when_the_forward_pass_fails():
    model = encoder()
    with pytest.raises(RuntimeError), observe_attention(model, [0], lambda *_: None):
        tokens_of(model, some_images[:, :1])
    assert not model.blocks[0].attn._forward_pre_hooks


@pytest.mark.parametrize("name", MODELS)
def test_the_map_of_a_query_is_its_row_without_prefix_tokens(name):
    model = MODELS[name]()
    attention = attention_maps(model, some_images, 1)
    prefix = num_prefix_tokens(model)
    for row in range(2):
        for column in range(3):
            maps = query_maps(model, attention, (row, column))
            for i in range(6):
                expected = attention[:, :, prefix + 3 * row + column, prefix + i]
                assert torch.equal(maps[:, :, i // 3, i % 3], expected)


# ---- distance ----------------------------------------------------------------------------------------------


@quick
@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_patch_distances_equal_loops(rows, columns):
    distances = patch_distances((rows, columns))
    for i in range(rows * columns):
        for j in range(rows * columns):
            dy, dx = (i // columns - j // columns) / rows, (i % columns - j % columns) / columns
            assert distances[i, j].item() == pytest.approx(math.hypot(dy, dx), abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_distance_equals_a_double_loop(name):
    model = MODELS[name]()
    distance = attention_distance(model, some_images.split(3), [1, 0])
    prefix = num_prefix_tokens(model)
    for place, layer in enumerate([1, 0]):
        attention = attention_maps(model, some_images, layer).tolist()
        for head in range(3):
            each = []
            for image in range(4):
                total = 0.0
                for i in range(6):
                    for j in range(6):
                        y, x = (i // 3 - j // 3) / 2, (i % 3 - j % 3) / 3
                        total += attention[image][head][prefix + i][prefix + j] * math.hypot(y, x)
                each.append(total / 6)
            assert distance.mean[place, head] == pytest.approx(np.mean(each), rel=1e-5)
            assert distance.std[place, head] == pytest.approx(np.std(each), abs=1e-5)
            bins = [int(value / math.sqrt(2) * DISTANCE_BINS) for value in each]
            assert np.array_equal(distance.histogram[place, head], np.bincount(bins, minlength=DISTANCE_BINS))
    assert (distance.layers, distance.images) == ((1, 0), 4)


def set_query_and_key(model, scale):
    """Queries and keys are `scale` times the tokens themselves, in one head."""
    for block in model.blocks:
        block.attn.qkv.bias.zero_()
        block.attn.qkv.weight.zero_()
        block.attn.qkv.weight[:48] = scale * torch.eye(24).repeat(2, 1)


def test_uniform_attention_has_the_mean_distance_of_patches():
    model = encoder(num_heads=1)
    set_query_and_key(model, 0.0)
    distance = attention_distance(model, [some_images], [0, 1])
    share = 6 / 7  # the rest goes to cls
    assert distance.patch_share == pytest.approx(np.full((2, 1), share), rel=1e-5)
    assert distance.mean == pytest.approx(np.full((2, 1), patch_distances((2, 3)).mean().item() * share), rel=1e-5)
    assert distance.std == pytest.approx(np.zeros((2, 1)), abs=1e-6)


def test_attention_to_oneself_has_distance_zero():
    model = encoder(num_heads=1)
    set_query_and_key(model, 100.0)  # tokens have the same length after the norm, so that each is most like itself
    for block in model.blocks:
        block.norm1.weight.fill_(1)
        block.norm1.bias.zero_()
    distance = attention_distance(model, [some_images], [0, 1])
    assert distance.mean == pytest.approx(np.zeros((2, 1)), abs=1e-6)
    assert distance.patch_share == pytest.approx(np.ones((2, 1)), abs=1e-6)


def test_the_distance_of_no_images():
    with pytest.raises(UserError, match="at least one image"):
        attention_distance(encoder(), [], [0])


# ---- spectrum ----------------------------------------------------------------------------------------------


@quick
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    dim=st.integers(1, 6),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_covariance_in_batches_equals_numpys_svd_of_the_whole(seed, sizes, dim, offset):
    x = np.random.default_rng(seed).normal(size=(sum(sizes), dim)) + offset
    running = RunningCovariance(dim)
    for part in torch.from_numpy(x).split(sizes):
        running.add(part)
    expected = np.linalg.svd(np.cov(x.T, bias=True).reshape(dim, dim), compute_uv=False)
    assert running.singular_values().numpy() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("name", ["ours", "timm"])
def test_spectra_equal_numpys_svd_of_each_layers_features(name, pool):
    model = MODELS[name]()
    images = torch.randn(40, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    spectra = feature_spectra(model, images.split(16), pool)
    x = tokens_before_blocks(model, images)
    for layer, block in enumerate(model.blocks):
        x = block(x)
        features = (x[:, 1:].mean(dim=1) if pool == "avg" else x[:, 0]).double().numpy()
        centred = features - features.mean(axis=0)
        expected = np.linalg.svd(centred.T @ centred / 40, compute_uv=False)
        assert spectra[layer] == pytest.approx(expected, rel=1e-6, abs=1e-10 * expected[0])
        # the Gram matrix, image by image, has the same spectrum
        gram = np.linalg.svd(centred @ centred.T / 40, compute_uv=False)[:24]
        assert spectra[layer] == pytest.approx(gram, rel=1e-6, abs=1e-10 * expected[0])
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_spectrum_needs_more_images_than_features():
    with pytest.raises(UserError, match="24 features needs more than 24 images, there are 4"):
        feature_spectra(encoder(), [some_images], "avg")


def test_effective_rank_of_known_spectra():
    spectra = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [3, 3, 0, 0]])
    assert effective_rank(spectra) == pytest.approx([4, 1, 2])


# ---- Grad-CAM ----------------------------------------------------------------------------------------------


def slow_grad_cam(model, image, layer, score, step=1e-5):
    """Central differences of the score in every number of every patch token, then the formula in loops."""
    read = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda m, i, tokens: read.append(tokens.clone()))
    score(image)
    handle.remove()
    tokens, prefix = read[0], num_prefix_tokens(model)
    _, N, D = tokens.shape

    def at(changed):
        handle = model.blocks[layer].norm1.register_forward_hook(lambda m, i, o: changed)
        value = score(image).item()
        handle.remove()
        return value

    gradient = np.zeros((N, D))
    for n in range(prefix, N):
        for d in range(D):
            moved = [tokens.clone(), tokens.clone()]
            moved[0][0, n, d] += step
            moved[1][0, n, d] -= step
            gradient[n, d] = (at(moved[0]) - at(moved[1])) / (2 * step)
    weights = gradient[prefix:].mean(axis=0)
    return [max(0.0, sum(weights[d] * tokens[0, n, d].item() for d in range(D))) for n in range(prefix, N)]


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: classifier(pool="avg"), None),
        (lambda: classifier(pool="token"), 3),
        (lambda: classifier(LinearProbe, pool="token"), None),
        (lambda: timm_vit(reg_tokens=2), 1),
        (encoder, None),
    ],
    ids=["mean of patches", "cls token", "linear probe", "timm with registers", "encoder"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_grad_cam_equals_finite_differences(make, target, layer):
    model = make().double()
    images = some_images[:2].double()
    score = feature_score(model) if isinstance(model, Encoder) else class_score(model, target)
    heat = grad_cam(model, images, layer, score)
    assert heat.shape == (2, 2, 3)
    assert not heat.requires_grad
    for image, each in zip(images, heat, strict=True):
        expected = slow_grad_cam(model, image[None], layer, score)
        assert each.flatten().tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(expected) + 1e-9)
    assert heat.max() > 0  # it says something
    assert not model.blocks[layer].norm1._forward_hooks


def test_grad_cam_leaves_no_gradients_in_a_model_that_is_trained():
    model = classifier().requires_grad_(True)
    grad_cam(model, some_images, 1, class_score(model, None))
    assert all(p.grad is None for p in model.parameters())


# ---- memory ------------------------------------------------------------------------------------------------

STREAMED = """
import resource, sys
import torch
from models_lut import Encoder
from util.analysis.attention import attention_distance, feature_spectra

torch.set_num_threads(1)
model = Encoder(embed_dim=24, depth=2, num_heads=3, img_size=(32, 32), patch_size=4, in_chans=3).eval()

def peak(images):
    generator = torch.Generator().manual_seed(0)
    for study in (lambda b: attention_distance(model, b, [0, 1]), lambda b: feature_spectra(model, b, "avg")):
        study(torch.randn(50, 3, 32, 32, generator=generator) for _ in range(images // 50))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

print(peak(500), peak(5000))
"""


@pytest.mark.slow
def test_memory_is_flat_from_500_to_5000_images():
    command = [sys.executable, "-c", STREAMED]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    few, many = map(int, out.split())
    attention_bytes = 4500 * 2 * 3 * 65**2 * 4  # bytes of the attention of the other images: 435 MiB
    assert many - few < attention_bytes / 10
