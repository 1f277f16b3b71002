"""The folder of a run read back: log, settings, what made it, results, pictures. The run may still be under way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from util.results.results import read_results
from util.runtime.errors import UserError
from util.runtime.logs import LOG_FILE
from util.weights.checkpoint import complete_checkpoints

NOT_MEASURED = ("step", "epoch", "seconds")  # keys of a line of log that are no curve of their own
ONLY_IN = {"mask_ratio": "pretrain", "max_updates": "segment"}  # settings that no other stage has
EPOCH_IN_NAME = re.compile(r"(.+)-(\d+)\.png")


@dataclass(frozen=True)
class Curve:
    """A number of the log over a run."""

    steps: np.ndarray  # int64 [n], updates, increasing
    values: np.ndarray  # float64 [n]

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    def best(self, better: str) -> tuple[float, int] | None:
        """The `lower` or `higher` end of its finite values, and the update at which it was first reached."""
        finite = np.flatnonzero(np.isfinite(self.values))
        if not len(finite):
            return None
        values = self.values[finite]
        place = finite[values.argmin() if better == "lower" else values.argmax()]
        return float(self.values[place]), int(self.steps[place])


@dataclass(frozen=True)
class RunFolder:
    """What a run has left so far."""

    path: Path
    label: str
    config: dict[str, Any]  # empty where config.yaml is missing
    info: dict[str, Any]  # of run.json, likewise
    lines: list[dict[str, Any]]  # of the log; one at least
    results: list[dict[str, Any]]  # of results.jsonl
    remarks: tuple[str, ...]  # what was found damaged or missing

    @cached_property
    def stage(self) -> str:
        """`pretrain`, `finetune`, ...: by the command, else the results, else the settings; empty: unknown."""
        script = re.search(r"main_(\w+)\.py", str(self.info.get("command", "")))
        if script:
            return script.group(1)
        if self.results:
            return str(self.results[-1]["stage"]).removesuffix("-eval")
        return next((stage for setting, stage in ONLY_IN.items() if setting in self.config), "")

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """All numbers of the log by name; of a step that is there twice the later line counts."""
        found: dict[str, dict[int, float]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in NOT_MEASURED and (number := as_number(value)) is not None:
                    found.setdefault(name, {})[line["step"]] = number
        return {
            name: Curve(np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
            for name, values in found.items()
        }

    @property
    def updates(self) -> int:
        """Optimiser steps so far."""
        return max(line["step"] for line in self.lines)

    @cached_property
    def updates_per_epoch(self) -> int | None:
        """From the log: an epoch's last line of training stands at its end. None: no epoch has ended yet."""
        ends: dict[int, int] = {}
        for line in self.lines:
            if "lr" in line and isinstance(line.get("epoch"), int):
                ends[line["epoch"]] = max(line["step"], ends.get(line["epoch"], 0))
        newest = max(ends, default=0)
        for epoch, step in ends.items():
            if epoch != newest and step % (epoch + 1) == 0:
                return step // (epoch + 1)
        # a monitor's or an evaluation's line counts finished epochs; --max_steps may have cut the last one short, and
        # --max_updates the one that they end in
        whole = [] if self.config.get("max_steps") else [line for line in self.lines if "lr" not in line]
        for line in whole:
            epochs, cut = line.get("epoch"), line["step"] == self.config.get("max_updates")
            if isinstance(epochs, int) and epochs > 0 and not cut and line["step"] % epochs == 0:
                return line["step"] // epochs
        return None

    @property
    def total_updates(self) -> int | None:
        """Optimiser steps that the settings ask for, as far as it can be known."""
        limits = [most for key in ("max_steps", "max_updates") if isinstance(most := self.config.get(key), int)]
        epochs = self.config.get("epochs")
        if isinstance(epochs, int) and self.updates_per_epoch:
            limits.append(epochs * self.updates_per_epoch)
        return min(limits, default=None)

    @property
    def finished(self) -> bool:
        """Whether it has written its result, and was not prolonged since."""
        wrote = any(line["stage"] == self.stage for line in self.results)
        return wrote and (self.total_updates is None or self.updates >= self.total_updates)

    @cached_property
    def clock(self) -> Curve | None:
        """Seconds that the run had taken by each update, interruptions left out; None: its log does not tell."""
        seconds = {
            line["step"]: number for line in self.lines if (number := as_number(line.get("seconds"))) is not None
        }
        if not seconds:
            return None
        steps = sorted(seconds)
        return Curve(np.array(steps), np.maximum.accumulate([seconds[step] for step in steps]))

    @property
    def pictures(self) -> dict[str, list[tuple[int, Path]]]:
        """By what they show: (epoch, file) in their order, of pictures/NAME-EPOCH.png."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.path / "pictures").glob("*.png")):
            if match := EPOCH_IN_NAME.fullmatch(path.name):
                found.setdefault(match.group(1), []).append((int(match.group(2)), path))
        return {name: sorted(pictures) for name, pictures in found.items()}

    @property
    def newest_checkpoint(self) -> Path | None:
        """The last complete one."""
        found = complete_checkpoints(self.path)
        return found[-1][0] if found else None


def as_number(value: Any) -> float | None:
    """A number of a log, "nan" and "inf" among them; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    return float(value)


