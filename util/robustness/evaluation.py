"""Evaluate a classifier on the sets of Table 5; each finished column is a line of results.jsonl."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.results.results import append_result, hardware_info
from util.robustness.scores import PassSettings, evaluate_pass, examples_of, group_by_pass, indices_of
from util.robustness.sets import Task, flags_of
from util.robustness.view import STAGE, column_titles, draw_examples, find_line, main_metric
from util.runtime.distributed import is_main
from util.runtime.files import sha256_of
from util.runtime.logs import format_duration
from util.weights.classifiers import NamedClassifier
from util.weights.vit import TIMM


@dataclass(frozen=True)
class Plan:
    """The columns of one call: to be evaluated, finished before, and missing."""

    passes: Sequence[Sequence[Task]]
    finished: Sequence[Task]
    missing: Mapping[str, str]  # column -> why
    settings: Mapping[str, dict[str, Any]]  # column -> what its number depends on

    @property
    def todo(self) -> list[Task]:
        """Return the tasks of all passes."""
        return [task for tasks in self.passes for task in tasks]


def plan_passes(
    tasks: Sequence[Task],
    missing: Mapping[str, str],
    settings: Mapping[str, dict[str, Any]],
    lines: Sequence[dict[str, Any]],
) -> Plan:
    """Return a plan that leaves out the tasks whose settings stand in one of the lines of results.jsonl."""
    finished = [task for task in tasks if find_line(lines, settings[task.key])]
    return Plan(group_by_pass([task for task in tasks if task not in finished]), finished, missing, settings)


def identity_of(
    classifier: NamedClassifier, checkpoint: str, num_heads: int | None, pixels: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Return what tells a model from others; a file is known by its hash, since runs write to the same name again.

    Args:
        checkpoint: as given on the command line; its path is recorded for the reader.
        num_heads: likewise.
        pixels: --mean and --std, where they are given.
    """
    name, _, path = checkpoint.partition("=") if checkpoint.startswith(TIMM) else ("", "", checkpoint)
    digest = ""
    if path:
        with open(path, "rb") as file:
            digest = sha256_of(file)
    return {
        "label": classifier.label,
        "checkpoint": name or str(Path(path).resolve()),
        "sha256": digest,
        "weights": classifier.weights,
        "num_heads": num_heads,
        "input_size": list(classifier.size),
        **{flag: list(values) for flag, values in pixels.items() if values},
    }


def settings_of(
    task: Task, identity: Mapping[str, Any], paths: Mapping[str, str], settings: PassSettings
) -> dict[str, Any]:
    """Return all that a column's number depends on, for its line in results.jsonl; `paths`: of the sets, by flag."""
    return {
        "column": task.key,
        **identity,
        "images": {flag: str(Path(paths[flag]).resolve()) for flag in flags_of(task.key)},
        "num_images": len(task.indices),
        "lacking": task.lacking,
        "on_bad_image": settings.loading.on_bad_image,
        "amp": str(settings.dtype or "fp32").removeprefix("torch."),
        **({"occlusion": settings.occlusion, "occlusion_fill": settings.fill} if task.occluded else {}),
    }


def print_plan(classifier: NamedClassifier, plan: Plan) -> None:
    """Print the model, and which columns will be evaluated, are finished, and are missing."""
    titles = column_titles()
    mean, std = classifier.normalise.mean, classifier.normalise.std
    print(f"{classifier.label}: {classifier.origin}; {classifier.size[0]} x {classifier.size[1]} pixels")
    print(f"pixels normalised by mean {' '.join(map(str, mean))} and std {' '.join(map(str, std))}")
    for tasks in plan.passes:
        lacking = f" ({tasks[0].lacking})" if tasks[0].lacking else ""
        print(f"to do: {', '.join(titles[task.key] for task in tasks)}: {len(indices_of(tasks))} images{lacking}")
    if plan.finished:
        print(f"done before: {', '.join(titles[task.key] for task in plan.finished)}")
    for key, reason in plan.missing.items():
        print(f"missing: {titles[key]}, {reason}")
    sys.stdout.flush()


def record_label(plan: Plan, lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Append the finished lines of a model once more if it has another label now; the last label is shown."""
    for task in plan.finished:
        settings = plan.settings[task.key]
        line = find_line(lines, settings)
        if line["config"]["label"] != settings["label"]:
            append_result(folder, STAGE, settings, line["metrics"], line["seconds"], line.get("made_on", {}))


def run_passes(classifier: NamedClassifier, plan: Plan, settings: PassSettings, folder: Path) -> None:
    """Do one pass after the other, and record each as soon as it is finished."""
    titles = column_titles()
    sizes = [len(indices_of(tasks)) for tasks in plan.passes]
    hardware = hardware_info(settings.processes.device, settings.dtype)
    first = time.monotonic()
    for number, tasks in enumerate(plan.passes, start=1):
        begin = time.monotonic()
        title = ", ".join(titles[task.key] for task in tasks)
        scored = list(evaluate_pass(classifier, tasks, settings, title))
        if not is_main():
            continue
        now = time.monotonic()
        for task, metrics in scored:
            append_result(folder, STAGE, plan.settings[task.key], metrics, now - begin, hardware)
            metric, unreadable = "AUPR" if task.key == "o" else "top-1", metrics["bad_images"]
            line = f"{titles[task.key]}: {metric} {main_metric(task.key, {'metrics': metrics}):.2f} %"
            line += f" of {metrics['images']} images"
            print(line + (f", {unreadable} could not be read" if unreadable else ""), flush=True)
        left = (now - first) / sum(sizes[:number]) * sum(sizes[number:])
        if left:
            print(f"{number} of {len(plan.passes)} passes, left {format_duration(left)}", flush=True)


def save_examples(
    classifier: NamedClassifier, tasks: Sequence[Task], number: int, settings: PassSettings, folder: Path
) -> None:
    """Draw images as the model sees them: a wrong crop or a missing label map shows at once."""
    rows = {task.key: examples for task in tasks if (examples := examples_of(classifier, task, number, settings))}
    if rows:
        path = folder / f"examples-{re.sub(r'[^A-Za-z0-9_.-]+', '_', classifier.label)}.png"
        draw_examples(rows, classifier.label, path)
        print(f"examples: {path}")
