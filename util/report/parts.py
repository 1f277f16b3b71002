"""What a report says of runs: summary, settings, speed, environment, and the commands that repeat them, as strings."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from util.config.command_line import MAINS
from util.results.curves import METRICS, Metric
from util.results.run_folder import RunFolder, as_number
from util.runtime.logs import LOG_FILE, VERSIONS_OF, format_duration

MISSING = "–"
HEADLINES = ("top1", "miou", "knn", "rankme", "val_loss", "loss")  # the first few that a run has stand on its card
MOST_HEADLINES = 3
Rows = list[list[str]]  # of a table, the first one are heads

# --------------------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """A number of a card."""

    title: str
    value: str
    when: str


@dataclass(frozen=True)
class Card:
    """A run in a few words."""

    label: str
    about: str
    status: str
    done: float | None  # 0 to 1, None: it has finished, or nobody knows
    headlines: list[Headline]
    remarks: Sequence[str]


def card(run: RunFolder, metrics: dict[str, Metric]) -> Card:
    """The best numbers first."""
    about = [title_of(run) or "unknown stage", str(run.config.get("model", "")), data_of(run)]
    names = [name for name in HEADLINES if name in run.curves][:MOST_HEADLINES]
    total = run.total_updates
    done = None if run.finished or not total else min(1.0, run.updates / total)
    found = [headline(run, name, metrics[name]) for name in names]
    return Card(run.label, " · ".join(filter(None, about)), status(run), done, found, run.remarks)


def headline(run: RunFolder, name: str, metric: Metric) -> Headline:
    """The best value where one direction is better, else the last; of a loss of the training the last."""
    curve = run.curves[name]
    best = curve.best(metric.better) if metric.better and name != "loss" else None
    value, step = best or (curve.last, int(curve.steps[-1]))
    which = "best" if best and step != curve.steps[-1] else "last"
    return Headline(metric.title.partition(",")[0], shown(value, metric), f"{which}, {when(run, step)}")


def when(run: RunFolder, step: int) -> str:
    """An update in epochs where they are known."""
    if run.updates_per_epoch is None:
        return f"update {step}"
    return f"epoch {step / run.updates_per_epoch:.4g}"


def status(run: RunFolder) -> str:
    """Finished, or how far it has come, how long the rest takes, and when it last spoke."""
    if run.finished:
        return "finished"
    done, total = run.updates, run.total_updates
    said = [f"under way or stopped: {done}{f' of {total}' if total else ''} updates"]
    if total and done and run.clock is not None:
        said.append(f"left {format_duration((total - done) * run.clock.last / done)}")
    written = datetime.fromtimestamp((run.path / LOG_FILE).stat().st_mtime, timezone.utc)
    return ", ".join([*said, f"last line of log {written:%Y-%m-%d %H:%M} UTC"])


def title_of(run: RunFolder) -> str:
    """What its stage is called; empty where nothing tells it."""
    return MAINS[run.stage].title if run.stage in MAINS else run.stage


def data_of(run: RunFolder) -> str:
    """What it was trained on."""
    if not run.config:
        return ""
    named = [str(run.config.get(key) or "") for key in ("dataset", "data_path")]
    if run.stage == "segment" and not any(named):
        named = [str(run.config.get("train_images") or run.config.get("val_images") or "")]
    return " ".join(filter(None, named)) or "unknown data"


def summary_rows(runs: Sequence[RunFolder], metrics: dict[str, Metric]) -> Rows:
    """A column for each run."""
    facts: dict[str, Callable[[RunFolder], str]] = {
        "stage": title_of,
        "model": lambda run: setting(run.config.get("model")),
        "image, patch": size_of,
        "data": data_of,
        "recipe": lambda run: setting(run.config.get("recipe")),
        "epochs": lambda run: of_total(
            run.updates_per_epoch and run.updates / run.updates_per_epoch, run.config.get("epochs")
        ),
        "updates": lambda run: of_total(run.updates, run.total_updates),
        "images per update": images_per_update,
        "time": lambda run: format_duration(seconds_of(run)) if seconds_of(run) else "",
        "images/s, median": lambda run: speed(run, 50),
    }
    for name, metric in metrics.items():
        if name in ("lr", "images_per_second", "data_wait", "memory_bytes"):
            continue
        if metric.better:
            facts[f"{metric.title}, best"] = lambda run, name=name, metric=metric: best(run, name, metric)
        facts[f"{metric.title}, last"] = lambda run, name=name, metric=metric: last(run, name, metric)
    rows = [[title, *(fact(run) or MISSING for run in runs)] for title, fact in facts.items()]
    return [["", *(run.label for run in runs)], *(row for row in rows if set(row[1:]) != {MISSING})]


def size_of(run: RunFolder) -> str:
    """As the settings give them; empty where the model's own are taken."""
    sides = run.config.get("input_size") or []
    sides = sides if isinstance(sides, list) else [sides]
    patch = run.config.get("patch_size")
    parts = [" × ".join(map(str, sides)) + " pixels" if sides else "", f"patch {patch}" if patch else ""]
    return ", ".join(filter(None, parts))


