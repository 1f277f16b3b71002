"""Masks as pictures: colours that can be told apart, masks over images, and truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from util.data.masks import IGNORED
from util.figures.figure import Cell, picture_grid
from util.figures.fonts import use_any_script

OPACITY = 0.65  # of a mask over its image
MOST_IN_LEGEND = 40
LEGEND_COLUMNS = 6
SHADES = 8  # of red, green and blue among which the colours are chosen
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
AVOIDED = ((0, 0, 0), (255, 255, 255), (128, 128, 128))  # ignored pixels, paper, and what is no colour


@lru_cache(maxsize=4)
def palette(number: int) -> np.ndarray:
    """Colours uint8 [number, 3]: each as unlike those before it as a choice of 512 allows, black for ignored apart."""
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
    """sRGB [..., 3] in 0..255 to Oklab (Ottosson 2020), in which distances are those that an eye sees, in blue too."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_OKLAB.T


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A mask [H, W] of classes over the grey of an image uint8 [H, W, 3], where it shows; ignored pixels black."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    table = np.zeros((IGNORED + 1, 3))
    table[: len(colours)] = colours
    mixed = OPACITY * table[mask] + (1 - OPACITY) * grey
    mixed[mask == IGNORED] = 0
    return mixed.round().astype(np.uint8)


@dataclass(frozen=True)
class Predicted:
    """One image, and what was said of it."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    truth: np.ndarray  # uint8 [H, W]
    said: np.ndarray  # uint8 [H, W]

    @property
    def accuracy(self) -> float:
        """Share of its pixels, without ignored ones, that were said right; nan where all are ignored."""
        counted = self.truth != IGNORED
        return float((self.truth == self.said)[counted].mean()) if counted.any() else float("nan")


def segmentation_figure(shown: Sequence[Predicted], names: Sequence[str], title: str) -> Figure:
    """A row for each image: itself, truth, prediction; below them the colours of the classes that occur.

    Images of other sizes than the first are shown in their own shape.
    """
    colours = palette(len(names))
    rows = [
        [
            Cell(each.image, title=each.name),
            Cell(overlay(each.image, each.truth, colours)),
            Cell(overlay(each.image, each.said, colours), title=f"{each.accuracy:.1%} of the pixels right"),
        ]
        for each in shown
    ]
    pixels = np.concatenate([mask.ravel() for each in shown for mask in (each.truth, each.said)])
    count = np.bincount(pixels, minlength=IGNORED + 1)
    occurring = [number for number in np.argsort(-count[: len(names)], kind="stable") if count[number]]
    caption = "Masks lie over the grey image; black: ignored in the truth."
    if len(occurring) > MOST_IN_LEGEND:
        caption += f" The {MOST_IN_LEGEND} most frequent of {len(occurring)} classes are named."
    columns = ("image", "truth", "prediction")
    figure = picture_grid(rows, columns, [""] * len(rows), title, "", cell_inches=2.9)
    handles = [
        Patch(facecolor=colours[n] / 255, edgecolor="#444444", label=names[n]) for n in occurring[:MOST_IN_LEGEND]
    ]
    if count[IGNORED]:
        handles.append(Patch(facecolor="black", label="(ignored)"))
    style = dict(fontsize=8, title_fontsize=8, frameon=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, title=caption, **style)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(handles) // LEGEND_COLUMNS))
    return figure


def as_array(figure: Figure) -> np.ndarray:
    """The pixels of a figure, uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    use_any_script(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
