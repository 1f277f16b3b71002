"""Relative position bias: against a slow one, zero is none, other sizes, weights, rates, analysis, processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models_position_bias import TABLE, bias_of_block, bias_of_table, pair_index, resample_table, table_length
from models_upernet import UperNet
from models_vit import Classifier
from util.analysis.attention import attention_maps
from util.optim.optimizer import parameter_groups
from util.runtime.errors import UserError
from util.weights.interop import load_weights
from util.weights.vit import open_vit

SHAPE = dict(embed_dim=24, depth=4, num_heads=3)
KINDS = ("shared", "per_block")


def classifier(kind: str = "none", size: tuple[int, int] = (16, 24), **more) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        SHAPE, img_size=size, patch_size=8, in_chans=3, num_classes=5, head_std=0.1, rel_pos_bias=kind, **more
    ).eval()


def upernet(kind: str = "none", size: tuple[int, int] = (32, 48), **more) -> UperNet:
    torch.manual_seed(0)
    shared = dict(img_size=size, patch_size=8, in_chans=3, num_classes=5, head_width=8, rel_pos_bias=kind)
    return UperNet(SHAPE, **shared, **more).eval()


def trained(model):
    """Return the model with tables as a training might leave them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(TABLE):
            parameter.data.normal_(generator=generator)
    return model


def slow_bias(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[M, N, N], pair by pair."""
    h, w = grid
    offsets = [(dy, dx) for dy in range(1 - h, h) for dx in range(1 - w, w)]
    from_cls, to_cls, itself = table[-3:]
    bias = torch.empty(table.shape[1], 1 + h * w, 1 + h * w)
    bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, 0] = from_cls[:, None], to_cls[:, None], itself
    for query in range(h * w):
        for key in range(h * w):
            offset = (query // w - key // w, query % w - key % w)
            bias[:, 1 + query, 1 + key] = table[offsets.index(offset)]
    return bias


@pytest.mark.parametrize("grid", [(3, 4), (1, 2)])
def test_the_bias_of_each_pair(grid):
    table = torch.randn(table_length(grid), 2)
    assert torch.equal(bias_of_table(table, pair_index(grid), grid, grid)[0], slow_bias(table, grid))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_a_bias_against_the_formula(kind, fused):
    model = trained(classifier(kind))
    attention = model.blocks[2].attn
    attention.fused_attn = fused
    inputs, outputs = [], []
    attention.register_forward_hook(lambda _, x, y: inputs.append(x[0]) or outputs.append(y))
    images = torch.randn(2, 3, 16, 24)
    model(images)
    table = attention.get_parameter(TABLE) if kind == "per_block" else model.rel_pos_bias.get_parameter(TABLE)
    q, k, v = attention.qkv(inputs[0]).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 8**0.5 + slow_bias(table, (2, 3))).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(outputs[0], expected)
    torch.testing.assert_close(attention_maps(model, images, 2), weights)  # what analysis shows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_the_bias_in_bf16_and_its_gradient_in_fp32(kind, fused):
    model, images = trained(classifier(kind)), torch.randn(4, 3, 16, 24)
    for block in model.blocks:
        block.attn.fused_attn = fused
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images)
        model.zero_grad()
        logits.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n.endswith(TABLE)]))
    assert gradients[1].dtype == torch.float32
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_zero_bias_is_no_bias_and_a_trained_one_is_not(kind):
    images = torch.randn(2, 3, 32, 48)
    plain, biased = upernet(), upernet(kind, layer_scale=1.0)
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 8 + (4 if kind == "per_block" else 1)
    expected = plain.predict(images)
    torch.testing.assert_close(biased.predict(images), expected, rtol=0, atol=1e-6)
    assert (trained(biased).predict(images) - expected).abs().max() > 1e-3


def test_every_table_learns_at_its_block_s_rate_with_weight_decay():
    """mmsegmentation and BEiT: a block's table has its rate, a shared one that of the heads; both are decayed."""
    for kind in KINDS:
        model = upernet(kind, layer_scale=1.0).train()
        sum(x.square().mean() for x in model(torch.randn(2, 3, 32, 48))).backward()
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, 0.05, 0.5)
        of = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        tables = {name: of[name] for name in of if name.endswith(TABLE)}
        if kind == "shared":
            assert tables == {f"rel_pos_bias.{TABLE}": (1, 0.05)}
        else:
            assert tables == {f"blocks.{i}.attn.{TABLE}": (0.5 ** (4 - i), 0.05) for i in range(4)}
        assert of["blocks.1.ls2.gamma"] == (0.5**3, 0)
        assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in [*tables, "blocks.1.ls2.gamma"])


