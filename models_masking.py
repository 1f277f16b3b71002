"""Random masks: which patches of an image the student sees. Letters as in models_lut.py; 1 = hidden everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Return V = int(L (1 - r)), truncated as MAE does, so that published checkpoints see the same number."""
    return int(num_patches * (1 - mask_ratio))


class Masking(NamedTuple):
    """The visible patches of each image: the first V of a random order of all patches."""

    shuffle: Tensor  # [B, L] patch ids in the order of the noise: the first V are visible in view u
    num_visible: int  # V

    def visible_ids(self, view: int = 0) -> Tensor:
        """Return the ids [B, V] of the patches that the student sees of view 0 or 1, disjoint between the views."""
        return self.shuffle[:, view * self.num_visible : (view + 1) * self.num_visible]

    def order(self, view: int = 0) -> Tensor:
        """Return the ids [B, L] of all patches, those that the student sees of this view in front."""
        return self.shuffle.roll(-view * self.num_visible, dims=1)

    @property
    def hidden_ids(self) -> Tensor:
        """The ids [B, L - V] of the patches of view u that the decoder must predict."""
        return self.shuffle[:, self.num_visible :]

    @property
    def ids_restore(self) -> Tensor:
        """The position [B, L] of each patch in `shuffle`."""
        return self.shuffle.argsort(dim=1)

    @property
    def mask(self) -> Tensor:
        """The mask of view u in image order, float [B, L], 1 = hidden."""
        return torch.ones_like(self.shuffle, dtype=torch.float32).scatter_(1, self.visible_ids(), 0.0)


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the V patches with the smallest noise [B, L]; the sort is stable, so that every device agrees on ties."""
    num_visible = num_visible_patches(noise.shape[1], mask_ratio)
    return Masking(shuffle=noise.argsort(dim=1, stable=True), num_visible=num_visible)


def mask_squares(noise: Tensor, mask_ratio: float, unit: int, grid_size: tuple[int, int]) -> Masking:
    """Hide or keep squares of `unit` x `unit` patches together, by the noise [B, L] of the first patch of each.

    The grid's sides must be multiples of `unit`.
    """
    rows, cols = grid_size
    squares = mask_from_noise(noise.unflatten(1, grid_size)[:, ::unit, ::unit].flatten(1), mask_ratio)
    ids = torch.arange(rows * cols, device=noise.device).view(rows // unit, unit, cols // unit, unit)
    ids = ids.transpose(1, 2).reshape(-1, unit * unit)  # [squares, patches of a square]
    return Masking(ids[squares.shuffle].flatten(1), squares.num_visible * unit * unit)


def independent_noise(noise: Tensor) -> Tensor:
    """Return noise of the same shape for a second mask, from digits that hardly ever decide the order of the first.

    Noise holds multiples of 2^-24. The first 12 bits decide the order, except for about one pair of patches in 4096;
    the second mask is drawn from the other bits.
    """
    return noise * 2**12 % 1
