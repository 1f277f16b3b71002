"""Pictures of segmentation masks: distinguishable colours, masks over images, ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from util.data.masks import IGNORED
from util.figures.figure import Cell, picture_grid
from util.figures.fonts import use_any_script

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.65  # of a mask over its image
MAX_IN_LEGEND = 40
LEGEND_COLUMNS = 6
SHADES = 8  # levels of red, green and blue; colours are chosen among SHADES**3
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
AVOIDED = ((0, 0, 0), (255, 255, 255), (128, 128, 128))  # black marks ignored pixels; white and grey are no colours


@lru_cache(maxsize=4)
def palette(number: int) -> np.ndarray:
    """Return colours uint8 [number, 3]; each is the one farthest from those before it and from AVOIDED."""
    levels = np.linspace(0, 255, SHADES).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    candidates = oklab(colours)
    nearest = np.min([np.linalg.norm(candidates - each, axis=1) for each in oklab(np.array(AVOIDED))], axis=0)
    chosen = []
    for _ in range(number):
        best = int(nearest.argmax())
        chosen.append(colours[best])
        nearest = np.minimum(nearest, np.linalg.norm(candidates - candidates[best], axis=1))
    return np.array(chosen, dtype=np.uint8)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB [..., 3] in 0..255 to Oklab (Ottosson 2020), where distances are close to perceived ones."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_OKLAB.T


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend a mask [H, W] of classes over the grey version of an image uint8 [H, W, 3]; ignored pixels are black."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    table = np.zeros((IGNORED + 1, 3))
    table[: len(colours)] = colours
    mixed = OPACITY * table[mask] + (1 - OPACITY) * grey
    mixed[mask == IGNORED] = 0
    return mixed.round().astype(np.uint8)


@dataclass(frozen=True)
class Predicted:
    """One image with its ground truth and its prediction."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    truth: np.ndarray  # uint8 [H, W]
    prediction: np.ndarray  # uint8 [H, W]

    @property
    def accuracy(self) -> float:
        """The share of correct pixels among those that are not ignored; nan if all are ignored."""
        counted = self.truth != IGNORED
        return float((self.truth == self.prediction)[counted].mean()) if counted.any() else float("nan")


def segmentation_figure(shown: Sequence[Predicted], names: Sequence[str], title: str) -> Figure:
    """Draw a row for each image (image, ground truth, prediction) and below them the colours of the classes that occur.

    Images keep their own shape, which may differ between rows.
    """
    from matplotlib.patches import Patch

    colours = palette(len(names))
    rows = [
        [
            Cell(each.image, title=each.name),
            Cell(overlay(each.image, each.truth, colours)),
            Cell(overlay(each.image, each.prediction, colours), title=f"{each.accuracy:.1%} of the pixels correct"),
        ]
        for each in shown
    ]
    pixels = np.concatenate([mask.ravel() for each in shown for mask in (each.truth, each.prediction)])
    count = np.bincount(pixels, minlength=IGNORED + 1)
    occurring = [number for number in np.argsort(-count[: len(names)], kind="stable") if count[number]]
    caption = "Masks lie over the grey image; black: ignored in the truth."
    if len(occurring) > MAX_IN_LEGEND:
        caption += f" The {MAX_IN_LEGEND} most frequent of {len(occurring)} classes are named."
    columns = ("image", "truth", "prediction")
    figure = picture_grid(rows, columns, [""] * len(rows), title, "", cell_inches=2.9)
    handles = [
        Patch(facecolor=colours[n] / 255, edgecolor="#444444", label=names[n]) for n in occurring[:MAX_IN_LEGEND]
    ]
    if count[IGNORED]:
        handles.append(Patch(facecolor="black", label="(ignored)"))
    style = dict(fontsize=8, title_fontsize=8, frameon=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, title=caption, **style)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(handles) // LEGEND_COLUMNS))
    return figure


def as_array(figure: Figure) -> np.ndarray:
    """Render a figure to pixels, uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    use_any_script(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
