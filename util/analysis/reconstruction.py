"""Reconstructions by any checkpoint that holds its decoder, as pictures and numbers.

Letters: n images, L patches, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models_architectures import ARCHITECTURES
from models_encoder import num_visible_patches, patch_statistics, patchify
from models_lut import LUT, Student
from models_simmim import SimMIM
from util.analysis.images import Images, wrap_name
from util.config.checks import check
from util.config.groups import DataConfig, config_from_dict
from util.config.pretrain import PretrainConfig
from util.data.views import Normalise
from util.figures.figure import Cell, picture_grid
from util.figures.pictures import RECONSTRUCTION_COLUMNS, reconstruction_cells
from util.runtime.errors import UserError
from util.weights.export import shape_of
from util.weights.interop import WeightsFile, load_weights, read_weights
from util.weights.vit import NamedViT, default_label, image_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Target = Literal["run", "normalised", "pixels"]

# --------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------


def open_autoencoder(
    path: Path, target: Target, size: Sequence[int], heads: tuple[int | None, int | None], device: torch.device
) -> NamedViT:
    """Open the student of a checkpoint with its decoder: ours (SimMIM too), MAE's full checkpoint, the release's.

    Args:
        target: what the decoder was trained to predict; `run`: as the settings in the file say.
        size: image size in pixels, one number or height and width; empty: the model's own. Positions are recomputed.
        heads: attention heads of encoder and decoder; None: from the run's settings, or the known model of that width.

    Raises:
        UserError: the file holds no decoder, or does not tell heads or target.
    """
    file = read_weights(path, flag="CHECKPOINT")
    decoder = next((name for name in ("decoder_embed.weight", "decoder.weight") if name in file.state), None)
    if "mask_token" not in file.state or decoder is None:
        raise UserError(
            f"CHECKPOINT {path}: holds no decoder ({file.layout}), so it cannot reconstruct;"
            " give a checkpoint of pre-training"
        )
    run = file.config or {}
    shape = shape_of(file, heads[0], (), f"CHECKPOINT {path}")
    if target == "run" and "norm_pix_loss" not in run:
        raise UserError("--target run: the file does not say what its decoder predicts, give normalised or pixels")
    arguments = dict(
        img_size=image_size(size, shape.img_size, shape.patch_size),
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        norm_pix_loss=run["norm_pix_loss"] if target == "run" else target == "normalised",
        mask_unit_patches=mask_unit_patches(run),
    )
    simmim = decoder == "decoder.weight"
    model = SimMIM(**arguments) if simmim else LUT(**arguments, **decoder_shape(file, heads[1]))
    unit = model.mask_unit_patches * model.patch_size
    if any(side % unit for side in model.shape["img_size"]):
        raise UserError(f"--input_size {' '.join(map(str, size))}: patches are hidden in squares of {unit} pixels")
    report = load_weights(model, path, flag="CHECKPOINT", strict=True, file=file)
    pixels = DataConfig(in_chans=shape.in_chans, mean=tuple(run.get("mean") or ()), std=tuple(run.get("std") or ()))
    normalise = Normalise(pixels.resolved_mean, pixels.resolved_std, device)
    model = model.requires_grad_(False).eval().to(device)
    label = default_label(str(path), "student")
    return NamedViT(label, model, model.shape["img_size"], shape.in_chans, normalise, f"{path}: {report}")


def mask_unit_patches(run: dict[str, Any]) -> int:
    """Return the side, in patches, of the squares that a run hides; 1 if its settings do not say."""
    if "mask_unit" not in run:
        return 1
    config = config_from_dict(PretrainConfig, run | {"recipe": ""})
    return config.mask_unit_pixels // config.resolved_patch_size


def decoder_shape(file: WeightsFile, num_heads: int | None) -> dict[str, int]:
    """Return width, depth and heads of the decoder in a file, as arguments of LUT."""
    width = len(file.state["decoder_embed.weight"])
    blocks = {int(name.split(".")[1]) for name in file.state if name.startswith("decoder_blocks.")}
    known = {shape["decoder_embed_dim"]: shape["decoder_num_heads"] for shape in ARCHITECTURES.values()}
    num_heads = num_heads or known.get(width)
    if num_heads is None:
        raise UserError(f"--decoder_num_heads: no known decoder is {width} wide, give its number of heads")
    check(width % num_heads == 0, "decoder_num_heads", num_heads, f"does not divide the decoder's width, {width}")
    return dict(decoder_embed_dim=width, decoder_depth=len(blocks), decoder_num_heads=num_heads)


# --------------------------------------------------------------------------------------------------------
# Reconstructing
# --------------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """One image with one mask."""

    image: int  # position among the shown images
    mask_ratio: float
    seed: int
    cells: np.ndarray  # uint8 [4, H, W, 3], see pictures.reconstruction_cells
    error: float  # L_MIM of this image (Eq. 1) on its hidden patches, in the decoder's target


def reconstructions(
    vit: NamedViT, images: Images, ratios: Sequence[float], seeds: Sequence[int]
) -> list[Reconstruction]:
    """Reconstruct every shown image with every mask.

    A mask depends only on its seed, the position of its image and the ratio.

    Raises:
        UserError: a ratio leaves no patch visible, or none hidden.
    """
    model = vit.model
    inputs, _ = images.shown(vit)
    L, p = model.num_patches, model.patch_size
    squares = L // model.mask_unit_patches**2
    reconstructed = []
    for ratio in ratios:
        visible = num_visible_patches(squares, ratio)
        if not 1 <= visible < squares:
            unit_name = "patches" if model.mask_unit_patches == 1 else "squares"
            raise UserError(f"--mask_ratio {ratio}: leaves {visible} of {squares} {unit_name} visible")
        for seed in seeds:
            noise = torch.rand(len(inputs), L, generator=torch.Generator().manual_seed(seed)).to(inputs.device)
            mask, prediction = reconstruct(model, inputs, noise, ratio)
            cells = reconstruction_cells(
                inputs, mask, prediction, p, vit.normalise.mean, vit.normalise.std, model.norm_pix_loss
            )
            errors = hidden_error(model, inputs, mask, prediction)
            reconstructed += [Reconstruction(i, ratio, seed, cells[i], errors[i]) for i in range(len(inputs))]
    return sorted(reconstructed, key=lambda each: each.image)  # a stable sort keeps the order of the masks


def reconstruct(model: Student, inputs: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Return mask [n, L] and predicted patches [n, L, P] at mask ratio `ratio`; the model keeps its own ratio."""
    original, model.mask_ratio = model.mask_ratio, ratio
    try:
        return model.reconstruct(inputs, noise)
    finally:
        model.mask_ratio = original