def of_total(done: float | None, total: Any) -> str:
    """`3.5 of 80`; only one of the two where they are the same, or nobody knows the other."""
    if done is None:
        return setting(total)
    shown_done = f"{done:.4g}" if done < 1e4 else f"{done:.0f}"
    return shown_done if total in (None, done) else f"{shown_done} of {total}"


def images_per_update(run: RunFolder) -> str:
    """Of all processes, where run.json tells their number."""
    parts = [as_number(run.config.get(key)) for key in ("batch_size", "accum_iter")]
    processes = as_number(run.info.get("processes"))
    return "" if None in (*parts, processes) else f"{math.prod([*parts, processes]):.0f}"


def seconds_of(run: RunFolder) -> float | None:
    """By the log, else by the results."""
    if run.clock is not None:
        return run.clock.last
    return next((as_number(line.get("seconds")) for line in reversed(run.results)), None)


def speed(run: RunFolder, percentile: float) -> str:
    """Images per second."""
    values = finite(run, "images_per_second")
    return shown(float(np.percentile(values, percentile)), None) if len(values) else ""


def finite(run: RunFolder, name: str) -> np.ndarray:
    """The values of a curve that are finite; none where there is no such curve."""
    values = run.curves[name].values if name in run.curves else np.zeros(0)
    return values[np.isfinite(values)]


def best(run: RunFolder, name: str, metric: Metric) -> str:
    """With the time of it."""
    found = run.curves[name].best(metric.better) if name in run.curves else None
    return "" if found is None else f"{shown(found[0], metric)} ({when(run, found[1])})"


def last(run: RunFolder, name: str, metric: Metric) -> str:
    """The newest value."""
    return shown(run.curves[name].last, metric) if name in run.curves else ""


def shown(value: float, metric: Metric | None) -> str:
    """With its unit, in four digits; what is in % to a hundredth."""
    value, unit = (value, "") if metric is None else (value * metric.scale, metric.unit)
    number = f"{value:.2f}" if unit == "%" else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{number} {unit}".strip()


# --------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------


def setting(value: Any) -> str:
    """As one would type it; nothing for what is not set."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing_settings(runs: Sequence[RunFolder]) -> Rows:
    """Settings whose values differ among the runs that have them; of one run, those that are not the default."""
    if len(runs) == 1:
        return departures(runs[0])
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config[key] for run in runs if key in run.config]
        if any(value != values[0] for value in values):
            rows.append([key, *(setting(run.config.get(key)) or MISSING for run in runs)])
    return [["", *(run.label for run in runs)], *rows] if rows else []


def departures(run: RunFolder) -> Rows:
    """Settings that are not the stage's default."""
    if run.stage not in MAINS:
        return []
    defaults = defaults_of(MAINS[run.stage].settings)
    rows = [
        [key, setting(value) or MISSING, setting(defaults[key]) or MISSING]
        for key, value in run.config.items()
        if key in defaults and value != defaults[key]
    ]
    return [["", run.label, "default"], *rows] if rows else []


