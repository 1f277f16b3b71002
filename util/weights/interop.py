"""Weights from other programs: MAE, LUT's release, timm, our own runs. Strict, with a report of what matched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from models_encoder import fixed_positions
from models_lut import Student
from models_position_bias import SHARED, TABLE, resampled_tables, transfer_part
from util.runtime.errors import UserError
from util.weights.checkpoint import load_checkpoint

Weights = Literal["student", "momentum"]
CLASSIFIER = "ViT classifier"
Grid = tuple[int, int]  # rows and columns of patches
# left in names by DistributedDataParallel, torch.compile, DINO and iBOT, MoCo v3
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "base_encoder.")
STATES = ("model", "state_dict", "teacher")  # where programs put their weights; of DINO's and iBOT's two the teacher
# projector or classifier, the other heads of pre-training, a classifier's norm, UperNet, MoCo v3's second encoder
OTHER_PARTS = (
    *("head", "predictor", "mask_head", "mask_predictor", "fc_norm"),
    *("neck", "decode_head", "auxiliary_head", "momentum_encoder"),
)
# what an encoder's tokens pass through: its features are others where the file has more of it than the model
PASSED_THROUGH = ("blocks", "patch_embed", "norm_pre", "reg_token", "dist_token", SHARED)
PATCH_KERNEL, POSITIONS, DECODER_POSITIONS = "patch_embed.proj.weight", "pos_embed", "decoder_pos_embed"


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor; names as in our models."""

    layout: str  # which program's file it is
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]  # among the loaded, changed to fit: `name: how`
    missing: tuple[str, ...]  # of the model, left as initialised: not in the file, or their part is incomplete there
    mismatched: tuple[str, ...]  # among the missing, there with another shape: `name: shape instead of shape`
    unexpected: tuple[str, ...]  # in the file, not used
    settings: Mapping[str, Any]  # of the run that wrote it; empty where it is none of ours

    def __str__(self) -> str:
        """One line; a part that is wholly missing or unused is named as one."""
        lists = {
            "left as initialised": by_part(self.missing),
            "of another shape": shortened(list(self.mismatched)),
            "not used": by_part(self.unexpected),
            "resampled": ", ".join(self.resampled),
        }
        said = [f"{title}: {names}" for title, names in lists.items() if names]
        return "; ".join([f"{self.layout}, {len(self.loaded)} tensors loaded", *said])


def by_part(names: tuple[str, ...]) -> str:
    """Names of the encoder in full, those of other parts counted."""
    count = Counter(part_of(name) for name in names)
    encoder = [name for name in names if part_of(name) == "encoder"]
    return ", ".join(encoder + [f"{part} ({n} tensors)" for part, n in count.items() if part != "encoder"])


# --------------------------------------------------------------------------------------------------------
# Reading a file under our names
# --------------------------------------------------------------------------------------------------------


class WeightsFile(NamedTuple):
    """What a checkpoint holds."""

    state: dict[str, Tensor]  # under MAE's names, which are ours
    layout: str  # which program's file it is
    config: dict[str, Any] | None  # the settings of the run, where it is one of ours
    weights: Weights  # which of the file's


def read_weights(path: Path, weights: Weights | None = "student", flag: str = "--init_from") -> WeightsFile:
    """The weights in a checkpoint of ours, of MAE, LUT's release, timm, DINO, iBOT or MoCo v3; code in it is refused.

    Args:
        weights: None: those by which the run was judged, of a classifier with --model_ema its moving average.

    Raises:
        UserError: unreadable, no state dict in it, or no momentum encoder where that is asked for.
    """
    return weights_in(load_checkpoint(path, flag), weights, f"{flag} {path}")


def weights_in(checkpoint: dict[str, Any], weights: Weights | None, where: str) -> WeightsFile:
    """`read_weights` of a file that is loaded already."""
    config = checkpoint.get("config")
    config = config if isinstance(config, dict) else None
    state = tensors_of(next((checkpoint[key] for key in STATES if key in checkpoint), checkpoint))
    layout = layout_of(state, "model" in checkpoint)
    if weights is None:
        averaged = layout == CLASSIFIER and config is not None and config.get("model_ema") is True
        weights = "momentum" if averaged else "student"
    if weights == "momentum":
        if not isinstance(checkpoint.get("model_ema"), dict):
            raise UserError(f"{where}: holds no momentum encoder (model_ema), ask for the student's weights")
        followed = tensors_of(checkpoint["model_ema"])
        state = {name.removeprefix("ema."): tensor for name, tensor in followed.items()}
        moving_average = "head.weight" in state or "fc_norm.weight" in state
        layout = "ViT, moving average" if moving_average else "LUT, momentum encoder"
    elif not state:
        raise UserError(f"{where}: holds no tensors, is it a checkpoint?")
    return WeightsFile(state, layout, config, weights)


