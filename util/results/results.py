"""What a run came to: one JSON line per finished run in `results.jsonl` of its folder, for tables to collect."""

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
from util.runtime.files import ROOT
from util.runtime.logs import git_state, machine

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
    """Append the outcome of a run, unless it is the last line already: a finished run that was called once more.

    Args:
        output_dir: the run's; made where it is not there.
        stage: `pretrain`, `finetune`, `linprobe`, `segment`, `probe`, ...
        metrics: by identifier, as `top1` or `student/knn`; accuracies in %.
        seconds: it took; of a run that was interrupted all parts together.
        on: what `hardware_info` says of the machine.
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
    if before and as_compared(before[-1]) == as_compared(json.loads(line)):
        return
    path = Path(output_dir) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_short else "") + line + "\n")


def hardware_info(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Of a result: the processors, and the type of numbers they computed in (None: fp32)."""
    return {**machine(device), "processes": world_size(), "precision": name_of(dtype), "torch": torch.__version__}


def as_compared(line: Mapping[str, Any]) -> list[Any]:
    """What a run came to, but for when, and for the settings by which it is called again."""
    config = {name: value for name, value in line["config"].items() if name not in ("resume", "auto_resume")}
    return [line["stage"], line["metrics"], config]


def read_results(output_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `results.jsonl`, oldest first; none where it did not finish.

    A line that a crash cut short is named on stderr and does not count. Old names of metrics become today's.
    """
    path = Path(output_dir) / RESULTS_FILE
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"stage", "metrics", "config"} <= line.keys():
            found.append(line | {"metrics": {renamed_metric(name): value for name, value in line["metrics"].items()}})
        else:
            print(f"WARNING: {path}, line {number}: is cut short or no result, it does not count", file=sys.stderr)
    return found


def renamed_metric(name: str) -> str:
    """Return today's identifier of a metric; scripts/probe.py used to write "student, kNN, k 20" for `student/knn`."""
    match = _OLD_PROBE_KEY.fullmatch(name)
    if match is None:
        return name
    encoder, labels = match[1], match["labels"]
    if labels:
        return f"{encoder}/logistic_{labels}_per_class"
    return f"{encoder}/{'knn' if match['knn'] else 'logistic' if match['logistic'] else 'linear_sweep'}"
