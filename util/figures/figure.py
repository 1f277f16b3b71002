"""Figures: a title, cells of images with heat maps over them, and axes that all look alike.

Matplotlib is used without its global state, and imported by the functions that draw: a program that draws nothing
starts faster. Colour-blind readers can tell the colours apart (Okabe and Ito's); maps of intensity are perceptually
uniform.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.figures.fonts import use_any_script
from util.runtime.files import write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"
PALETTE = (
    BLUE,
    ORANGE,
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # their yellow is too pale
MARKERS = "os^DvPX*"
HEAT = "inferno"
HEAT_ALPHA = 0.75  # opacity of heat over the grey image
HEAT_GROUND = 0.7  # brightness of white in the grey image, low enough to leave the colours of the heat readable
DEPTH = "viridis"  # early layers dark, late ones bright
DPI = 150


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and make its folder; a write that fails leaves an older file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    use_any_script(figure)
    write_durably(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """Return a white figure of `width` x `height` inches; title and caption are wrapped to the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(textwrap.fill(title, round(width * 11)), fontsize=11, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, round(width * 17)), fontsize=7.5, color="#444444")
    return figure


@dataclass(frozen=True)
class Cell:
    """An image and what is drawn over it."""

    image: np.ndarray  # uint8 [H, W, 3], or float in [0, 1]
    heat: np.ndarray | None = None  # [rows, columns], 0 or more; shown relative to its maximum
    mark: tuple[float, float] | None = None  # row and column of a query, as shares of the height and width
    title: str = ""
    frame: str = ""  # colour


def picture_grid(
    rows: Sequence[Sequence[Cell | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    title: str,
    caption: str,
    heat_label: str = "",
    cell_inches: float = 1.3,
) -> Figure:
    """Draw cells in rows and columns.

    Args:
        rows: None leaves a place empty.
        column_titles: heads above the columns; none, or fewer than columns: the others have no head.
        heat_label: what the colour scale means; empty: no scale is drawn.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    first = next(cell for row in rows for cell in row if cell is not None)
    tall = first.image.shape[0] / first.image.shape[1]
    titled = any(cell is not None and cell.title for row in rows for cell in row)
    columns = max(map(len, rows))
    width = max(3.6, columns * cell_inches + 0.4 + 0.6 * bool(heat_label))
    height = len(rows) * (cell_inches * tall + (0.24 if titled else 0.06)) + 1.0
    figure = new_figure(width, height, title, caption)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, cells, row_title in zip(axes, rows, row_titles, strict=True):
        row[0].set_ylabel(row_title, fontsize=8)
        for axis, cell in zip(row, cells, strict=False):
            if cell is not None:
                draw_cell(axis, cell)
    for axis, column_title in zip(axes[0], column_titles, strict=False):
        own = axis.get_title()
        axis.set_title(f"{column_title}\n{own}" if own else column_title, fontsize=8)
    if heat_label:
        scale = ScalarMappable(Normalize(0, 1), HEAT)
        bar = figure.colorbar(scale, ax=axes, shrink=min(1.0, 2 / height), aspect=18, pad=0.01, ticks=[0, 0.5, 1])
        bar.set_label(heat_label, fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
    return figure


def draw_cell(axis: Axes, cell: Cell) -> None:
    """Draw the image or, if it has heat, the heat over its grey version, so that colours match the scale."""
    H, W = cell.image.shape[:2]
    if cell.heat is None:
        axis.imshow(cell.image, interpolation="nearest")
    else:
        axis.imshow(heat_over(cell.image, cell.heat), interpolation="nearest")
    if cell.mark is not None:
        y, x = cell.mark[0] * H - 0.5, cell.mark[1] * W - 0.5
        axis.plot(x, y, "o", markersize=7, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2.6)
        axis.plot(x, y, "o", markersize=7, markerfacecolor="none", markeredgecolor="#00FFFF", markeredgewidth=1.3)
    if cell.title:
        axis.set_title(cell.title, fontsize=7)
    if cell.frame:
        axis.spines[:].set(visible=True, color=cell.frame, linewidth=2.5)


def heat_over(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return uint8 [H, W, 3]: heat [rows, columns] relative to its maximum, over the grey version of [H, W, 3]."""
    from matplotlib import colormaps

    H, W = image.shape[:2]
    rows, columns = (np.arange(side) * parts // side for side, parts in zip((H, W), heat.shape, strict=True))
    shares = heat[np.ix_(rows, columns)] / max(float(heat.max()), 1e-12)  # [H, W]
    grey = HEAT_GROUND * image.mean(axis=2, keepdims=True) / (255 if image.dtype == np.uint8 else 1)
    blended = HEAT_ALPHA * colormaps[HEAT](shares)[..., :3] + (1 - HEAT_ALPHA) * grey
    return (blended * 255).round().astype(np.uint8)


def finish(axes: Axes) -> None:
    """Give a plot its common look: a light grid behind it, no box, small labels."""
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)


def number_log_axis(axes: Axes) -> None:
    """Number a logarithmic y axis that spans less than a factor of ten too; matplotlib marks only powers of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axes.get_ylim()
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
