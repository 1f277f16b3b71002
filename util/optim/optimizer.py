"""AdamW with the parameter groups of MAE-style training, and LARS for linear probes."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float = 1.0
) -> AdamW:
    """Fused AdamW on the `parameter_groups`."""
    return AdamW(parameter_groups(model, weight_decay, layer_decay), lr=lr, betas=betas, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """No weight decay on biases, 1-D parameters and what `model.no_weight_decay` names.

    Each group carries `lr_scale`: 1, or with `layer_decay` < 1 the scale of its depth (`model.group_matcher`),
    1 for all that lies behind the encoder's blocks.
    """
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

    A step is g + weight_decay * w, times trust_coefficient * |w| / |g + weight_decay * w| where a group is `adapted`
    and neither norm is 0. (timm's form divides by |g| + weight_decay * |w|; the two agree without weight decay.)
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, trust_coefficient: float):
        super().__init__(groups, dict(lr=lr, momentum=momentum, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step on the gradients."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                step = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapted"]:
                    weight_norm, step_norm = p.norm(), step.norm()
                    ratio = group["trust_coefficient"] * weight_norm / step_norm
                    step *= torch.where((weight_norm > 0) & (step_norm > 0), ratio, 1.0)
                velocity = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(step)
                p.sub_(velocity * group["lr"])


def build_lars(model: nn.Module, lr: float, weight_decay: float) -> Lars:
    """LARS as MoCo v3 and MAE probe with: momentum .9, trust coefficient .001.

    Biases and 1-D parameters are neither decayed nor adapted. Parameters without gradients are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    groups = [
        dict(params=adapted, weight_decay=weight_decay, adapted=True),
        dict(params=plain, weight_decay=0.0, adapted=False),
    ]
    for group in groups:
        group["lr_scale"] = 1.0
    return Lars(groups, lr=lr, momentum=0.9, trust_coefficient=0.001)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set each group's rate to lr x its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
