"""Pictures of reconstructions and of a confusion matrix. Letters: B samples, C channels, L patches of side p."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models_encoder import patch_statistics, patchify, unpatchify
from util.figures.fonts import use_any_script
from util.runtime.files import write_durably

GAP = 2  # white pixels between cells
MIN_CELL_SIDE = 128  # smaller images are enlarged until their longer side is about this
TITLE_PIXELS = 13  # height of a line above the columns
HIDDEN_GREY = 0.5
RECONSTRUCTION_COLUMNS = ("image", "masked", "reconstruction", "reconstruction,\nvisible pasted in")
MAX_NAMED_CLASSES = 40  # the names of more classes are too small to read


def as_grid(cells: np.ndarray, column_titles: Sequence[str] = ()) -> np.ndarray:
    """Join pictures uint8 [rows, columns, H, W, 3] into one [height, width, 3] with white gaps.

    Small pictures are enlarged by an integer factor, so that pixels stay sharp. Titles stand above the columns.
    """
    factor = max(1, MIN_CELL_SIDE // max(cells.shape[2:4]))
    cells = cells.repeat(factor, axis=2).repeat(factor, axis=3)
    cells = np.pad(cells, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = cells.shape
    grid = cells.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-GAP, :-GAP]
    if not column_titles:
        return grid
    lines = max(title.count("\n") + 1 for title in column_titles)
    head = Image.new("RGB", (grid.shape[1], lines * TITLE_PIXELS + 2 * GAP), "white")
    draw = ImageDraw.Draw(head)
    for column, title in enumerate(column_titles):
        for number, line in enumerate(title.split("\n")):
            draw.text((column * width + GAP, GAP + number * TITLE_PIXELS), line, fill="black")
    return np.concatenate([np.asarray(head), grid])


@torch.no_grad()
def reconstruction_cells(
    images: Tensor,
    mask: Tensor,
    prediction: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix_loss: bool,
) -> np.ndarray:
    """Return four pictures of each sample: image | masked | reconstruction | the same with visible patches pasted in.

    With `norm_pix_loss` the model predicts patches normalised by their own mean and variance. To draw them, the mean
    and variance (unbiased, plus 1e-6) of the true patch undo the normalisation. Brightness and contrast of each patch
    are therefore the true ones, and only the pattern is the model's. The third picture shows the prediction for
    visible patches too, although no loss trains it.

    Args:
        images: [B, C, H, W], normalised with `mean` and `std`. Of one or two channels the first is drawn in grey,
            of three or more the first three in colour.
        mask: [B, L], 1 or True = hidden, L = (H/p)(W/p), row by row.
        prediction: [B, L, p·p·C], a patch in the order row, column, channel.
        mean, std: one number per channel.

    Returns:
        uint8 [B, 4, H, W, 3].
    """
    images, prediction = images.detach().float().cpu(), prediction.detach().float().cpu()
    grid_size = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    target = patchify(images, patch_size)  # [B, L, p·p·C]
    if norm_pix_loss:
        patch_mean, patch_std = patch_statistics(target)
        prediction = prediction * patch_std + patch_mean
    hidden = unpatchify(mask.bool().cpu()[:, :, None].expand_as(target), patch_size, grid_size)  # [B, C, H, W]

    original = colours(images, mean, std)
    reconstruction = colours(unpatchify(prediction, patch_size, grid_size), mean, std)
    masked = original.masked_fill(hidden, HIDDEN_GREY)
    pasted = torch.where(hidden, reconstruction, original)
    return drawable(torch.stack([original, masked, reconstruction, pasted], dim=1))


def colours(normalised: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of images [..., C, H, W]; pixels of a photograph then lie in [0, 1]."""
    return normalised * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]


def drawable(images: Tensor) -> np.ndarray:
    """Turn pixels [..., C, H, W] in [0, 1] into uint8 [..., H, W, 3]: the first channel in grey, or the first three."""
    channels = images.shape[-3]
    shown = images[..., :3, :, :] if channels >= 3 else images[..., :1, :, :].expand(*images.shape[:-3], 3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def save_png(array: np.ndarray, path: str | Path) -> None:
    """Write a picture uint8 [height, width, 3] as PNG and make its folder; a failed write leaves an older file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda file: Image.fromarray(array).save(file, format="PNG"))


def confusion_picture(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix [K, K] (row: true class, column: predicted) as shares of each row, into a PNG."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = len(names) <= MAX_NAMED_CLASSES
    side = min(4 + 0.28 * len(names), 14)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if named:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 15:
        for (row, column), share in np.ndenumerate(shares):
            if confusion[row, column]:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, confusion[row, column], ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, shrink=0.7, label="share of the true class")
    use_any_script(figure)
    figure.savefig(path)
