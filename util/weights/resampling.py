"""Weights of another image size, patch size or number of channels, resampled to a model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

from models_encoder import fixed_positions
from models_position_bias import resampled_tables
from util.weights.layouts import DECODER_POSITIONS, PATCH_KERNEL, POSITIONS

Grid = tuple[int, int]  # rows and columns of patches


def resample_to_model(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    grid_size: Grid,
    config: Mapping[str, Any] | None,
    computes_positions: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state with patch kernel and positions of the model's shapes, and for each that changed how it did.

    Args:
        own: the model's state.
        config: settings of the run that wrote the state, if known.
        computes_positions: see `resample_positions`.
    """
    state, changed = dict(state), {}
    kernel, wanted = state.get(PATCH_KERNEL), own[PATCH_KERNEL]
    patch = 1 if kernel is None else kernel.shape[-1]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[0] == wanted.shape[0]:
        state[PATCH_KERNEL], changes = resample_kernel(kernel, wanted)
        if changes:
            changed[PATCH_KERNEL] = " and ".join(changes)
    for name in (POSITIONS, DECODER_POSITIONS):
        positions = state.get(name)
        if positions is None or name not in own or positions.ndim != 3 or positions.shape[2] != own[name].shape[2]:
            continue
        grid = grid_of(positions, patch, (config or {}).get("input_size"), positions.shape == own[name].shape)
        if grid is not None and grid != tuple(grid_size):
            state[name], method = resample_positions(positions, grid, grid_size, computes_positions)
            if name == POSITIONS:
                tables = resampled_tables(state, grid, grid_size)
                state |= tables
                changed |= dict.fromkeys(tables, "interpolated")
            changed[name] = f"{' x '.join(map(str, grid))} to {' x '.join(map(str, grid_size))} patches, {method}"
    return state, changed


def resample_kernel(kernel: Tensor, wanted: Tensor) -> tuple[Tensor, list[str]]:
    """Return a patch kernel [D, C', q, q] in the shape of `wanted`, [D, C, p, p], and what changed."""
    changes = []
    if kernel.shape[1] != wanted.shape[1]:
        changes.append(f"{kernel.shape[1]} to {wanted.shape[1]} channels")
        kernel = adapt_channels(kernel, wanted.shape[1])
    if kernel.shape[2:] != wanted.shape[2:]:
        changes.append(f"patch {list(kernel.shape[2:])} to {list(wanted.shape[2:])}")
        kernel = resample_patch_embed(kernel, list(wanted.shape[2:]))
    return kernel, changes


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """Return a patch kernel [D, C, p, p] for another number of channels that gives grey images the same tokens.

    One channel sees the sum of the old ones; more channels repeat them in turn, with the same sum.
    """
    total = kernel.sum(dim=1, keepdim=True)
    if in_chans == 1:
        return total
    repeated = kernel[:, torch.arange(in_chans) % kernel.shape[1]]
    surplus = repeated.sum(dim=1, keepdim=True) - total  # what repeating adds, taken from all channels alike
    return repeated - surplus / in_chans


def is_square(number: int) -> bool:
    """True if a grid of so many patches can be square."""
    return number > 0 and math.isqrt(number) ** 2 == number


def grid_of(positions: Tensor, patch: int, image_size: object, fits: bool) -> Grid | None:
    """Return rows and columns of the patches that positions [1, 1 + L, D] belong to, None if nothing tells.

    MAE's fixed sines tell it themselves. For learned positions the size of the run's images does, if it is known: a
    list of one number, or height and width, in pixels. Otherwise a square number L tells it, unless the positions are
    as many as the model's (`fits`).
    """
    number = positions.shape[1] - 1
    grids = [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]
    for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if are_sines(positions, grid):
            return grid
    if isinstance(image_size, list | tuple) and image_size:
        grid = (image_size[0] // patch, image_size[-1] // patch)
        if grid in grids:
            return grid
    return (math.isqrt(number), math.isqrt(number)) if is_square(number) and not fits else None


def are_sines(positions: Tensor, grid: Grid) -> bool:
    """True if positions [1, 1 + L, D] are MAE's fixed ones for the grid."""
    return positions.shape[2] % 4 == 0 and torch.allclose(
        positions.float(), fixed_positions(positions.shape[2], grid), atol=1e-4
    )


def resample_positions(positions: Tensor, grid: Grid, wanted: Grid, computes_positions: bool) -> tuple[Tensor, str]:
    """Return positions [1, 1 + L', D] of a grid for another grid as [1, 1 + L, D], and the method.

    They are interpolated, as timm does: on a larger image the encoder then meets none beyond those that it was
    trained with. (timm's own function would take two grids with equally many patches for one.)

    Args:
        computes_positions: True for a model that is pre-trained: MAE's fixed sines are computed for the new grid.
    """
    if computes_positions and are_sines(positions, grid):
        return fixed_positions(positions.shape[2], wanted), "sines computed for the new grid"
    patches = positions[:, 1:].float().unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    resized = F.interpolate(patches, tuple(wanted), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1].float(), resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1), "interpolated"