def defaults_of(settings: type) -> dict[str, Any]:
    """As config.yaml would have them; they need not be valid together: a segmentation has no default data."""
    found = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(settings)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


# --------------------------------------------------------------------------------------------------------
# Speed, environment
# --------------------------------------------------------------------------------------------------------


def speed_rows(runs: Sequence[RunFolder]) -> Rows:
    """Throughput, waiting and memory, a row for each run."""
    rows = []
    for run in runs:
        memory, wait = finite(run, "memory_bytes"), finite(run, "data_wait")
        rows.append([
            run.label,
            speed(run, 50) or MISSING,
            f"{speed(run, 5)} – {speed(run, 95)}" if speed(run, 50) else MISSING,
            f"{100 * wait.mean():.0f} %" if len(wait) else MISSING,
            shown(float(memory.max()), METRICS["memory_bytes"]) if len(memory) else MISSING,
            format_duration(seconds_of(run)) if seconds_of(run) else MISSING,
        ])  # fmt: skip
    return [["", "images/s, median", "5th – 95th percentile", "waited for data", "peak memory", "time"], *rows]


ENVIRONMENT = {
    "git_commit": "commit",
    "git_dirty": "uncommitted changes",
    "python": "Python",
    **{package: package for package in VERSIONS_OF},
    "cuda": "CUDA of torch",
    "gpu": "GPU",
    "processes": "processes",
    "cpu": "CPU",
    "cores": "CPU cores",
    "platform": "system",
    "started": "last started",
}


def environment_rows(runs: Sequence[RunFolder]) -> Rows:
    """What run.json tells, the known first."""
    keys = [*ENVIRONMENT, *dict.fromkeys(key for run in runs for key in run.info)]
    keys = [key for key in dict.fromkeys(keys) if key != "command" and any(key in run.info for run in runs)]
    rows = [[ENVIRONMENT.get(key, key), *(setting(run.info.get(key)) or MISSING for run in runs)] for key in keys]
    return [["", *(run.label for run in runs)], *rows] if rows else []


# --------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------


def commands(run: RunFolder) -> list[tuple[str, str]]:
    """What it takes to repeat a run: what each command is for, and the command."""
    found = []
    info = run.info
    if info.get("git_commit"):
        changed = ", which had uncommitted changes" if info.get("git_dirty") else ""
        found.append((f"The code{changed}", f"git checkout {shlex.quote(str(info['git_commit']))}"))
    versions = [f"{package}=={info[package]}" for package in VERSIONS_OF if info.get(package)]
    if versions:
        found.append(("The packages that matter most", shlex.join(["pip", "install", *versions])))
    if info.get("command"):
        said = "As it was last started" + (" or resumed" if "--auto_resume" in str(info["command"]) else "")
        found.append((said, launched(str(info["command"]), info.get("processes"))))
    if run.config and run.stage in MAINS:
        program = [*launcher(info.get("processes")), MAINS[run.stage].program]
        again = [*program, "--recipe", str(run.path / "config.yaml"), "--output_dir", "AGAIN"]
        again += ["--resume", ""] if run.config.get("resume") else []
        found.append(("From its settings, whatever has become of the recipe", shlex.join(again)))
    return found


def launcher(processes: Any) -> list[str]:
    """What starts so many processes; of several nodes, what starts them on one."""
    many = isinstance(processes, int) and processes > 1
    return ["torchrun", f"--nproc_per_node={processes}"] if many else ["python"]


def launched(command: str, processes: Any) -> str:
    """The command of run.json with interpreter and script called as one would here."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    if len(words) < 2:
        return command
    return shlex.join([*launcher(processes), Path(words[1]).name, *words[2:]])