# --------------------------------------------------------------------------------------------------------
# Finding and reading
# --------------------------------------------------------------------------------------------------------


def open_runs(paths: Sequence[str], labels: Sequence[str] = ()) -> list[RunFolder]:
    """The runs in these folders; a folder without a log stands for all runs below it.

    Args:
        labels: one for each run; empty: made from the paths.

    Raises:
        UserError: no folder, no run in it, an empty log, or another number of labels.
    """
    folders: list[Path] = []
    for path in paths:
        folders += [folder for folder in find_runs(Path(path)) if folder not in folders]
    if labels and len(labels) != len(folders):
        raise UserError(f"--label {' '.join(labels)}: give one for each of {len(folders)} runs, or none")
    return [read_run(folder, label) for folder, label in zip(folders, labels or short_names(folders), strict=True)]


def find_runs(path: Path) -> list[Path]:
    """The folder itself where it has a log, else those below it that have."""
    if not path.is_dir():
        raise UserError(f"RUN {path}: there is no such folder, give the --output_dir of a run")
    if (path / LOG_FILE).is_file():
        return [path]
    below = sorted(log.parent for log in path.glob(f"**/{LOG_FILE}"))
    if not below:
        raise UserError(f"RUN {path}: is no run, neither it nor a folder below has a {LOG_FILE}")
    return below


def short_names(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]

    def name(own: tuple[str, ...]) -> str:
        ends = (own[-length:] for length in range(1, len(own)))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        return "/".join(next(alone, own))

    return [name(own) for own in parts]


def read_run(path: Path, label: str) -> RunFolder:
    """All that is there; what is damaged or missing is remarked, unless it is the log.

    Raises:
        UserError: the log cannot be read, or holds no complete line.
    """
    remarks: list[str] = []
    lines = read_log(path / LOG_FILE, remarks)
    if not lines:
        raise UserError(f"RUN {path}: its {LOG_FILE} holds no complete line yet, wait for the first one")
    config = read_mapping(path / "config.yaml", remarks)
    info = read_mapping(path / "run.json", remarks)
    broken = sum(not math.isfinite(n) for line in lines if (n := as_number(line.get("loss"))) is not None)
    if broken:
        remarks.append(f"{broken} lines of the log have a loss that is not finite")
    try:
        results = read_results(path)
    except OSError as error:
        results = []
        remarks.append(f"results.jsonl cannot be read ({error.strerror})")
    return RunFolder(path, label, config, info, lines, results, tuple(remarks))


def read_log(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The lines that are whole; those that are not, such as the one being written, are remarked."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"RUN {path.parent}: {path.name} cannot be read ({error.strerror})") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif text.strip():
            cut = "is cut short (it may be being written)" if number == len(texts) else "is damaged"
            remarks.append(f"line {number} of {path.name} {cut} and left out")
    return lines


def read_mapping(path: Path, remarks: list[str]) -> dict[str, Any]:
    """What a YAML or JSON file says; nothing and a remark where it cannot be read."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))  # which reads JSON too
    except FileNotFoundError:
        remarks.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        remarks.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(found, dict):
        remarks.append(f"{path.name} holds no settings")
        return {}
    return {str(key): value for key, value in found.items()}
