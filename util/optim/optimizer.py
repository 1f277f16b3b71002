"""AdamW with the parameter groups of MAE-style training, and LARS for linear probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float = 1.0
) -> AdamW:
    """Build fused AdamW on the `parameter_groups`."""
    return AdamW(parameter_groups(model, weight_decay, layer_decay), lr=lr, betas=betas, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group the parameters by weight decay and depth.

    Biases, 1-D parameters and what `model.no_weight_decay` names are not decayed. Each group has an `lr_scale`: with
    `layer_decay` < 1 that of its depth (`model.group_matcher`), else and for everything after the encoder's blocks 1.
    """
    from timm.optim import (
        param_groups_layer_decay,
        param_groups_weight_decay,
    )  # slow to import: not for --help

    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    else:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    for group in groups:
        group.setdefault("lr_scale", 1.0)
    return groups


class Lars(Optimizer):
    """SGD with momentum whose steps are rescaled layer by layer (You et al. 2017), in the form that MAE probes with.

    A step is g + weight_decay * w, times trust_coeff * |w| / |g + weight_decay * w| where a group has
    `always_adapt` and neither norm is 0. timm's Lars divides by |g| + weight_decay * |w|, which is the same without
    weight decay; its states load here.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, trust_coeff: float):
        super().__init__(groups, dict(lr=lr, momentum=momentum, trust_coeff=trust_coeff))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step on the gradients."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                step = p.grad.add(p, alpha=group["weight_decay"])
                if group["always_adapt"]:
                    weight_norm, step_norm = p.norm(), step.norm()
                    ratio = group["trust_coeff"] * weight_norm / step_norm
                    step *= torch.where((weight_norm > 0) & (step_norm > 0), ratio, 1.0)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                velocity = self.state[p]["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(step)
                p.sub_(velocity * group["lr"])


def build_lars(model: nn.Module, lr: float, weight_decay: float) -> Lars:
    """Build LARS as MoCo v3 and MAE use it for probes: momentum .9, trust coefficient .001.

    Biases and 1-D parameters are neither decayed nor adapted. Parameters without gradients are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    groups = [
        dict(params=adapted, weight_decay=weight_decay, always_adapt=True, lr_scale=1.0),
        dict(params=plain, weight_decay=0.0, always_adapt=False, lr_scale=1.0),
    ]
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set each group's learning rate to lr times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
