"""Tiny models and their inputs."""

from __future__ import annotations

import torch
from torch import nn

TINY_MODEL = dict(
    img_size=(8, 12), patch_size=2, in_chans=3, embed_dim=12, depth=2, num_heads=3, decoder_embed_dim=8,
    decoder_depth=2, decoder_num_heads=2, heads=dict(hidden_dim=10),
)  # fmt: skip


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(batch: int, patches: int = 24) -> torch.Tensor:
    return images(batch, patches, seed=2)


def head_by_hand(head: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two linear layers with BatchNorm (statistics of this batch) and ReLU between; also the batch's mean."""
    x = x @ head[0].weight.T
    mean, var = x.mean(0), (x - x.mean(0)).square().mean(0)
    return ((x - mean) / (var + 1e-5).sqrt() * head[1].weight + head[1].bias).clamp(min=0) @ head[3].weight.T, mean
