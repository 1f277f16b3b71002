"""Curves of runs for a page: the title of each metric, thinned to a number of points, as plain types for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.results.run_folder import Curve, RunFolder
from util.runtime.errors import printable

MOST_POINTS = 1000  # per curve: more than a screen has pixels for
MOST_IN_ALL = 30_000  # per page
FEWEST_POINTS = 20
DIGITS = 6  # of each number in the page


@dataclass(frozen=True)
class Metric:
    """The style in which a number of the log is shown."""

    title: str
    group: str  # the panels under one heading, see GROUPS
    unit: str = ""
    better: str = ""  # lower or higher; empty: neither
    scale: float = 1.0  # factor from the log's value to the unit


TRAINING, EVALUATION, SPEED = "Training", "Evaluation", "Throughput and data wait"
GROUPS = (TRAINING, EVALUATION, SPEED)
METRICS = {
    "loss": Metric("Loss", TRAINING, better="lower"),
    "mim": Metric("L_MIM, reconstruction (Eq. 1)", TRAINING, better="lower"),
    "bc": Metric("L_BC, visible tokens (Eq. 2)", TRAINING, better="lower"),
    "main": Metric("Loss of the decode head", TRAINING, better="lower"),
    "auxiliary": Metric("Loss of the auxiliary head", TRAINING, better="lower"),
    "lr": Metric("Learning rate", TRAINING),
    "grad_norm": Metric("Gradient norm", TRAINING),
    "skipped_updates": Metric("Skipped updates", TRAINING),
    "bad_images": Metric("Bad images replaced", TRAINING),
    "knn": Metric("kNN accuracy", EVALUATION, "%", "higher"),
    "linear": Metric("Linear-probe accuracy", EVALUATION, "%", "higher"),
    "rankme": Metric("RankMe, effective rank of the features", EVALUATION),
    "top1": Metric("Top-1 accuracy", EVALUATION, "%", "higher"),
    "top5": Metric("Top-5 accuracy", EVALUATION, "%", "higher"),
    "val_loss": Metric("Validation loss", EVALUATION, better="lower"),
    "miou": Metric("Mean IoU", EVALUATION, "%", "higher"),
    "aacc": Metric("Pixel accuracy", EVALUATION, "%", "higher"),
    "macc": Metric("Mean class accuracy", EVALUATION, "%", "higher"),
    "images_per_second": Metric("Images per second", SPEED, "images/s"),
    "data_wait": Metric("Time spent waiting for data", SPEED, "%", scale=100),
    "memory_bytes": Metric("Peak memory", SPEED, "GiB", scale=2**-30),
}


def metric_of(name: str, runs: Sequence[RunFolder]) -> Metric:
    """Return a known metric, or an unknown one under its own name: in the training group if logged with the loss."""
    if name in METRICS:
        return METRICS[name]
    with_loss = any("loss" in line for run in runs for line in run.lines if name in line)
    return Metric(name.replace("_", " "), TRAINING if with_loss else EVALUATION)


def metrics_of(runs: Sequence[RunFolder]) -> dict[str, Metric]:
    """Return the metrics that any run has logged, the known ones first and in their order."""
    logged = {name for run in runs for name in run.curves}
    names = [*(name for name in METRICS if name in logged), *sorted(logged - METRICS.keys())]
    return {name: metric_of(name, runs) for name in names}


# --------------------------------------------------------------------------------------------------------
# Thinning
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thinned:
    """A curve of few points; where points were merged, each is the mean of its neighbours, with their extremes."""

    steps: np.ndarray  # [m]
    values: np.ndarray  # [m]
    low: np.ndarray | None = None  # [m], None: nothing was merged
    high: np.ndarray | None = None


def thin(curve: Curve, most: int) -> Thinned:
    """Return at most `most` points, each the mean of equally many neighbours; the extremes keep every spike.

    Values that are not finite count neither in the mean nor in the extremes; where no other is, the point is nan.
    """
    if len(curve.steps) <= most:
        return Thinned(curve.steps, curve.values)
    starts = np.linspace(0, len(curve.steps), most, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(curve.steps)))
    finite = np.isfinite(curve.values)
    count = np.add.reduceat(finite.astype(int), starts)
    gaps = np.where(count == 0, np.nan, 0.0)
    total = np.add.reduceat(np.where(finite, curve.values, 0.0), starts)
    return Thinned(
        steps=np.add.reduceat(curve.steps, starts) / sizes,
        values=total / np.maximum(count, 1) + gaps,
        low=np.minimum.reduceat(np.where(finite, curve.values, np.inf), starts) + gaps,
        high=np.maximum.reduceat(np.where(finite, curve.values, -np.inf), starts) + gaps,
    )


def points_per_curve(runs: Sequence[RunFolder]) -> int:
    """Return how many points a curve may have so that the page stays small, however many runs it shows."""
    curves = sum(len(run.curves) for run in runs)
    return max(FEWEST_POINTS, min(MOST_POINTS, MOST_IN_ALL // max(curves, 1)))


# --------------------------------------------------------------------------------------------------------
# For the page
# --------------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # a damaged log may hold 1e308
def curves_of(run: RunFolder, metrics: dict[str, Metric], most: int) -> dict[str, Any]:
    """Return a run's curves for pages/report.js, which turns updates into epochs, hours or shares of the run."""
    curves = {}
    for name, curve in run.curves.items():
        thinned = thin(curve, most)
        scale = metrics[name].scale
        columns = {"y": thinned.values, "low": thinned.low, "high": thinned.high}
        curves[name] = {"x": plain(thinned.steps)}
        curves[name] |= {key: plain(values * scale) for key, values in columns.items() if values is not None}
    clock = None if run.clock is None else thin(run.clock, most)
    return {
        "label": printable(run.label),
        "updates": run.updates,
        "updatesPerEpoch": run.updates_per_epoch,
        "clock": None if clock is None else {"x": plain(clock.steps), "seconds": plain(clock.values)},
        "curves": curves,
    }


def plain(values: np.ndarray) -> list[float | None]:
    """Return floats of few digits, and None for nan, which JSON lacks."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]


def thinning_note(runs: Sequence[RunFolder], most: int) -> str:
    """Return a sentence on how curves were thinned; empty where none was."""
    longest = max((len(curve.steps) for run in runs for curve in run.curves.values()), default=0)
    if longest <= most:
        return ""
    return (
        f"Curves of more than {most} points (the longest has {longest}) are shown as means of neighbouring points, in a"
        " band from the lowest to the highest of them."
    )
