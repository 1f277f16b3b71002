"""Results of runs: one JSON line per finished run in `results.jsonl` of its folder, which the tables collect."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from util.runtime.amp import name_of
from util.runtime.distributed import world_size
from util.runtime.errors import RunError, printable
from util.runtime.files import ROOT
from util.runtime.logs import git_state, machine
from util.runtime.reading import Unreadable, name_lines, read_json_lines

RESULTS_FILE = "results.jsonl"
_OLD_PROBE_KEY = re.compile(
    r"(random|student|momentum)(?: encoder)?, "
    r"(?:(?P<knn>kNN, k \d+)|logistic, (?P<labels>\d+) labels/class|(?P<logistic>logistic, all labels)|linear, sweep)"
)


def append_result(
    output_dir: str | Path,
    stage: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    seconds: float,
    on: Mapping[str, Any],
) -> None:
    """Append the result of a run, unless it equals the last line: then a finished run was started once more.

    Args:
        output_dir: the run's folder, made if it is missing.
        stage: `pretrain`, `finetune`, `linprobe`, `segment`, `probe`, ...
        metrics: numbers by identifier, as `top1` or `student/knn`; accuracies in %.
        seconds: time that the run took; the parts of an interrupted run are summed.
        on: the machine, see `hardware_info`.
    """
    commit, dirty = git_state(ROOT)
    line = json.dumps(
        {
            "stage": stage,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "seconds": round(seconds, 1),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git_commit": commit,
            "git_dirty": dirty,
            "made_on": dict(on),
            "config": dict(config),
        }
    )
    before = read_results(output_dir)
    if before and comparable(before[-1]) == comparable(json.loads(line)):
        return
    path = Path(output_dir) / RESULTS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            cut_short = file.read() not in (b"", b"\n")  # by a crash
            file.write(f"{chr(10) if cut_short else ''}{line}\n".encode())
    except (IsADirectoryError, NotADirectoryError) as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); move it away, run the command again") from error


def hardware_info(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return what a result was computed on: processor, processes, precision (dtype None is fp32), torch version."""
    return {**machine(device), "processes": world_size(), "precision": name_of(dtype), "torch": torch.__version__}


def comparable(line: Mapping[str, Any]) -> list[Any]:
    """Return stage, metrics and settings of a result, without its time and the flags with which a run is resumed."""
    config = {name: value for name, value in line["config"].items() if name not in ("resume", "auto_resume")}
    return [line["stage"], line["metrics"], config]


def read_results(output_dir: str | Path, remarks: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the results in a run's `results.jsonl`, oldest first; none if the run has not finished.

    Old names of metrics become today's.

    Args:
        remarks: receives a sentence on what was left out; None prints it on stderr instead.
    """
    path = Path(output_dir) / RESULTS_FILE
    try:
        lines, damaged = read_json_lines(path)
        damaged = sorted([*damaged, *(number for number, line in lines if not is_result(line))])
        remark = f", {name_lines(damaged)}: cut short or not a result, left out" if damaged else ""
    except FileNotFoundError:
        return []
    except Unreadable as error:
        lines, remark = [], f" {error}, its results are left out"
    if remark and remarks is None:
        print(f"WARNING: {printable(str(path))}{remark}", file=sys.stderr)
    elif remark:
        remarks.append(f"{path.name}{remark}")
    return [with_renamed_metrics(line) for _, line in lines if is_result(line)]


def is_result(line: Mapping[str, Any]) -> bool:
    """Return True for a line with a stage, settings, and metrics that are numbers."""
    stage, metrics, config = (line.get(key) for key in ("stage", "metrics", "config"))
    if not (isinstance(stage, str) and isinstance(metrics, dict) and isinstance(config, dict)):
        return False
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in metrics.values())


def with_renamed_metrics(line: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose metrics have today's identifiers."""
    return line | {"metrics": {renamed_metric(name): value for name, value in line["metrics"].items()}}


def renamed_metric(name: str) -> str:
    """Return today's identifier of a metric; scripts/probe.py used to write "student, kNN, k 20" for `student/knn`."""
    match = _OLD_PROBE_KEY.fullmatch(name)
    if match is None:
        return name
    encoder, labels = match[1], match["labels"]
    if labels:
        return f"{encoder}/logistic_{labels}_per_class"
    return f"{encoder}/{'knn' if match['knn'] else 'logistic' if match['logistic'] else 'linear_sweep'}"
