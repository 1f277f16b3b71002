"""Classifiers: what timm computes, depth-wise learning rates, frozen encoders, weights of other programs."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from models_architectures import ARCHITECTURES, MODELS
from models_encoder import fixed_positions, patchify
from models_vit import Classifier, DropPath, LinearProbe
from shared.reference import tiny_student
from util.optim.optimizer import build_lars, build_optimizer, set_learning_rate
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import load_weights

DATA = ROOT / "tests" / "files"
TINY = dict(embed_dim=24, depth=2, num_heads=3)


def tiny(kind=Classifier, **changes):
    torch.manual_seed(1)
    return kind(TINY, **dict(img_size=(32, 32), patch_size=8, in_chans=3, num_classes=5) | changes)


# ---- model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_from_the_tokens_by_hand(pool):
    model = tiny(pool=pool, head_std=0.5).eval()
    images = torch.randn(4, 3, 32, 32)
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(4, -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    features = model.fc_norm(x[:, 1:].mean(dim=1)) if pool == "avg" else model.norm(x)[:, 0]
    torch.testing.assert_close(model(images), model.head(features))
    assert isinstance(model.norm if pool == "avg" else model.fc_norm, nn.Identity)


def test_positions_start_as_the_sines_of_pre_training():
    model = tiny(img_size=(32, 48))
    assert torch.equal(model.pos_embed, fixed_positions(24, (4, 6)))
    assert model.pos_embed.requires_grad


def test_stochastic_depth_rises_linearly_to_the_last_block():
    model = Classifier(
        ARCHITECTURES["vit_nano_patch4"], img_size=(32, 32), patch_size=8, in_chans=3, num_classes=5, drop_path=0.3
    )
    for name in ("drop_path1", "drop_path2"):
        rates = [float(getattr(getattr(block, name), "drop_prob", 0.0)) for block in model.blocks]
        assert rates == pytest.approx([0.3 * i / 5 for i in range(6)])
    assert not any("drop" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_leaves_out_samples_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 2).to(dtype)
    layer = DropPath(0.3)
    y = layer(x)
    is_kept = (y != 0).any(dim=(1, 2))
    assert y.dtype == dtype
    assert float(is_kept.float().mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    torch.testing.assert_close(y[is_kept], (x[is_kept].float() / 0.7).to(dtype))
    assert not y[~is_kept].any()
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_builds_as_a_classifier(name):
    shape = ARCHITECTURES[name]
    with torch.device("meta"):
        side = shape["img_size"]
        model = Classifier(shape, img_size=(side, side), patch_size=shape["patch_size"], in_chans=3, num_classes=10)
    assert len(model.blocks) == shape["depth"]
    assert model.head.in_features == shape["embed_dim"]


# ---- layer-wise learning rates -----------------------------------------------------------------------------


def expected_scale(name: str, depth: int, decay: float) -> float:
    """Return the scale: tokens, positions and patches lie below block 0, norm and head above the last block."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1
    return decay ** (depth + 1 - layer)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layer_decay_of_every_parameter_of_vit_base(pool):
    model = Classifier(
        MODELS["lut_vit_base_patch16"], img_size=(224, 224), patch_size=16, in_chans=3, num_classes=10, pool=pool
    )
    optimizer = build_optimizer(model, 1.0, (0.9, 0.999), 0.05, layer_decay=0.65)
    set_learning_rate(optimizer, 2e-3)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = groups[id(p)]
        assert group["lr"] == pytest.approx(2e-3 * expected_scale(name, 12, 0.65), rel=1e-12), name
        decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.05 if decayed else 0.0), name
    table = {0: 0.65**13, 5: 0.65**8, 11: 0.65**2}  # worked out by hand for three blocks
    assert groups[id(model.pos_embed)]["lr"] == pytest.approx(2e-3 * 0.0036972, rel=1e-4)
    assert groups[id(model.blocks[4].mlp.fc1.weight)]["lr"] == pytest.approx(2e-3 * table[5])
    assert groups[id(model.head.weight)]["lr"] == 2e-3


# ---- linear probe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_probe_reads_the_features_of_pre_training(pool):
    student = tiny_student().eval()
    load_weights(student, DATA / "release_lut_tiny.pth")
    probe = tiny(LinearProbe, pool=pool)
    load_weights(probe, DATA / "release_lut_tiny.pth")
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        tokens = student.encode(patchify(images, 8))
    features = tokens[:, 1:].mean(dim=1) if pool == "avg" else tokens[:, 0]
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    expected = normed @ probe.head[1].weight.T + probe.head[1].bias
    torch.testing.assert_close(probe.train()(images), expected, rtol=1e-4, atol=1e-5)