# ---- other sizes -------------------------------------------------------------------------------------------
def test_a_table_of_another_grid_keeps_near_far_and_cls():
    grid, wanted = (3, 4), (5, 6)
    table = torch.randn(table_length(grid), 2)
    other = resample_table(table, grid, wanted)
    of = lambda table, grid: table[:-3].view(2 * grid[0] - 1, 2 * grid[1] - 1, 2)  # noqa: E731
    before, after = of(table, grid), of(other, wanted)
    torch.testing.assert_close(after[4, 5], before[2, 3])  # offset 0
    torch.testing.assert_close(after[0, 0], before[0, 0])  # the largest
    torch.testing.assert_close(after[8, 10], before[4, 6])
    assert torch.equal(other[-3:], table[-3:])
    torch.testing.assert_close(resample_table(table, grid, grid), table)
    constant = torch.ones_like(table)
    torch.testing.assert_close(resample_table(constant, grid, wanted), torch.ones(table_length(wanted), 2))


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_size_see_a_resampled_bias(kind):
    model, larger = trained(upernet(kind)), torch.randn(1, 3, 48, 64)
    logits = model.predict(larger)
    other = upernet(kind, (48, 64))
    state = model.state_dict()
    for name in [name for name in state if name.endswith(TABLE)]:
        state[name] = resample_table(state[name], (4, 6), (6, 8))
    state["pos_embed"] = torch.cat(
        [
            model.pos_embed[:, :1],
            F.interpolate(
                model.pos_embed[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2), (6, 8), mode="bicubic", antialias=True
            )
            .flatten(2)
            .mT,
        ],
        dim=1,
    )
    other.load_state_dict(state)
    torch.testing.assert_close(other.predict(larger), logits, rtol=1e-4, atol=1e-5)
    small = torch.randn(1, 3, 32, 48)
    first = upernet(kind)
    first.load_state_dict(model.state_dict())
    assert torch.equal(model.predict(small), first.predict(small))  # back at the training's size


# ---- weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_with_and_without_a_bias(kind, tmp_path):
    plain, biased = classifier(), trained(classifier(kind))
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    torch.save({"model": biased.state_dict()}, tmp_path / "biased.pth")
    report = load_weights(upernet(kind, layer_scale=1.0), tmp_path / "plain.pth")
    assert "relative position bias (" in str(report)
    assert "layer scale (8 tensors)" in str(report)

    with pytest.raises(UserError, match=r"\(missing\).*--rel_pos_bias and --layer_scale add: set them to none and 0"):
        load_weights(classifier(kind), tmp_path / "plain.pth", strict=True)

    model = upernet(kind)
    report = load_weights(model, tmp_path / "biased.pth")  # from 2 x 3 patches to 4 x 6
    resampled = [line for line in report.resampled if TABLE in line]
    assert len(resampled) == (4 if kind == "per_block" else 1)
    own, before = (dict(x.named_parameters()) for x in (model, biased))
    for name in own:
        if name.endswith(TABLE):
            torch.testing.assert_close(own[name], resample_table(before[name], (2, 3), (4, 6)))
    with pytest.raises(UserError, match=rf"{TABLE}.*--rel_pos_bias"):
        load_weights(classifier(), tmp_path / "biased.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_analysis_opens_a_biased_classifier_and_exports_refuse_it(kind, tmp_path, monkeypatch, capsys):
    from scripts import convert
    from shared.calls import script_caller

    biased = trained(classifier(kind, layer_scale=0.5))
    config = dict(model="", input_size=[16, 24])
    torch.save({"model": biased.state_dict(), "config": config}, tmp_path / "biased.pth")
    opened = open_vit(str(tmp_path / "biased.pth"), None, "", (), 3, torch.device("cpu")).model
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(opened(images), biased(images))
    torch.testing.assert_close(bias_of_block(opened, 1), bias_of_block(biased, 1))
    call = script_caller(monkeypatch, capsys, tmp_path, convert)
    for layout, output in (("timm", "out.safetensors"), ("mae", "out.pth")):
        status, _, error = call(f"biased.pth --to {layout} --output {output} --num_heads 3")
        assert status == 2
        assert "holds layer scale and relative position bias, which a plain ViT does not have" in error
