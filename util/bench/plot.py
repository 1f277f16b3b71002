"""Plot how the cost of an update grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from util.figures.figure import number_log_axis

AXIS_TITLES = {"batch_size": "batch", "input_size": "image side (pixels)", "depth": "blocks of the encoder"}


def plot_sweep(flag: str, rows_of: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Plot images/s and ms per image of each variant over the values of a flag to a PNG, with quartiles and log axes.

    Args:
        rows_of: for each value of the flag, the rows of `util.bench.measure.measure`.
    """
    numeric = all(value.replace(".", "", 1).isdecimal() for value in rows_of)
    places = [float(value) for value in rows_of] if numeric else list(range(len(rows_of)))
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for rows in rows_of.values() for row in rows):
        speeds = [row["images_per_second"] for rows in rows_of.values() for row in rows if row["name"] == name]
        for axes, convert in zip(panels, (lambda x: x, lambda x: 1000 / x), strict=True):
            (line,) = axes.plot(places, [convert(speed.median) for speed in speeds], marker="o", label=name)
            low, high = ([convert(speed[i]) for speed in speeds] for i in (1, 2))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axes, title in zip(panels, ("images/s", "ms per image"), strict=True):
        if numeric:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(places, list(rows_of))
        number_log_axis(axes)
        axes.set_xlabel(AXIS_TITLES.get(flag, flag))
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path)
