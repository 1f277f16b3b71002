"""The models against slow versions: patches, masking, positions, decoder, losses, heads, momentum encoder, sizes."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from models_architectures import MODELS
from models_encoder import fixed_positions, mask_from_noise, num_visible_patches, patchify, take, unpatchify
from models_lut import LUT, MomentumEncoder, Targets, mlp_head
from shared.models import TINY_MODEL, head_by_hand, images, noise
from util.optim.losses import cosine_distance

quick = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small spend their time waiting where threads share the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes) -> LUT:
    """24 patches of 2 x 2 pixels; always the same weights."""
    torch.manual_seed(0)
    return LUT(**TINY_MODEL | changes)


# ---- patches, masking, positions ---------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width", "p"), [(6, 9, 3), (8, 4, 4), (4, 10, 2), (5, 3, 1)])
def test_patches_are_ordered_row_column_channel(channels, height, width, p):
    x = images(2, channels, height, width)
    patches, columns = patchify(x, p), width // p
    assert patches.shape == (2, height // p * columns, p * p * channels)
    for b in range(2):
        for patch in range(patches.shape[1]):
            top, left = patch // columns * p, patch % columns * p
            window = x[b, :, top : top + p, left : left + p].tolist()
            assert patches[b, patch].tolist() == [
                window[c][i][j] for i in range(p) for j in range(p) for c in range(channels)
            ]
    assert torch.equal(unpatchify(patches, p, (height // p, columns)), x)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_embed_is_the_patch_convolution(channels):
    student = tiny(in_chans=channels).double()
    nn.init.normal_(student.patch_embed.proj.bias)
    x = images(2, channels, 8, 12)
    torch.testing.assert_close(student.embed(patchify(x, 2)), student.patch_embed(x), rtol=0, atol=1e-12)


def test_hidden_pixels_never_reach_the_latent():
    student, masking = tiny().double(), mask_from_noise(noise(2), 0.75)
    patches = patchify(images(2, 3, 8, 12), 2)
    expected = student.encode(patches, masking.visible_ids())
    hidden = masking.mask.bool()
    assert torch.equal(
        student.encode(patches.masked_fill(hidden[..., None], math.nan), masking.visible_ids()), expected
    )


@quick
@given(st.integers(1, 3), st.integers(2, 12), st.floats(0.05, 0.95), st.data())
def test_masking_is_a_stable_sort_per_image(batch, patches, ratio, data):
    few = st.lists(st.integers(0, 3), min_size=patches, max_size=patches)  # many ties
    rows = data.draw(st.lists(few, min_size=batch, max_size=batch))
    masking = mask_from_noise(torch.tensor(rows, dtype=torch.float32), ratio)
    visible = int(patches * (1 - ratio))
    for b, row in enumerate(rows):
        order = sorted(range(patches), key=lambda i: (row[i], i))
        assert masking.shuffle[b].tolist() == order
        assert masking.visible_ids()[b].tolist() == order[:visible]
        assert masking.hidden_ids[b].tolist() == order[visible:]
        assert masking.mask[b].tolist() == [float(i not in order[:visible]) for i in range(patches)]
        assert masking.ids_restore[b].tolist() == [order.index(i) for i in range(patches)]
        if 2 * visible <= patches:
            assert masking.visible_ids(1)[b].tolist() == order[visible : 2 * visible]
            assert not set(masking.visible_ids(0)[b].tolist()) & set(masking.visible_ids(1)[b].tolist())


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [(196, 0.75, 49), (196, 0.6, 78), (256, 0.75, 64), (49, 0.75, 12), (16, 0.75, 4), (3, 0.5, 1), (100, 0.9, 9)],
)
def test_number_of_visible_patches_is_truncated(patches, ratio, visible):
    assert num_visible_patches(patches, ratio) == visible


@pytest.mark.parametrize(("dim", "grid"), [(8, (3, 5)), (12, (4, 4)), (64, (14, 2)), (4, (1, 7))])
def test_fixed_positions_follow_the_definition(dim, grid):
    expected = np.zeros((1 + grid[0] * grid[1], dim))
    quarter = dim // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for k in range(quarter):
                angle = 10000 ** (-k / quarter)
                place = expected[1 + row * grid[1] + column]
                place[k], place[quarter + k] = math.sin(column * angle), math.cos(column * angle)
                place[2 * quarter + k], place[3 * quarter + k] = math.sin(row * angle), math.cos(row * angle)
    np.testing.assert_allclose(fixed_positions(dim, grid)[0].numpy(), expected, atol=2e-6)


def test_positions_are_saved_but_do_not_train():
    student, names = tiny(), {"pos_embed", "decoder_pos_embed"}
    assert names <= set(student.state_dict())
    assert not names & {name for name, _ in student.named_parameters()}


# ---- decoder and L_MIM -------------------------------------------------------------------------------------
def slow_decode(student: LUT, latent: torch.Tensor, masking) -> torch.Tensor:
    """Decode like MAE, [B, L, P]: mask tokens behind the visible ones, order restored, positions, blocks."""
    x, restored = student.decoder_embed(latent), []
    for b, order in enumerate(masking.shuffle.tolist()):
        tokens = [student.mask_token[0, 0]] * len(order)
        for place, patch in enumerate(order[: masking.num_visible]):
            tokens[patch] = x[b, 1 + place]
        restored.append(torch.stack([x[b, 0], *tokens]))
    x = torch.stack(restored) + student.decoder_pos_embed
    for block in student.decoder_blocks:
        x = block(x)
    return student.decoder_pred(student.decoder_norm(x))[:, 1:]


def test_the_shuffled_decoder_equals_one_that_restores_the_order():
    student, x, masking = tiny().double(), images(3, 3, 8, 12), mask_from_noise(noise(3), 0.75)

    def decoded(slow: bool) -> list[torch.Tensor]:
        """Predictions, and the gradients of a loss on the hidden ones."""
        student.zero_grad()
        latent = student.encode(patchify(x, 2), masking.visible_ids())
        if slow:
            prediction = slow_decode(student, latent, masking)
        else:
            tokens = take(student.decode(latent, masking)[:, 1:], masking.ids_restore)
            prediction = student.to_pixels(tokens)
        ((prediction - patchify(x, 2)).square().mean(-1) * masking.mask).sum().backward()
        return [prediction.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

    fast, slow = decoded(slow=False), decoded(slow=True)
    assert len(fast) == 1 + sum(not name.startswith(("head", "predictor")) for name, _ in student.named_parameters())
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    _, prediction = student.reconstruct(x, noise(3))
    torch.testing.assert_close(prediction, slow[0], rtol=0, atol=1e-12)


def slow_mim(student: LUT, x: torch.Tensor, masking) -> float:
    """Loops over images, hidden patches and numbers."""
    patches, losses = patchify(x, 2), []
    prediction = slow_decode(student, student.encode(patches, masking.visible_ids()), masking)
    for b, hidden in enumerate(masking.mask.tolist()):
        for patch in (i for i, is_hidden in enumerate(hidden) if is_hidden):
            target = patches[b, patch].tolist()
            if student.norm_pix_loss:
                mean = sum(target) / len(target)
                variance = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
                target = [(t - mean) / math.sqrt(variance + 1e-6) for t in target]
            errors = [(p - t) ** 2 for p, t in zip(prediction[b, patch].tolist(), target, strict=True)]
            losses.append(sum(errors) / len(errors))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mim_loss_is_the_mean_over_hidden_patches(norm_pix_loss):
    student, x = tiny(norm_pix_loss=norm_pix_loss).double(), 3 + 2 * images(2, 3, 8, 12)
    x[0, :, :4] = 0.5  # flat patches have no variance
    losses = student(x[None], noise(2))
    assert losses.mim.item() == pytest.approx(slow_mim(student, x, mask_from_noise(noise(2), 0.75)), rel=1e-6)


# ---- heads and L_BC ----------------------------------------------------------------------------------------
def test_cosine_distance_is_the_squared_distance_of_the_directions():
    x, y = images(2, 5, 7)
    rows = [[[v / math.hypot(*row) for v in row] for row in z.tolist()] for z in (x, y)]
    distances = [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in zip(*rows, strict=True)]
    assert cosine_distance(x, y).item() == pytest.approx(sum(distances) / 5, rel=1e-6)
    assert cosine_distance(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(x, -x / 2).item() == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("norm", "norm_type"), [("BN", nn.BatchNorm1d), ("LN", nn.LayerNorm), ("none", None)])
@pytest.mark.parametrize(("activation", "activation_type"), [("ReLU", nn.ReLU), ("GELU", nn.GELU)])
def test_layout_of_the_heads(depth, norm, norm_type, activation, activation_type):
    head = mlp_head(6, 10, depth, norm, activation)
    between = [norm_type, activation_type] if norm_type else [activation_type]
    assert [type(layer) for layer in head] == [nn.Linear, *(depth - 1) * [*between, nn.Linear]]
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    widths = [6, *(depth - 1) * [10], 6]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(widths))
    assert all(layer.bias is None for layer in linear)
    assert head(torch.randn(4, 6)).shape == (4, 6)


def test_heads_have_their_own_depths_and_the_release_s_numbers():
    names = {n for n in tiny(head_depth=2, predictor_depth=3).state_dict() if n.startswith(("head", "predictor"))}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == {"head.0.weight", "head.3.weight", *(f"head.1.{n}" for n in norm)} | {
        *("predictor.0.weight", "predictor.3.weight", "predictor.6.weight"),
        *(f"predictor.{i}.{n}" for i in (1, 4) for n in norm),
    }


def test_mae_has_no_heads_and_shares_the_start_of_lut():
    mae, lut = tiny(heads=None).state_dict(), tiny().state_dict()
    assert set(lut) - set(mae) == {name for name in lut if name.startswith(("head.", "predictor."))}
    assert all(torch.equal(mae[name], lut[name]) for name in mae)
    losses = tiny(heads=None).double()(images(1, 2, 3, 8, 12), noise(2))
    assert losses.bc.item() == 0 < losses.mim.item()


def test_symmetric_form_by_hand():
    student, views, masking = tiny().double(), images(2, 6, 3, 8, 12), mask_from_noise(noise(6), 0.75)
    for head in (student.head, student.predictor):
        nn.init.uniform_(head[1].weight, 0.5, 2)
        nn.init.uniform_(head[1].bias, 0.1, 1)
    targets = MomentumEncoder(student).double()(views.flip(0), noise(6))  # of v, then of u
    views.requires_grad_()
    bc, running = 0, torch.zeros(10, dtype=torch.float64)
    for view in range(2):
        latent = student.encode(patchify(views[view], 2), masking.visible_ids(view))
        projected, mean = head_by_hand(student.head, latent[:, 1:].mean(1))
        predicted, _ = head_by_hand(student.predictor, projected)
        bc += (F.normalize(predicted) - F.normalize(targets.context[view])).square().sum(1).mean() / 2
        running = 0.9 * running + 0.1 * mean  # view u first
    losses = student(views, noise(6), targets)
    torch.testing.assert_close(losses.bc.double(), bc, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.head[1].running_mean, running, rtol=0, atol=1e-12)
    assert losses.mim.item() == pytest.approx(slow_mim(student, views[0], masking), rel=1e-6)
    (grad,) = torch.autograd.grad(losses.mim, views)
    assert grad[0].any()
    assert not grad[1].any()  # the decoder sees view u only


# ---- sizes, shapes, initialisation -------------------------------------------------------------------------
SIZES = {  # width, depth, heads, width and depth of the decoder, millions of parameters of the encoder
    "vit_small_patch16": (384, 12, 6, 512, 8, 21.6),
    "vit_medium_patch16": (512, 12, 8, 512, 8, 38.3),
    "vit_base_patch16": (768, 12, 12, 512, 8, 85.6),
    "vit_large_patch16": (1024, 24, 16, 512, 8, 303.1),
    "vit_huge_patch14": (1280, 32, 16, 512, 8, 630.4),
    "vit_nano_patch4": (96, 6, 3, 64, 2, 0.676),
    "vit_tiny_patch4": (192, 12, 3, 192, 4, 5.348),
    "vit_tiny_patch8": (192, 12, 3, 192, 4, 5.376),
    "vit_small_patch4": (384, 12, 6, 192, 4, 21.314),
    "vit_small_patch8": (384, 12, 6, 192, 4, 21.369),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_named_model_has_its_size(name):
    width, depth, num_heads, *decoder, millions = SIZES[name]
    patch = int(name.rpartition("patch")[2])
    side = {16: 224, 14: 224, 8: 64, 4: 32}[patch]
    assert set(MODELS) == {f"{prefix}_{known}" for prefix in ("lut", "mae") for known in SIZES}
    for prefix in ("lut", "mae"):
        shape = MODELS[f"{prefix}_{name}"]
        assert shape["img_size"] == side
        with torch.device("meta"):
            student = LUT(**shape | dict(img_size=(side, side), in_chans=3))
        assert student.patch_embed.proj.weight.shape == (width, 3, patch, patch)
        assert (len(student.blocks), student.blocks[0].attn.num_heads) == (depth, num_heads)
        assert [student.decoder_embed.out_features, len(student.decoder_blocks)] == decoder
        assert student.decoder_blocks[0].attn.num_heads == {512: 16, 192: 3, 64: 2}[decoder[0]]
        encoder = sum(p.numel() for n, p in student.named_parameters() if not re.match("decoder|mask_token", n))
        assert encoder == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 12), (12, 4)])
def test_other_shapes_train(channels, size):
    student, patches = tiny(img_size=size, in_chans=channels).double(), size[0] * size[1] // 4
    losses = student(images(1, 4, channels, *size), noise(4, patches), Targets(images(1, 4, 12), None))
    (losses.mim + losses.bc).backward()
    for name, p in student.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize(
    "changes",
    [dict(img_size=(9, 12)), dict(img_size=(8, 13)), dict(embed_dim=18), dict(embed_dim=16), dict(num_heads=5)],
)
def test_shapes_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=" ".join(changes)):
        tiny(**changes)


def test_initial_weights_are_mae_s():
    torch.manual_seed(0)
    student = LUT(**TINY_MODEL | dict(embed_dim=240, depth=1, decoder_embed_dim=160, decoder_depth=1, patch_size=4))
    linear = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert len(linear) == 1 + 2 * 4 + 2 + 4  # patches, two blocks, decoder's in and out, heads
    for name, module in linear.items():
        matrix = module.weight.detach().flatten(1)
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.99 * bound < matrix.abs().max() <= bound, name
        assert stats.kstest(matrix.flatten()[:20_000], "uniform", args=(-bound, 2 * bound)).pvalue > 1e-4, name
        assert module.bias is None or not module.bias.any(), name
    for token in (student.cls_token, student.mask_token):
        assert stats.kstest(token.detach().flatten(), "norm", args=(0, 0.02)).pvalue > 1e-4
        assert 0.017 < token.std() < 0.023
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm1d)]
    assert len(norms) == 2 * 2 + 2 + 2
    assert all((m.weight == 1).all() and not m.bias.any() for m in norms)


# ---- momentum encoder --------------------------------------------------------------------------------------
@pytest.fixture
def trained() -> tuple[LUT, MomentumEncoder]:
    """Return a momentum encoder, and its student after it went elsewhere: weights, running statistics, positions."""
    student = tiny()
    momentum_encoder = MomentumEncoder(student)
    generator = torch.Generator().manual_seed(5)
    for x in student.state_dict().values():
        x += torch.rand(x.shape, generator=generator) if x.is_floating_point() else 3
    return student, momentum_encoder


def test_the_momentum_encoder_is_a_frozen_copy_of_encoder_and_projector():
    student = tiny().eval()
    momentum_encoder, x = MomentumEncoder(student), images(3, 3, 8, 12).float()
    left_out = ("decoder", "mask_token", "predictor")
    assert set(momentum_encoder.state_dict()) == {n for n in student.state_dict() if not n.startswith(left_out)}
    assert not any(p.requires_grad for p in momentum_encoder.parameters())
    output = momentum_encoder(x[None], noise(3)).context[0]
    assert torch.equal(output, student.head(student.features(x)))
    for p in student.parameters():
        p.data.zero_()
    assert torch.equal(momentum_encoder(x[None], noise(3)).context[0], output)  # nothing is shared
    nn.ModuleList([momentum_encoder]).train()
    assert not any(module.training for module in momentum_encoder.modules())


@pytest.mark.parametrize("decay", [0, 0.25, 0.7, 0.996, 1])
def test_update_is_a_moving_average_of_every_number(trained, decay):
    student, momentum_encoder = trained
    averages, weights = ({n: x.clone() for n, x in m.state_dict().items()} for m in (momentum_encoder, student))
    momentum_encoder.update(student, decay)
    for name, after in momentum_encoder.state_dict().items():
        unchanged = decay == 1 or name.endswith(("pos_embed", "num_batches_tracked"))
        if unchanged or decay == 0:
            assert torch.equal(after, averages[name] if unchanged else weights[name]), name
        else:
            pairs = zip(averages[name].flatten().tolist(), weights[name].flatten().tolist(), strict=True)
            expected = [decay * a + (1 - decay) * b for a, b in pairs]  # in float64
            np.testing.assert_allclose(after.flatten().numpy(), expected, rtol=1e-6, atol=1e-6, err_msg=name)
    assert all(torch.equal(x, weights[name]) for name, x in student.state_dict().items())
