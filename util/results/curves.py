"""Curves of runs as a page draws them: what each number is called, thinned to so many points, as plain types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.results.run_folder import Curve, RunFolder

MOST_POINTS = 1000  # of a curve: more than a screen has pixels for it
MOST_IN_ALL = 30_000  # of a page
FEWEST_POINTS = 20
DIGITS = 6


@dataclass(frozen=True)
class Metric:
    """A number of the log."""

    title: str
    group: str  # of the panels
    unit: str = ""
    better: str = ""  # lower or higher; empty: neither is
    scale: float = 1.0  # factor from the log to the unit


TRAINING, LEARNED, SPEED = "Training", "What it has learned", "Throughput and data wait"
GROUPS = (TRAINING, LEARNED, SPEED)
METRICS = {
    "loss": Metric("Loss", TRAINING, better="lower"),
    "mim": Metric("L_MIM, reconstruction (Eq. 1)", TRAINING, better="lower"),
    "bc": Metric("L_BC, visible tokens (Eq. 2)", TRAINING, better="lower"),
    "main": Metric("Decode head's loss", TRAINING, better="lower"),
    "auxiliary": Metric("Auxiliary head's loss", TRAINING, better="lower"),
    "lr": Metric("Learning rate", TRAINING),
    "grad_norm": Metric("Norm of the gradient", TRAINING),
    "skipped_updates": Metric("Updates left out", TRAINING),
    "bad_images": Metric("Bad images replaced", TRAINING),
    "knn": Metric("kNN accuracy", LEARNED, "%", "higher"),
    "linear": Metric("linear-probe accuracy", LEARNED, "%", "higher"),
    "rankme": Metric("RankMe, effective rank of the features", LEARNED),
    "top1": Metric("Top-1 accuracy", LEARNED, "%", "higher"),
    "top5": Metric("Top-5 accuracy", LEARNED, "%", "higher"),
    "val_loss": Metric("Validation loss", LEARNED, better="lower"),
    "miou": Metric("Mean IoU", LEARNED, "%", "higher"),
    "aacc": Metric("Accuracy of all pixels", LEARNED, "%", "higher"),
    "macc": Metric("Mean accuracy of the classes", LEARNED, "%", "higher"),
    "images_per_second": Metric("Images per second", SPEED, "images/s"),
    "data_wait": Metric("Share of the time spent waiting for data", SPEED, "%", scale=100),
    "memory_bytes": Metric("Peak memory", SPEED, "GiB", scale=2**-30),
}


def metric_of(name: str, runs: Sequence[RunFolder]) -> Metric:
    """A known number, or one of some other stage under its own name: of the training if it comes with the loss."""
    if name in METRICS:
        return METRICS[name]
    with_loss = any("loss" in line for run in runs for line in run.lines if name in line)
    return Metric(name.replace("_", " "), TRAINING if with_loss else LEARNED)


def metrics_of(runs: Sequence[RunFolder]) -> dict[str, Metric]:
    """Of all numbers that any run has, the known ones in their order first."""
    there = {name for run in runs for name in run.curves}
    names = [*(name for name in METRICS if name in there), *sorted(there - METRICS.keys())]
    return {name: metric_of(name, runs) for name in names}


# --------------------------------------------------------------------------------------------------------
# Thinning
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thinned:
    """A curve of few points; where there were too many, each is the mean of its neighbours, with their extremes."""

    steps: np.ndarray  # [m]
    values: np.ndarray  # [m]
    low: np.ndarray | None = None  # [m], None: nothing was left out
    high: np.ndarray | None = None


def thin(curve: Curve, most: int) -> Thinned:
    """At most `most` points, each of as many neighbours as any other, and so no spike is lost.

    What is not finite is left out of mean and extremes; where nothing else is, the point is nan.
    """
    if len(curve.steps) <= most:
        return Thinned(curve.steps, curve.values)
    begins = np.linspace(0, len(curve.steps), most, endpoint=False).astype(int)
    sizes = np.diff(np.append(begins, len(curve.steps)))
    finite = np.isfinite(curve.values)
    count = np.add.reduceat(finite.astype(int), begins)
    none = np.where(count == 0, np.nan, 0.0)
    total = np.add.reduceat(np.where(finite, curve.values, 0.0), begins)
    return Thinned(
        steps=np.add.reduceat(curve.steps, begins) / sizes,
        values=total / np.maximum(count, 1) + none,
        low=np.minimum.reduceat(np.where(finite, curve.values, np.inf), begins) + none,
        high=np.maximum.reduceat(np.where(finite, curve.values, -np.inf), begins) + none,
    )


def points_per_curve(runs: Sequence[RunFolder]) -> int:
    """So many that the page stays small whatever the number of runs."""
    curves = sum(len(run.curves) for run in runs)
    return max(FEWEST_POINTS, min(MOST_POINTS, MOST_IN_ALL // max(curves, 1)))


# --------------------------------------------------------------------------------------------------------
# For the page
# --------------------------------------------------------------------------------------------------------


def curves_of(run: RunFolder, metrics: dict[str, Metric], most: int) -> dict[str, Any]:
    """A run for pages/report.js, which turns updates into epochs or hours."""
    curves = {}
    for name, curve in run.curves.items():
        thinned = thin(curve, most)
        scale = metrics[name].scale
        parts = {"y": thinned.values, "low": thinned.low, "high": thinned.high}
        curves[name] = {"x": plain(thinned.steps)}
        curves[name] |= {key: plain(values * scale) for key, values in parts.items() if values is not None}
    clock = None if run.clock is None else thin(run.clock, most)
    return {
        "label": run.label,
        "updatesPerEpoch": run.updates_per_epoch,
        "clock": None if clock is None else {"x": plain(clock.steps), "seconds": plain(clock.values)},
        "curves": curves,
    }


def plain(values: np.ndarray) -> list[float | None]:
    """For JSON, which knows no nan, in few digits."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]


def left_out(runs: Sequence[RunFolder], most: int) -> str:
    """What thinning has done, in words; nothing where it has not."""
    longest = max((len(curve.steps) for run in runs for curve in run.curves.values()), default=0)
    if longest <= most:
        return ""
    return (
        f"Curves of more than {most} points (the longest has {longest}) are shown as the means of as many groups of"
        " neighbours, with a band from the least to the greatest of each."
    )
