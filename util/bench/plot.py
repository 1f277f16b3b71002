"""A picture of how the cost of an update grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from util.figures.figure import number_log_axis

AXIS_TITLES = {"batch_size": "batch", "input_size": "image side (pixels)", "depth": "blocks of the encoder"}


def plot_sweep(flag: str, found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Images/s and ms per image of each variant over the values of a flag, logarithmic, with quartiles, as PNG.

    Args:
        found: value of the flag -> rows of `util.bench.step.measure`.
    """
    from matplotlib.figure import Figure

    numeric = all(value.replace(".", "", 1).isdecimal() for value in found)
    places = [float(value) for value in found] if numeric else list(range(len(found)))
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for rows in found.values() for row in rows):
        rows = [next(row for row in rows if row["name"] == name) for rows in found.values()]
        speeds = [row["images_per_second"] for row in rows]
        for axes, of in zip(panels, (lambda x: x, lambda x: 1000 / x), strict=True):
            (line,) = axes.plot(places, [of(speed.median) for speed in speeds], marker="o", label=name)
            low, high = ([of(speed[i]) for speed in speeds] for i in (1, 2))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axes, title in zip(panels, ("images/s", "ms per image"), strict=True):
        if numeric:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(places, list(found))
        number_log_axis(axes)
        axes.set_xlabel(AXIS_TITLES.get(flag, flag))
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path)
