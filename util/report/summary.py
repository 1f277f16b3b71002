"""The numbers of a report: a card for each run, and the tables of summary and speed, as strings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from util.config.command_line import MAINS
from util.report.settings import MISSING, Rows, setting
from util.results.curves import METRICS, SPEED, Metric
from util.results.run_folder import RunFolder
from util.runtime.logs import LOG_FILE, format_duration
from util.runtime.reading import as_number
from util.tables.tables import SEGMENT

HEADLINES = ("top1", "miou", "knn", "rankme", "val_loss", "loss")  # the first few that a run has stand on its card
MOST_HEADLINES = 3


@dataclass(frozen=True)
class Headline:
    """A number on a card."""

    title: str
    value: str
    when: str


@dataclass(frozen=True)
class Card:
    """A run in a few words."""

    label: str
    description: str
    status: str
    done: float | None  # 0 to 1; None: finished, or not known
    headlines: list[Headline]
    remarks: Sequence[str]


def card(run: RunFolder, metrics: dict[str, Metric]) -> Card:
    """Return the card of a run, its most telling numbers first."""
    description = [stage_title(run) or "unknown stage", setting(run.config.get("model")), data_of(run)]
    names = [name for name in HEADLINES if name in run.curves][:MOST_HEADLINES]
    total = run.total_updates
    done = None if run.finished or not total else min(1.0, run.updates / total)
    headlines = [headline(run, name, metrics[name]) for name in names]
    return Card(run.label, " · ".join(filter(None, description)), status(run), done, headlines, run.remarks)


def headline(run: RunFolder, name: str, metric: Metric) -> Headline:
    """Return the best value of a metric that has a better direction, else the last; of the training loss the last."""
    curve = run.curves[name]
    best = curve.best(metric.better) if metric.better and name != "loss" else None
    value, step = best or (curve.last, int(curve.steps[-1]))
    which = "best" if best and step != curve.steps[-1] else "last"
    return Headline(metric.title.partition(",")[0], with_unit(value, metric), f"{which}, {when(run, step)}")


def when(run: RunFolder, step: int) -> str:
    """Return an update as an epoch, if the run tells how long one is."""
    if run.updates_per_epoch is None:
        return f"update {step}"
    return f"epoch {step / run.updates_per_epoch:.4g}"


def status(run: RunFolder) -> str:
    """Return `finished`, or how far the run is, how long the rest takes, and the time of the last log line."""
    if run.finished:
        return "finished"
    done, total = run.updates, run.total_updates
    parts = [f"running or stopped: {done}{f' of {total}' if total else ''} updates"]
    if total and done and run.clock is not None:
        parts.append(f"left {format_duration((total - done) * run.clock.last / done)}")
    log = run.path / LOG_FILE
    if log.is_file():
        parts.append(f"last log line {datetime.fromtimestamp(log.stat().st_mtime, timezone.utc):%Y-%m-%d %H:%M} UTC")
    return ", ".join(parts)


def stage_title(run: RunFolder) -> str:
    """Return `fine-tuning` for finetune, and so on; empty if the stage is unknown."""
    return MAINS[run.stage].title if run.stage in MAINS else run.stage


def data_of(run: RunFolder) -> str:
    """Return the data set by name and path."""
    if not run.config:
        return ""
    names = [str(run.config.get(key) or "") for key in ("dataset", "data_path")]
    if run.stage == SEGMENT and not any(names):
        names = [str(run.config.get("train_images") or run.config.get("val_images") or "")]
    return " ".join(filter(None, names)) or "unknown data"


def summary_rows(runs: Sequence[RunFolder], metrics: dict[str, Metric]) -> Rows:
    """Return the table of all numbers, a column for each run."""
    facts: dict[str, Callable[[RunFolder], str]] = {
        "stage": stage_title,
        "model": lambda run: setting(run.config.get("model")),
        "image, patch": image_and_patch,
        "data": data_of,
        "recipe": lambda run: run.recipe,
        "epochs": lambda run: done_of_total(
            run.updates_per_epoch and run.updates / run.updates_per_epoch, run.config.get("epochs")
        ),
        "updates": lambda run: done_of_total(run.updates, run.total_updates),
        "images per update": images_per_update,
        "time": duration,
        "images/s, median": lambda run: speed(run, 50),
    }
    for name, metric in metrics.items():
        if name == "lr" or metric.group == SPEED:
            continue
        if metric.better:
            facts[f"{metric.title}, best"] = lambda run, name=name, metric=metric: best(run, name, metric)
        facts[f"{metric.title}, last"] = lambda run, name=name, metric=metric: last(run, name, metric)
    rows = [[title, *(fact(run) or MISSING for run in runs)] for title, fact in facts.items()]
    return [["", *(run.label for run in runs)], *(row for row in rows if set(row[1:]) != {MISSING})]


def image_and_patch(run: RunFolder) -> str:
    """Return image and patch size as the settings give them; empty if the model's own are taken."""
    sides = run.config.get("input_size") or []
    sides = sides if isinstance(sides, list) else [sides]
    patch = run.config.get("patch_size")
    parts = [" × ".join(map(str, sides)) + " pixels" if sides else "", f"patch {patch}" if patch else ""]
    return ", ".join(filter(None, parts))


