"""Read back the folder of a run: log, settings, run.json, results, pictures. The run may still be training.

Files that are damaged or missing are left out, and a remark says so: nothing in a run's folder ends a report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from util.results.results import read_results
from util.runtime.errors import UserError
from util.runtime.files import manifest_path
from util.runtime.logs import LOG_FILE
from util.runtime.reading import Unreadable, as_count, as_number, name_lines, read_bytes, read_json_lines, read_mapping
from util.weights.checkpoint import checkpoints_in, complete_checkpoints, read_manifest

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
NOT_CURVES = ("step", "epoch", "seconds")  # keys of a log line that are no curve of their own
# for folders without a stage in run.json: settings that only this stage has
SETTING_OF_STAGE = {"mask_ratio": "pretrain", "max_updates": "segment", "mixup": "finetune"}
EPOCH_IN_NAME = re.compile(r"(.+)-(\d+)\.png")


@dataclass(frozen=True)
class Curve:
    """A number of the log over a run."""

    steps: np.ndarray  # int64 [n], updates, increasing
    values: np.ndarray  # float64 [n]

    @property
    def last(self) -> float:
        """Return the newest value."""
        return float(self.values[-1])

    def best(self, better: str) -> tuple[float, int] | None:
        """Return the `lower` or `higher` extreme of the finite values, and the update that first reached it."""
        finite = np.flatnonzero(np.isfinite(self.values))
        if not len(finite):
            return None
        values = self.values[finite]
        index = finite[values.argmin() if better == "lower" else values.argmax()]
        return float(self.values[index]), int(self.steps[index])


@dataclass(frozen=True)
class RunFolder:
    """The files that a run has written so far."""

    path: Path
    label: str
    config: dict[str, Any]  # config.yaml; empty if it is missing
    facts: dict[str, Any]  # run.json; empty if it is missing
    lines: list[dict[str, Any]]  # of the log, each with a step
    results: list[dict[str, Any]]  # of results.jsonl
    remarks: tuple[str, ...]  # what is damaged or missing

    @cached_property
    def stage(self) -> str:
        """Return `pretrain`, `finetune`, ...; empty where nothing tells it."""
        if stage := text_of(self.facts.get("stage")):
            return stage
        if self.results:
            return self.results[-1]["stage"].removesuffix("-eval")
        return next((stage for setting, stage in SETTING_OF_STAGE.items() if setting in self.config), "")

    @property
    def recipe(self) -> str:
        """Return the name that --recipe gave, empty without one."""
        return text_of(self.facts.get("recipe", self.config.get("recipe")))

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Return the numbers of the log by name; where a step was logged twice, the later line counts."""
        values_of: dict[str, dict[int, float]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in NOT_CURVES and (number := as_number(value)) is not None:
                    values_of.setdefault(name, {})[line["step"]] = number
        return {name: curve_from(values) for name, values in values_of.items()}

    @property
    def updates(self) -> int:
        """Return the optimiser steps so far."""
        return max((line["step"] for line in self.lines), default=0)

    @cached_property
    def updates_per_epoch(self) -> int | None:
        """Return run.json's number, else by the log: an epoch's last line is logged at its end.

        None: run.json does not tell, and the first epoch in the log has not ended.
        """
        if written := as_count(self.facts.get("updates_per_epoch")):
            return written
        training = ((as_count(line.get("epoch")), line["step"]) for line in self.lines if "lr" in line)
        ends = {epoch: step for epoch, step in training if epoch is not None}
        first = min(ends, default=0)
        return ends[first] // (first + 1) or None if len(ends) > 1 else None

    @property
    def total_updates(self) -> int | None:
        """Return the optimiser steps of the whole run by run.json, else by the settings; None if neither tells."""
        if written := as_count(self.facts.get("total_updates")):
            return written
        max_steps, max_updates, epochs = (
            as_count(self.config.get(key)) for key in ("max_steps", "max_updates", "epochs")
        )
        by_epochs = epochs * self.updates_per_epoch if epochs and self.updates_per_epoch else None
        return min((limit for limit in (max_steps, max_updates, by_epochs) if limit), default=None)

    @property
    def finished(self) -> bool:
        """Return True once the run has written its result, unless it was prolonged since."""
        has_result = any(line["stage"] == self.stage for line in self.results)
        return has_result and (self.total_updates is None or self.updates >= self.total_updates)

    @cached_property
    def clock(self) -> Curve | None:
        """Return the seconds that the run had taken by each update, without interruptions; None: not in its log."""
        seconds = {line["step"]: as_number(line.get("seconds")) for line in self.lines}
        seconds = {step: number for step, number in seconds.items() if number is not None and 0 <= number < math.inf}
        if not seconds:
            return None
        curve = curve_from(seconds)
        return Curve(curve.steps, np.maximum.accumulate(curve.values))

    @property
    def pictures(self) -> dict[str, list[tuple[int, Path]]]:
        """Return (epoch, file) in order of the epochs for each NAME of pictures/NAME-EPOCH.png."""
        pictures: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.path / "pictures").glob("*.png")):
            if match := EPOCH_IN_NAME.fullmatch(path.name):
                pictures.setdefault(match.group(1), []).append((int(match.group(2)), path))
        return {name: sorted(files) for name, files in pictures.items()}

    @property
    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint."""
        checkpoints = complete_checkpoints(self.path)
        return checkpoints[-1][0] if checkpoints else None


def curve_from(values: dict[int, float]) -> Curve:
    """Return the values by step as a curve."""
    steps = sorted(values)
    return Curve(np.array(steps), np.array([values[step] for step in steps]))


def text_of(value: Any) -> str:
    """Return a string as it is, and the empty one for anything else."""
    return value if isinstance(value, str) else ""


# --------------------------------------------------------------------------------------------------------
# Finding and reading
# --------------------------------------------------------------------------------------------------------


def open_runs(paths: Sequence[str], labels: Sequence[str] = ()) -> list[RunFolder]:
    """Read the runs in these folders; a folder that is no run stands for all runs below it.

    Args:
        labels: one for each run; empty: made from the paths.

    Raises:
        UserError: no such folder, no run in it, or another number of labels.
    """
    folders: list[Path] = []
    for path in paths:
        folders += [folder for folder in find_runs(Path(path)) if folder not in folders]
    if labels and len(labels) != len(folders):
        raise UserError(f"--label {' '.join(labels)}: give one for each of {len(folders)} runs, or none")
    return [read_run(folder, label) for folder, label in zip(folders, labels or short_names(folders), strict=True)]


def find_runs(path: Path) -> list[Path]:
    """Return the folder itself if it has a log or a run.json, else the folders below it that have."""
    if not path.is_dir():
        raise UserError(f"RUN {path}: there is no such folder, give the --output_dir of a run")
    names = (LOG_FILE, RUN_FILE)
    if any((path / name).exists() for name in names):
        return [path]
    below = sorted({file.parent for name in names for file in path.glob(f"**/{name}")})
    if not below:
        raise UserError(f"RUN {path}: is no run, neither it nor a folder below has a {LOG_FILE}")
    return below


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the end of each path, as long as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]

    def name(own: tuple[str, ...]) -> str:
        ends = (own[-length:] for length in range(1, len(own)))
        unique = (end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        return "/".join(next(unique, own))

    return [name(own) for own in parts]


def read_run(path: Path, label: str) -> RunFolder:
    """Read whatever the folder has; what is damaged or missing becomes a remark."""
    remarks: list[str] = []
    lines = read_log(path / LOG_FILE, remarks)
    config, facts = (read_or_remark(path / name, remarks) for name in (CONFIG_FILE, RUN_FILE))
    results = read_results(path, remarks)
    for checkpoint in checkpoints_in(path):
        if manifest_path(checkpoint).exists() and read_manifest(checkpoint) is None:
            remarks.append(f"{manifest_path(checkpoint).name} is damaged, its checkpoint is left out")
    return RunFolder(path, label, config, facts, lines, results, tuple(remarks))


def read_log(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """Return the log lines that have a step; the others become a remark, also one that is just being written."""
    try:
        numbered, damaged = read_json_lines(path)
    except FileNotFoundError:
        remarks.append(f"{path.name} is missing")
        return []
    except Unreadable as error:
        remarks.append(f"{path.name} {error}")
        return []
    damaged = sorted([*damaged, *(number for number, line in numbered if as_count(line.get("step")) is None)])
    lines = [line for _, line in numbered if as_count(line.get("step")) is not None]
    if damaged:
        remarks.append(f"{path.name}, {name_lines(damaged)}: cut short or damaged, left out")
    if not lines:
        remarks.append(f"{path.name} holds no complete line yet")
    not_finite = sum(not math.isfinite(n) for line in lines if (n := as_number(line.get("loss"))) is not None)
    if not_finite:
        remarks.append(f"{path.name}: the loss is not finite in {not_finite} lines")
    return lines


def read_or_remark(path: Path, remarks: list[str]) -> dict[str, Any]:
    """Return the mapping in a file; an empty one and a remark if it cannot be read."""
    try:
        values = read_mapping(path)
        if values and path.suffix == ".yaml" and not read_bytes(path).endswith(b"\n"):  # `epochs: 400` cut to 40
            key, _ = values.popitem()
            remarks.append(f"{path.name} is cut short, {key} and what followed are left out")
        return values
    except FileNotFoundError:
        remarks.append(f"{path.name} is missing")
    except Unreadable as error:
        remarks.append(f"{path.name} {error}")
    return {}
