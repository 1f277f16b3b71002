"""Parameter groups against a rule written anew, and the optimiser's step against AdamW in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from models_architectures import MODELS
from models_lut import LUT
from util.optim.optimizer import build_optimizer, set_learning_rate

TINY = dict(
    img_size=(8, 8), patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, decoder_embed_dim=8,
    decoder_depth=1, decoder_num_heads=2, heads=dict(hidden_dim=6),
)  # fmt: skip
ENDS_OF_VECTORS = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "head.1.weight", "predictor.1.weight")


def vit_base() -> LUT:
    """Return a ViT-B on the meta device: names and shapes, no numbers."""
    with torch.device("meta"):
        return LUT(**MODELS["lut_vit_base_patch16"] | dict(img_size=(224, 224), in_chans=3, heads=dict(hidden_dim=8)))


def group_of_each(model: nn.Module, layer_decay: float, weight_decay: float = 0.05) -> dict[str, dict]:
    """Name to group; every parameter has to be in exactly one."""
    groups = build_optimizer(model, 1e-3, (0.9, 0.95), weight_decay, layer_decay).param_groups
    names, group_of = {p: name for name, p in model.named_parameters()}, {}
    for group in groups:
        for p in group["params"]:
            assert names[p] not in group_of
            group_of[names[p]] = group
    assert set(group_of) == set(names.values())
    return group_of


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_weight_decay_is_on_matrices_and_tokens_only(layer_decay):
    groups = group_of_each(vit_base(), layer_decay)
    for name, group in groups.items():
        assert group["weight_decay"] == (0 if name.endswith(ENDS_OF_VECTORS) else 0.05), name
    assert groups["cls_token"]["weight_decay"] == groups["mask_token"]["weight_decay"] == 0.05


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_no_weight_decay_at_all(layer_decay):
    assert {group["weight_decay"] for group in group_of_each(vit_base(), layer_decay, 0.0).values()} == {0}


@pytest.mark.parametrize("layer_decay", [1.0, 0.65, 0.75])
def test_scale_of_each_depth(layer_decay):
    num_layers = 12 + 1
    for name, group in group_of_each(vit_base(), layer_decay).items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if name == "cls_token" or name.startswith("patch_embed."):
            depth = 0
        else:
            depth = int(block[1]) + 1 if block else num_layers
        assert group["lr_scale"] == pytest.approx(layer_decay ** (num_layers - depth), rel=1e-12), name


def test_what_is_frozen_is_left_out():
    model = LUT(**TINY)
    model.patch_embed.requires_grad_(False)
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 0.05)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for name, p in model.named_parameters() if not name.startswith("patch_embed")}


def test_the_rate_of_each_group_is_the_rate_times_its_scale():
    optimizer = build_optimizer(LUT(**TINY), 1e-3, (0.8, 0.99), 0.05, 0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.125, 0.25, 0.5, 1}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}
    for lr in (2e-3, 0.0, 7e-4):  # from the scale each time, so that nothing adds up
        set_learning_rate(optimizer, lr)
        assert all(group["lr"] == lr * group["lr_scale"] for group in optimizer.param_groups)


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_steps_equal_adamw_in_float64(layer_decay):
    torch.manual_seed(0)
    model, betas, weight_decay, eps = LUT(**TINY), (0.9, 0.95), 0.05, 1e-8
    optimizer = build_optimizer(model, 1.0, betas, weight_decay, layer_decay)
    scale = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    slow = {p: [p.detach().double().clone(), 0.0, 0.0] for p in model.parameters()}
    for step, lr in enumerate((1e-2, 3e-3, 1e-2), start=1):
        set_learning_rate(optimizer, lr)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            weight, first, second = slow[p]
            rate, grad = lr * scale[p], p.grad.double()
            if not name.endswith(ENDS_OF_VECTORS):
                weight = weight - rate * weight_decay * weight
            first = betas[0] * first + (1 - betas[0]) * grad
            second = betas[1] * second + (1 - betas[1]) * grad**2
            corrected = (second / (1 - betas[1] ** step)).sqrt() + eps
            slow[p] = [weight - rate * first / (1 - betas[0] ** step) / corrected, first, second]
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.double(), slow[p][0], rtol=0, atol=1e-6, msg=f"step {step}: {name}")
