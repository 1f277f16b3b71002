"""Plots of attention distances, of spectra, and of features in the plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from util.analysis.attention import DISTANCE_BINS, AttentionDistance
from util.figures.figure import DEPTH, MARKERS, PALETTE, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED_CLASSES = 20  # the names of more classes hide the points


def distance_figure(
    labels: Sequence[str], distances: Sequence[AttentionDistance], blocks: Sequence[int], uniform: float, caption: str
) -> Figure:
    """Draw Figure 4a: a violin for each model and layer over all images and heads, a dot for each head's mean.

    Args:
        blocks: numbers of the blocks on the x axis; a model with fewer layers stands at the last ones.
        uniform: the distance of uniform attention, drawn as a dashed line.
    """
    groups = len(blocks)
    width = max(5.0, 1.0 + groups * (0.35 + 0.5 * len(distances)))
    figure = new_figure(width, 4.2, "Attention distance per layer", caption)
    axes = figure.subplots()
    step = 0.8 / len(distances)
    bins = (np.arange(DISTANCE_BINS) + 0.5) * (math.sqrt(2) / DISTANCE_BINS)
    for number, (label, distance) in enumerate(zip(labels, distances, strict=True)):
        colour, mean, num_layers = PALETTE[number % len(PALETTE)], distance.mean, len(distance.layers)
        positions = np.arange(num_layers) + groups - num_layers + (number - (len(distances) - 1) / 2) * step
        violins = [violin(bins, histogram.sum(axis=0)) for histogram in distance.histogram]
        bodies = axes.violin(violins, positions, widths=0.9 * step, showextrema=False)["bodies"]
        for body in bodies:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.35)
        offsets = np.linspace(-0.2, 0.2, mean.shape[1]) * step if mean.shape[1] > 1 else np.zeros(1)
        axes.plot((positions[:, None] + offsets).ravel(), mean.ravel(), ".", color=colour, markersize=5)
        axes.plot(positions, mean.mean(axis=1), "_", color="black", markersize=0.42 * 72 * step, markeredgewidth=1.5)
        axes.plot([], [], "s", color=colour, markersize=8, label=label)
    axes.set_xticks(range(groups), [str(block) for block in blocks])
    axes.set_xlabel("block, counted from 0" if blocks[0] >= 0 else "block, counted from the end")
    axes.set_ylabel("attention distance, image side = 1")
    axes.axhline(uniform, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate("uniform", (1, uniform), (2, 0), ("axes fraction", "data"), "offset points", fontsize=8, va="center")
    finish(axes)
    axes.legend(fontsize=8, frameon=False, ncols=min(3, len(distances)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def violin(bins: np.ndarray, counts: np.ndarray) -> dict[str, object]:
    """Return what Axes.violin takes: a histogram smoothed over three bins, without empty bins at its ends."""
    density = np.convolve(counts / counts.sum(), (0.25, 0.5, 0.25), mode="same")
    occupied = np.flatnonzero(density)
    first, last = occupied[0], occupied[-1]
    mean = float((bins * counts).sum() / counts.sum())
    return dict(
        coords=bins[first : last + 1], vals=density[first : last + 1],
        mean=mean, median=mean, min=bins[first], max=bins[last],
    )  # fmt: skip


def spectrum_figure(labels: Sequence[str], spectra: Sequence[np.ndarray], caption: str) -> Figure:
    """Draw Figure 4b: log singular values of each model's layers, and the difference of two models of one shape."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

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
    """Return log10 of the values; zeros are raised to 1e-16 of the layer's largest, the precision of float64."""
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
    """Draw the points [N, 2] of each model's features, coloured by `classes` [N] (None: one colour)."""
    from matplotlib import colormaps

    figure = new_figure(4.2 * len(maps) + 0.3, 4.9, "Features of images in the plane", caption)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, label, points, (x_name, y_name) in zip(axes, labels, maps, axis_names, strict=True):
        groups = [None] if classes is None else np.unique(classes).tolist()
        named: list[tuple[str, str, np.ndarray]] = []
        for number, group in enumerate(groups):
            chosen = points if group is None else points[classes == group]
            few = len(groups) <= MAX_NAMED_CLASSES
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
    """Write the name of each class amid its points, which is easier to read than a legend of colours.

    Args:
        named: name, colour and centre [2] of each class.
        extent: width and height [2] that the points cover.
    """
    shares = np.array([centre for _, _, centre in named]) / np.maximum(extent, 1e-12)
    positions = spread_boxes(shares, [0.02 + 0.016 * len(name) for name, _, _ in named], 0.042)  # 7 pt on 4 inches
    for (name, colour, _), (x, y) in zip(named, positions * extent, strict=True):
        box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor=colour, alpha=0.9)
        axis.text(x, y, name, fontsize=7, ha="center", va="center", bbox=box)


def spread_boxes(centres: np.ndarray, widths: Sequence[float], height: float) -> np.ndarray:
    """Move boxes with centres [n, 2] up and down until none overlaps another, for 200 rounds at most."""
    centres = centres.copy()
    for _ in range(200):
        overlaps = False
        for i, j in itertools.combinations(range(len(centres)), 2):
            across, up = centres[i] - centres[j]
            if abs(across) < (widths[i] + widths[j]) / 2 and abs(up) < height - 1e-9:
                shift = math.copysign((height - abs(up)) / 2, up)
                centres[i, 1] += shift
                centres[j, 1] -= shift
                overlaps = True
        if not overlaps:
            break
    return centres
