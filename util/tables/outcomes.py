"""What a planned run has reached: its result, settings that differ from the plan, and its progress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.config.groups import as_dict
from util.config.same_run import MAY_CHANGE
from util.results.results import RESULTS_FILE, read_results
from util.runtime.errors import UserError
from util.runtime.files import write_durably
from util.runtime.logs import LOG_FILE
from util.tables.plan import Run
from util.tables.tables import ALL_STAGES, PRETRAIN
from util.weights.checkpoint import complete_checkpoints

# settings without effect on a run's numbers: where things lie, how the batch is split, how often it is evaluated
NO_EFFECT = (MAY_CHANGE - {"blr", "lr", "input_size", "mean", "std"}) | {
    *("monitor_freq", "monitor_images", "eval_freq", "dist_eval", "per_class", "finetune", "seed"),
    *("check_data", "pictures", "checkpoint"),
}
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """The line of a finished run in its `results.jsonl`."""

    metrics: Mapping[str, float]
    config: Mapping[str, Any]


def outcome_in(folder: Path, stage: str) -> Outcome | None:
    """Return the result of the run of one of ALL_STAGES in this folder; None if it has not finished."""
    lines = [line for line in read_results(folder) if line.get("stage") == ALL_STAGES[stage].main]
    return Outcome(lines[-1]["metrics"], lines[-1]["config"]) if lines else None


def deviations(config: Any, outcome: Outcome) -> list[str]:
    """Return the settings by which a finished run differs from the planned one, each as `epochs 2 (planned: 20)`."""
    planned = as_dict(config)
    return [
        f"{name} {value} (planned: {planned[name]})"
        for name, value in outcome.config.items()
        if name in planned and name not in NO_EFFECT and planned[name] != value
    ]


def check_outcomes(runs: Sequence[Run]) -> None:
    """Raise UserError if a run with other settings has finished in the folder of one of these."""
    for run in runs:
        outcome = outcome_in(run.folder, run.stage)
        others = deviations(run.config, outcome) if outcome is not None else []
        if others:
            raise UserError(f"--output_dir {run.folder}: has finished with {', '.join(others)}, choose another folder")


def share_done(run: Run) -> float:
    """Return the share of a run's epochs, 0 to 1, that its result or its newest checkpoint covers."""
    if outcome_in(run.folder, run.stage) is not None:
        return 1.0
    checkpoints = complete_checkpoints(run.folder)
    if not checkpoints:
        return 0.0
    path, manifest = checkpoints[-1]
    return min(1.0, (manifest.epoch + ("-step" not in path.name)) / run.config.epochs)


def copy_results(runs: Sequence[Run], source: Path, target: Path) -> int:
    """Copy the results of finished runs, and the logs of pre-trainings, from one --output_dir to another.

    Return the number of files. A full disk leaves a file that is there already whole.
    """
    copied = 0
    for run in runs:
        for name in (RESULTS_FILE, LOG_FILE) if run.stage == PRETRAIN else (RESULTS_FILE,):
            path = run.folder / name
            if path.is_file() and share_done(run) == 1:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                content = path.read_bytes()
                write_durably(copy, lambda file, content=content: file.write(content))
                copied += 1
    return copied


@dataclass(frozen=True)
class Progress:
    """The progress of a running main, read from the newest line of its log."""

    share: float  # of its updates, 0 to 1
    line: str


def read_progress(run: Run) -> Progress | None:
    """Return the progress of a run; None before its first line of training.

    run.json tells the number of updates. Folders of older versions lack it: there only whole epochs count.
    """
    training = {"step", "epoch", "images_per_second"}  # keys of its lines; epochs are counted from 0
    entries = [entry for entry in map(as_mapping, last_lines(run.folder / LOG_FILE)) if training <= entry.keys()]
    if not entries:
        return None
    entry, epochs = entries[-1], run.config.epochs
    step, epoch = entry["step"], entry["epoch"]
    total = as_mapping(read_text(run.folder / "run.json")).get("total_updates")
    if isinstance(total, int) and total > 0:
        share, steps = step / total, f"step {step}/{total}"
    else:
        share, steps = epoch / epochs, f"step {step}"
    numbers = [f"{key} {value:.4g}" for key in ("loss", "lr") if isinstance(value := entry.get(key), float)]
    speed = f"{float(entry['images_per_second']):.4g} images/s"
    return Progress(min(1.0, share), "  ".join([f"epoch {epoch + 1}/{epochs}", steps, *numbers, speed]))


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a file, those within its last TAIL_BYTES; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def read_text(path: Path) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def as_mapping(text: str) -> dict[str, Any]:
    """Return a JSON mapping; empty for anything else, such as a line that is still being written."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