def test_only_the_linear_layer_of_a_probe_trains():
    probe = tiny(LinearProbe).train()
    assert probe.training
    assert probe.head.training
    assert not any(m.training for name, m in probe.named_modules() if name and not name.startswith("head"))
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    probe(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for name, p in probe.named_parameters() if not name.startswith("head"))
    assert not probe.eval().head.training


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3, 0.05])
def test_lars_against_a_slow_version(weight_decay):
    """Trust ratio by the norm of g + wd * w on the matrix, plain momentum SGD on the bias: MAE's form."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    optimizer = build_lars(layer, lr=0.3, weight_decay=weight_decay)
    set_learning_rate(optimizer, 0.3)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    for _ in range(50):
        x = torch.randn(7, 5, dtype=torch.double)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        for name, p in layer.named_parameters():
            step = p.grad.clone()
            if name == "weight":
                step = step + weight_decay * weights[name]
                step = step * 0.001 * weights[name].norm() / step.norm()
            velocity[name] = 0.9 * velocity[name] + step
            weights[name] = weights[name] - 0.3 * velocity[name]
        optimizer.step()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-6, atol=1e-9)


def test_lars_goes_on_from_a_state_of_timm_s():
    """Earlier versions of this code saved it; the two agree without weight decay."""
    layers = [nn.Linear(5, 3).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    groups = [
        dict(params=[layers[0].weight], weight_decay=0.0, always_adapt=True, lr_scale=1.0),
        dict(params=[layers[0].bias], weight_decay=0.0, always_adapt=False, lr_scale=1.0),
    ]
    optimizers = [timm.optim.Lars(groups, lr=0.3, momentum=0.9, trust_coeff=0.001), build_lars(layers[1], 0.3, 0.0)]

    def step(which: int, x: torch.Tensor) -> None:
        optimizers[which].zero_grad()
        layers[which](x).square().mean().backward()
        optimizers[which].step()

    first, second = torch.randn(2, 7, 5, dtype=torch.double)
    step(0, first)
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for which in range(2):
        step(which, second)
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# ---- weights of other programs -----------------------------------------------------------------------------

FILES = ["mae_encoder_only_tiny.pth", "mae_full_tiny.pth", "release_lut_tiny.pth"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_published_layouts_start_a_classifier(name, pool):
    model = tiny(pool=pool)
    report = load_weights(model, DATA / name)
    saved, own = load_checkpoint(DATA / name)["model"], model.state_dict()
    encoder = {n for n in own if not n.startswith(("head", "fc_norm"))}
    assert set(report.loaded) == encoder
    assert all(torch.equal(own[n], saved[n]) for n in encoder)
    assert ("norm.weight" in report.unexpected) == (pool == "avg")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["renamed", "missing", "reshaped"])
def test_a_damaged_encoder_starts_no_classifier(tmp_path, name, damage):
    checkpoint = load_checkpoint(DATA / name)
    tensor = checkpoint["model"].pop("blocks.0.attn.proj.weight")
    if damage == "renamed":
        checkpoint["model"]["blocks.0.attn.project.weight"] = tensor
    elif damage == "reshaped":
        checkpoint["model"]["blocks.0.attn.proj.weight"] = tensor[:, :-1].contiguous()
    torch.save(checkpoint, tmp_path / name)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.proj\.weight"):
        load_weights(tiny(), tmp_path / name, flag="--finetune")


def test_mae_s_fine_tuned_layout_loads_whole(tmp_path):
    tuned = tiny(head_std=0.5)
    torch.save({"model": tuned.state_dict(), "epoch": 99}, tmp_path / "tuned.pth")
    model = tiny()
    report = load_weights(model, tmp_path / "tuned.pth", strict=True)
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), tuned.eval()(images))

    other = tiny(num_classes=9)
    assert "head.weight" in load_weights(other, tmp_path / "tuned.pth").missing  # the encoder alone is taken
    with pytest.raises(UserError, match=r"2 tensors of the model .*head\.weight .*\[5, 24\] instead of \[9, 24\]"):
        load_weights(other, tmp_path / "tuned.pth", strict=True)
    with pytest.raises(UserError, match=r"norm\.weight \(missing\).* no last norm: take the pre-training's file"):
        load_weights(tiny(pool="token"), tmp_path / "tuned.pth")


def test_learned_positions_are_interpolated_for_a_grid_that_is_not_square(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, **TINY)
    nn.init.normal_(vit.pos_embed)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = tiny(pool="token", img_size=(32, 64))
    report = load_weights(model, tmp_path / "vit.pth")
    assert report.resampled == ("pos_embed: 4 x 4 to 4 x 8 patches, interpolated",)
    grid = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (4, 8), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert torch.equal(model.pos_embed[:, :1], vit.pos_embed[:, :1])


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (1, 3)])
def test_grey_images_give_the_same_tokens_with_other_channels(tmp_path, old, new):
    torch.save(tiny(in_chans=old, head_std=0.5).state_dict(), tmp_path / "vit.pth")
    a, b = tiny(in_chans=old), tiny(in_chans=new)
    for model in (a, b):
        load_weights(model, tmp_path / "vit.pth", strict=True)
    grey = torch.randn(2, 1, 32, 32)
    logits = [m.eval()(grey.expand(-1, m.in_chans, -1, -1)) for m in (a, b)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