def layout_of(state: dict[str, Tensor], wrapped: bool) -> str:
    """Which program writes such names; `wrapped`: under the key `model`, as MAE does."""
    if "head.weight" in state or "fc_norm.weight" in state:
        return CLASSIFIER
    if "decode_head.bottleneck.0.weight" in state:
        return "UperNet"
    if "momentum_encoder.cls_token" in state:
        return "MoCo v3"
    if "decoder.weight" in state:
        return "SimMIM, student"
    if "predictor.0.weight" in state:
        return "LUT, student"
    if "mask_token" in state:
        return "MAE with decoder"
    return "MAE encoder" if wrapped else "timm ViT"


def is_linear_probe(state: dict[str, Tensor]) -> bool:
    """Whether the head is a BatchNorm without parameters and a layer; a projector has its first layer at 0."""
    return "head.1.weight" in state and "head.0.weight" not in state


def tensors_of(state: object) -> dict[str, Tensor]:
    """The tensors in a state dict, without the prefixes of wrappers; empty where it is none."""
    if not isinstance(state, dict):
        return {}
    found = {}
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            for prefix in WRAPPERS:
                name = name.replace(prefix, "", 1) if name.startswith(prefix) else name
            found[name] = tensor
    return found


# --------------------------------------------------------------------------------------------------------
# Loading into a model
# --------------------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """`encoder`, `decoder` (MAE's), a `transfer_part` or one of `OTHER_PARTS`: loaded as a whole or not at all."""
    if name.startswith("decoder") or name == "mask_token":
        return "decoder"
    if added := transfer_part(name):
        return added
    part = name.split(".")[0]
    return part if part in OTHER_PARTS else "encoder"


def load_weights(
    model: nn.Module,
    path: Path,
    weights: Weights = "student",
    flag: str = "--init_from",
    whole: bool = False,
    file: WeightsFile | None = None,
) -> LoadReport:
    """Load a file into LUT, MomentumEncoder, Classifier, LinearProbe or UperNet.

    The encoder must match tensor by tensor, and the file's may have no layer that the model lacks. Decoder, heads and
    `fc_norm` are loaded where the file holds the whole of them, and else stay as they are. Positions of another grid,
    patches of another size and other channel counts are resampled.

    Args:
        whole: every tensor of the model must match, not those of the encoder alone.
        file: what `read_weights` made of the path, so that it is not read again.

    Raises:
        UserError: a tensor that must match is missing, has a shape that cannot be resampled, or has no counterpart.
    """
    state, layout, config, _ = file or read_weights(path, weights, flag)
    own = model.state_dict()
    state, resampled = fit(state, own, model.patch_embed.grid_size, config, sines=isinstance(model, Student))
    wrong = {
        name: "missing" if name not in state else f"{list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name not in state or state[name].shape != tensor.shape
    }
    refused = [f"{name} ({how})" for name, how in wrong.items() if whole or part_of(name) == "encoder"]
    if refused:
        raise UserError(
            f"{flag} {path}: {len(refused)} tensors of the {'model' if whole else 'encoder'} do not fit:"
            f" {shortened(refused)};"
            f" the file ({layout}) has besides: {shortened(sorted(set(state) - set(own))) or 'nothing'}"
            + "; fine-tuned on the mean of the tokens it has no last norm: take the pre-training's file"
            * ("norm.weight" in wrong and "fc_norm.weight" in state and "fc_norm.weight" not in own)
            + "; it has none of the layers that --rel_pos_bias and --layer_scale add: set them to none and 0"
            * any(transfer_part(name) for name in wrong if name not in state)
            + (f"; the run that wrote it had --model {config['model']}" if config and config.get("model") else "")
        )
    surplus = [name for name in state if name not in own and name.split(".")[0] in PASSED_THROUGH]
    if surplus:
        raise UserError(
            f"{flag} {path}: another encoder ({layout}), {len(surplus)} of its tensors have no place in the model's:"
            f" {shortened(surplus)}; take a model of that depth, if there is one with such layers"
            + "; fine-tuning and segmentation have --rel_pos_bias"
            * any(name.endswith(TABLE) for name in surplus)
        )
    incomplete = {part_of(name) for name in wrong}
    loaded = {name: state[name] for name in own if part_of(name) not in incomplete}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        layout=layout,
        loaded=tuple(loaded),
        resampled=tuple(f"{name}: {how}" for name, how in resampled.items() if name in loaded),
        missing=tuple(name for name in own if name not in loaded),
        mismatched=tuple(f"{name}: {how}" for name, how in wrong.items() if name in state),
        unexpected=tuple(name for name in state if name not in loaded),
        settings=config or {},
    )