def hidden_error(model: Student, inputs: Tensor, mask: Tensor, prediction: Tensor) -> list[float]:
    """Return L_MIM (Eq. 1) of each of n images, averaged over its hidden patches."""
    target = patchify(inputs, model.patch_size)  # [n, L, P]
    if model.norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    errors = model.pixel_loss(prediction, target, reduction="none").mean(dim=-1)  # [n, L]
    return ((errors * mask).sum(dim=1) / mask.sum(dim=1)).tolist()


def reconstruction_figure(vit: NamedViT, images: Images, reconstructed: Sequence[Reconstruction], title: str) -> Figure:
    """Draw a row for each image and mask."""
    rows = [[Cell(cell) for cell in each.cells] for each in reconstructed]
    names = [f"{each.mask_ratio:.0%} hidden\nseed {each.seed}, error {each.error:.3f}" for each in reconstructed]
    for position, each in enumerate(reconstructed):
        if position == 0 or reconstructed[position - 1].image != each.image:
            names[position] = f"{wrap_name(images.title(each.image), 24)}\n{names[position]}"
    if vit.model.norm_pix_loss:
        caption = (
            "The model predicts patches without their mean and variance; the mean and variance of the true patch are"
            " put back. Brightness and contrast of each patch are therefore true, only its pattern is the model's."
        )
    else:
        caption = "The model predicts pixels."
    kind = "absolute" if isinstance(vit.model, SimMIM) else "squared"
    caption += (
        f" Error: mean {kind} error on hidden patches, as trained."
        " No loss trains the prediction of visible patches (third column)."
    )
    return picture_grid(rows, RECONSTRUCTION_COLUMNS, names, title, caption, cell_inches=1.6)


def reconstruction_numbers(images: Images, reconstructed: Sequence[Reconstruction]) -> list[dict[str, Any]]:
    """Return the errors as plain types, for JSON."""
    return [
        dict(
            image=images.source.name(images.order[each.image]),
            mask_ratio=each.mask_ratio,
            seed=each.seed,
            error=each.error,
        )
        for each in reconstructed
    ]
