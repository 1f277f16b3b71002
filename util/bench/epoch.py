"""Measure whole runs of main_pretrain.py: their speed, and the time that is not spent on training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

import main_pretrain
from engine_pretrain import PretrainTrainer
from util.bench.config import EpochConfig
from util.bench.timing import compiled_graphs, patched, run_alone
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.runtime.files import writable_folder
from util.runtime.logs import LOG_FILE
from util.train import run as train_run
from util.train.monitor import Monitor

PARTS = ("training", "data wait", "saving", "evaluation", "start")


def run_variant(config: EpochConfig) -> dict[str, float]:
    """Do one run in a fresh process and a temporary folder below --output_dir."""
    parent = writable_folder(config.output_dir, "output_dir")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        return run_alone(timed_run, recipe_of(config), config.effective_batch, folder)


def recipe_of(config: EpochConfig) -> dict[str, Any]:
    """Return the settings that main_pretrain.py knows, as the content of a recipe."""
    left_out = ("recipe", "output_dir", "log_dir", "resume", "auto_resume")
    settings, names = as_dict(config), [field.name for field in dataclasses.fields(PretrainConfig)]
    return {name: settings[name] for name in names if name not in left_out and settings[name] not in (None, "", [])}


@contextlib.contextmanager
def timed_parts(seconds: dict[str, float], graphs: list[int]) -> Iterator[None]:
    """Add the seconds of each part of a run to `seconds`, and the compiled graphs after each update to `graphs`."""

    def adds_to(part: str) -> Callable[[Callable], Callable]:
        def wrap(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    seconds[part] += time.perf_counter() - begin

            return call

        return wrap

    def counts_graphs(update: Callable) -> Callable:
        def call(*args: Any) -> None:
            update(*args)
            graphs.append(compiled_graphs())

        return call

    with (
        patched(PretrainTrainer, "update", counts_graphs),
        patched(train_run, "save", adds_to("saving")),
        patched(train_run, "train_one_epoch", adds_to("epochs")),
        patched(Monitor, "evaluate", adds_to("evaluation")),
    ):
        yield


def timed_run(settings: dict[str, Any], images_per_update: int, folder: str) -> dict[str, float]:
    """Run main_pretrain.py in this process; return its `summary`, and the graphs compiled after the first update."""
    recipe, run_folder = Path(folder) / "settings.yaml", Path(folder) / "run"
    recipe.write_text(yaml.safe_dump(settings))
    argv = [main_pretrain.__file__, "--recipe", str(recipe), "--output_dir", str(run_folder)]
    seconds, graphs = dict.fromkeys(("saving", "evaluation", "epochs"), 0.0), []
    with (
        timed_parts(seconds, graphs),
        patched(sys, "argv", lambda _: argv),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        begin = time.perf_counter()
        main_pretrain.main()
        total = time.perf_counter() - begin
    lines = [json.loads(line) for line in (run_folder / LOG_FILE).read_text().splitlines()]
    training_lines = [line for line in lines if "images_per_second" in line]
    parts = summary(training_lines, images_per_update, seconds, total)
    return parts | {"compiled_later": compiled_graphs() - graphs[0]}


def summary(
    lines: list[dict[str, Any]], images_per_update: int, seconds: dict[str, float], total: float
) -> dict[str, float]:
    """Return the speed of a run, the seconds of its parts, its peak memory and its last loss.

    Args:
        lines: the log lines of training, in their order.
        seconds: the seconds of `saving`, `evaluation` and `epochs`.
        total: the seconds of the whole run.
    """
    steps = [line["step"] for line in lines]
    images = [images_per_update * (after - before) for before, after in itertools.pairwise([0, *steps])]
    spent = [n / line["images_per_second"] for n, line in zip(images, lines, strict=True)]
    waited = sum(share * line["data_wait"] for share, line in zip(spent, lines, strict=True))
    settled = slice(1 if len(lines) > 1 else 0, None)  # the first interval starts the data loader and compiles
    return {
        "images_per_second": sum(images[settled]) / sum(spent[settled]),
        "images_per_second_whole_run": sum(images) / total,
        "training": seconds["epochs"] - waited,
        "data wait": waited,
        "saving": seconds["saving"],
        "evaluation": seconds["evaluation"],
        "start": total - seconds["epochs"] - seconds["saving"] - seconds["evaluation"],
        "total": total,
        "memory_bytes": max(line["memory_bytes"] for line in lines),
        "loss": lines[-1]["loss"],
    }