def done_of_total(done: float | None, total: Any) -> str:
    """Return `3.5 of 80`; one number if they are equal or the other is not known."""
    if done is None:
        return setting(total)
    text = f"{done:.4g}" if done < 1e4 else f"{done:.0f}"
    return text if total in (None, done) else f"{text} of {total}"


def images_per_update(run: RunFolder) -> str:
    """Return the images of an update in all processes, if run.json tells their number."""
    factors = [as_number(run.config.get(key)) for key in ("batch_size", "accum_iter")]
    factors.append(as_number(run.facts.get("processes")))
    return "" if None in factors else f"{math.prod(factors):.0f}"


def duration(run: RunFolder) -> str:
    """Return the time that the run took by its log, else by its results; empty if neither tells."""
    by_results = [as_number(line.get("seconds")) for line in run.results]
    seconds = run.clock.last if run.clock is not None else by_results[-1] if by_results else None
    return format_duration(seconds) if seconds else ""


def speed(run: RunFolder, percentile: float) -> str:
    """Return a percentile of the images per second."""
    values = finite_values(run, "images_per_second")
    return with_unit(float(np.percentile(values, percentile)), None) if len(values) else ""


def finite_values(run: RunFolder, name: str) -> np.ndarray:
    """Return the finite values of a curve, none if the run has no such curve."""
    values = run.curves[name].values if name in run.curves else np.zeros(0)
    return values[np.isfinite(values)]


def best(run: RunFolder, name: str, metric: Metric) -> str:
    """Return the best value and when it was reached."""
    value_and_step = run.curves[name].best(metric.better) if name in run.curves else None
    if value_and_step is None:
        return ""
    value, step = value_and_step
    return f"{with_unit(value, metric)} ({when(run, step)})"


def last(run: RunFolder, name: str, metric: Metric) -> str:
    """Return the newest value."""
    return with_unit(run.curves[name].last, metric) if name in run.curves else ""


def with_unit(value: float, metric: Metric | None) -> str:
    """Return the value in the metric's unit: four digits, percentages to two decimals."""
    value, unit = (value, "") if metric is None else (value * metric.scale, metric.unit)
    number = f"{value:.2f}" if unit == "%" else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{number} {unit}".strip()


def speed_rows(runs: Sequence[RunFolder]) -> Rows:
    """Return the table of throughput, data wait and memory, a row for each run."""
    rows = []
    for run in runs:
        memory, wait = finite_values(run, "memory_bytes"), finite_values(run, "data_wait")
        rows.append([
            run.label,
            speed(run, 50) or MISSING,
            f"{speed(run, 5)} – {speed(run, 95)}" if speed(run, 50) else MISSING,
            f"{100 * wait.mean():.0f} %" if len(wait) else MISSING,
            with_unit(float(memory.max()), METRICS["memory_bytes"]) if len(memory) else MISSING,
            duration(run) or MISSING,
        ])  # fmt: skip
    return [["", "images/s, median", "5th – 95th percentile", "waited for data", "peak memory", "time"], *rows]
