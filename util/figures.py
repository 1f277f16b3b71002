"""Drawings of what util/analysis.py computes, with matplotlib and without its global state.

Colours are told apart by colour-blind readers (Okabe and Ito's), maps of intensity are perceptually even.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.analysis import DISTANCE_BINS, AttentionDistance

BLUE, ORANGE = "#0072B2", "#D55E00"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without the yellow: lost on white
MARKERS = "os^DvPX*"
HEAT = "inferno"
HEAT_ALPHA, HEAT_GROUND = 0.75, 0.7  # over an image whose white is so bright: it shows, and changes no colour by much
DEPTH = "viridis"  # early layers dark, late ones bright
DPI = 150
MOST_NAMED_CLASSES = 20


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """A white figure of `width` x `height` inches with a title above and a caption below, wrapped to the width."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(textwrap.fill(title, round(width * 11)), fontsize=11, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, round(width * 17)), fontsize=7.5, color="#444444")
    return figure


# --------------------------------------------------------------------------------------------------------
# Grids of images
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """An image, and what is drawn over it."""

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
    """Cells in rows and columns; None leaves a place empty. `heat_label`: what the scale of the heat means."""
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
    """The image; heat over its faint grey version, so that colours are those of the scale, or nearly."""
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
    """uint8 [H, W, 3]: heat [rows, columns], relative to its maximum, over the grey version of an image [H, W, 3]."""
    H, W = image.shape[:2]
    rows, columns = (np.arange(side) * parts // side for side, parts in zip((H, W), heat.shape, strict=True))
    shares = heat[np.ix_(rows, columns)] / max(float(heat.max()), 1e-12)  # [H, W]
    grey = HEAT_GROUND * image.mean(axis=2, keepdims=True) / (255 if image.dtype == np.uint8 else 1)
    blended = HEAT_ALPHA * colormaps[HEAT](shares)[..., :3] + (1 - HEAT_ALPHA) * grey
    return (blended * 255).round().astype(np.uint8)


# --------------------------------------------------------------------------------------------------------
# Plots
# --------------------------------------------------------------------------------------------------------


def distance_figure(
    labels: Sequence[str], found: Sequence[AttentionDistance], blocks: Sequence[int], even: float, caption: str
) -> Figure:
    """Figure 4a: a violin for each model and layer over all images and heads, a dot for each head's mean.

    Args:
        blocks: names of the groups; a model with fewer layers has those at the end.
        even: the distance of attention that is the same to all patches.
    """
    groups = len(blocks)
    width = max(5.0, 1.0 + groups * (0.35 + 0.5 * len(found)))
    figure = new_figure(width, 4.2, "Attention distance per layer", caption)
    axes = figure.subplots()
    step = 0.8 / len(found)
    bins = (np.arange(DISTANCE_BINS) + 0.5) * (math.sqrt(2) / DISTANCE_BINS)
    for number, (label, each) in enumerate(zip(labels, found, strict=True)):
        colour = PALETTE[number % len(PALETTE)]
        places = np.arange(len(each.layers)) + groups - len(each.layers) + (number - (len(found) - 1) / 2) * step
        violins = [violin(bins, histogram.sum(axis=0)) for histogram in each.histogram]
        bodies = axes.violin(violins, places, widths=0.9 * step, showextrema=False)["bodies"]
        for body in bodies:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.35)
        sway = np.linspace(-0.2, 0.2, each.mean.shape[1]) * step if each.mean.shape[1] > 1 else np.zeros(1)
        axes.plot((places[:, None] + sway).ravel(), each.mean.ravel(), ".", color=colour, markersize=5)
        axes.plot(places, each.mean.mean(axis=1), "_", color="black", markersize=0.42 * 72 * step, markeredgewidth=1.5)
        axes.plot([], [], "s", color=colour, markersize=8, label=label)
    axes.set_xticks(range(groups), [str(block) for block in blocks])
    axes.set_xlabel("block, counted from 0" if blocks[0] >= 0 else "block, counted from the end")
    axes.set_ylabel("attention distance, image side = 1")
    axes.axhline(even, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate("even", (1, even), (2, 0), ("axes fraction", "data"), "offset points", fontsize=8, va="center")
    finish(axes)
    axes.legend(fontsize=8, frameon=False, ncols=min(3, len(found)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def violin(bins: np.ndarray, counts: np.ndarray) -> dict[str, object]:
    """What Axes.violin takes, from a histogram smoothed over three bins and cut to where it is not empty."""
    density = np.convolve(counts / counts.sum(), (0.25, 0.5, 0.25), mode="same")
    some = np.flatnonzero(density)
    inside = slice(some[0], some[-1] + 1)
    mean = float((bins * counts).sum() / counts.sum())
    return dict(
        coords=bins[inside], vals=density[inside], mean=mean, median=mean, min=bins[some[0]], max=bins[some[-1]]
    )


def spectrum_figure(labels: Sequence[str], spectra: Sequence[np.ndarray], caption: str) -> Figure:
    """Figure 4b: log singular values of each model's layers, and for two models of one shape their difference."""
    logs = [log_spectrum(each) for each in spectra]
    panels = list(zip(labels, logs, strict=True))
    if len(logs) == 2 and logs[0].shape == logs[1].shape:
        panels.append((f"{labels[1]} − {labels[0]}", logs[1] - logs[0]))
    figure = new_figure(3.3 * len(panels) + 0.8, 3.9, "Spectrum of the features' covariance", caption)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    depth = max(len(each) for each in logs)
    layers = BoundaryNorm(np.arange(depth + 1) - 0.5, 256)
    low, high = min(each.min() for each in logs), max(each.max() for each in logs)
    margin = 0.05 * (high - low)
    for number, (axis, (title, lines)) in enumerate(zip(axes, panels, strict=True)):
        for layer, line in enumerate(lines):
            axis.plot(np.arange(1, len(line) + 1), line, color=colormaps[DEPTH](layers(layer)), linewidth=1.2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("rank of the singular value")
        if number < len(logs):
            axis.set_ylim(low - margin, high + margin)
            axis.set_ylabel("log10 of the singular value")
        else:
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_ylabel("difference of the log10")
        finish(axis)
    bar = figure.colorbar(ScalarMappable(layers, DEPTH), ax=axes, ticks=MaxNLocator(integer=True), pad=0.01)
    bar.set_label("block, counted from 0", fontsize=9)
    bar.ax.tick_params(labelsize=8, which="both", length=0)
    return figure


def log_spectrum(singular_values: np.ndarray) -> np.ndarray:
    """log10, with zeros raised to 1e-16 of each layer's largest, where float64 ends."""
    floor = 1e-16 * singular_values.max(axis=-1, keepdims=True)
    return np.log10(np.maximum(singular_values, np.maximum(floor, np.finfo(float).tiny)))


def map_figure(
    labels: Sequence[str],
    maps: Sequence[np.ndarray],
    classes: np.ndarray | None,
    class_names: Sequence[str],
    axis_names: Sequence[tuple[str, str]],
    caption: str,
) -> Figure:
    """Points [N, 2] of each model's features, coloured by `classes` [N] (None: all alike)."""
    figure = new_figure(4.2 * len(maps) + 0.3, 4.9, "Features of images in the plane", caption)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, label, points, (x_name, y_name) in zip(axes, labels, maps, axis_names, strict=True):
        groups = [None] if classes is None else np.unique(classes).tolist()
        named: list[tuple[str, str, np.ndarray]] = []
        for number, group in enumerate(groups):
            chosen = points if group is None else points[classes == group]
            few = len(groups) <= MOST_NAMED_CLASSES
            colour = PALETTE[number % len(PALETTE)] if few else colormaps["turbo"](number / len(groups))
            marker = MARKERS[number // len(PALETTE) % len(MARKERS)]
            axis.scatter(*chosen.T, s=9, color=colour, marker=marker, alpha=0.6, linewidths=0)
            if few and group is not None:
                named.append((class_names[group], colour, np.median(chosen, axis=0)))
        if named:
            name_classes(axis, named, np.ptp(points, axis=0))
        axis.set_title(label, fontsize=9)
        axis.set_xlabel(x_name, fontsize=9)
        axis.set_ylabel(y_name, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def name_classes(axis: Axes, named: Sequence[tuple[str, str, np.ndarray]], extent: np.ndarray) -> None:
    """(Name, colour, place) of each class amid its points, so that nobody has to match colours with a legend.

    Args:
        extent: width and height [2] that the points cover.
    """
    shares = np.array([place for _, _, place in named]) / np.maximum(extent, 1e-12)
    places = apart(shares, [0.02 + 0.016 * len(name) for name, _, _ in named], 0.042)  # of 7 points on 4 inches
    for (name, colour, _), (x, y) in zip(named, places * extent, strict=True):
        box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor=colour, alpha=0.9)
        axis.text(x, y, name, fontsize=7, ha="center", va="center", bbox=box)


def apart(centres: np.ndarray, widths: Sequence[float], height: float) -> np.ndarray:
    """Centres [n, 2] of boxes that lie on each other, moved up and down until none does (or for 200 rounds)."""
    centres = centres.copy()
    for _ in range(200):
        still = True
        for i, j in itertools.combinations(range(len(centres)), 2):
            across, up = centres[i] - centres[j]
            if abs(across) < (widths[i] + widths[j]) / 2 and abs(up) < height - 1e-9:
                shift = math.copysign((height - abs(up)) / 2, up)
                centres[i, 1] += shift
                centres[j, 1] -= shift
                still = False
        if still:
            break
    return centres


def finish(axes: Axes) -> None:
    """Light grid behind, no box."""
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