def fit(
    state: dict[str, Tensor], own: dict[str, Tensor], grid_size: Grid, config: dict[str, Any] | None, sines: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Resample what depends on image size, patch size and channels; the rest as it is. Also: name -> how.

    Args:
        config: settings of the run that wrote the state, if known.
        sines: see `resample_positions`.
    """
    state, resampled = dict(state), {}
    kernel, wanted = state.get(PATCH_KERNEL), own[PATCH_KERNEL]
    patch = 1 if kernel is None else kernel.shape[-1]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[0] == wanted.shape[0]:
        changes = []
        if kernel.shape[1] != wanted.shape[1]:
            changes.append(f"{kernel.shape[1]} to {wanted.shape[1]} channels")
            kernel = adapt_channels(kernel, wanted.shape[1])
        if kernel.shape[2:] != wanted.shape[2:]:
            changes.append(f"patch {list(kernel.shape[2:])} to {list(wanted.shape[2:])}")
            kernel = resample_patch_embed(kernel, list(wanted.shape[2:]))
        if changes:
            resampled[PATCH_KERNEL] = " and ".join(changes)
        state[PATCH_KERNEL] = kernel
    for name in (POSITIONS, DECODER_POSITIONS):
        positions = state.get(name)
        if positions is None or name not in own or positions.ndim != 3 or positions.shape[2] != own[name].shape[2]:
            continue
        grid = grid_of(positions, patch, (config or {}).get("input_size"), positions.shape == own[name].shape)
        if grid is not None and grid != tuple(grid_size):
            state[name], how = resample_positions(positions, grid, grid_size, sines)
            if name == POSITIONS:
                state |= (tables := resampled_tables(state, grid, grid_size))
                resampled |= dict.fromkeys(tables, "interpolated")
            resampled[name] = f"{' x '.join(map(str, grid))} to {' x '.join(map(str, grid_size))} patches, {how}"
    return state, resampled


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A patch kernel [D, C, p, p] for another number of channels that gives grey images the same tokens.

    One channel sees the sum of the old ones; more channels repeat them in turn, with the same sum.
    """
    total = kernel.sum(dim=1, keepdim=True)
    if in_chans == 1:
        return total
    repeated = kernel[:, torch.arange(in_chans) % kernel.shape[1]]
    surplus = repeated.sum(dim=1, keepdim=True) - total  # what repeating adds, taken from all channels alike
    return repeated - surplus / in_chans


def is_square(number: int) -> bool:
    """Whether a grid of so many patches is square."""
    return number > 0 and round(number**0.5) ** 2 == number


def grid_of(positions: Tensor, patch: int, image_size: object, fits: bool) -> Grid | None:
    """Rows and columns of the patches that positions [1, 1 + L, D] are of, None where nothing tells.

    Sines tell it themselves. Of others the size of the run's images does, if known: a list of one number or height and
    width in pixels. Else L does where it is a square, unless the positions are as many as the model's (`fits`).
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
    """Whether positions [1, 1 + L, D] are MAE's fixed ones for the grid."""
    return torch.allclose(positions.float(), fixed_positions(positions.shape[2], grid), atol=1e-4)


def resample_positions(positions: Tensor, grid: Grid, wanted: Grid, sines: bool) -> tuple[Tensor, str]:
    """Positions [1, 1 + L', D] of a grid for another one [1, 1 + L, D], and how they were made.

    They are interpolated, as timm does: on a larger image the encoder then meets none beyond those that it was
    trained with. (timm's own would take two grids of as many patches for one.)

    Args:
        sines: of a model that is pre-trained, whose positions are MAE's fixed ones: compute them for the new grid.
    """
    if sines and are_sines(positions, grid):
        return fixed_positions(positions.shape[2], wanted), "sines computed for the new grid"
    of_patches = positions[:, 1:].float().unflatten(1, grid).permute(0, 3, 1, 2)
    resized = F.interpolate(of_patches, tuple(wanted), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1].float(), resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1), "interpolated"


def shortened(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
