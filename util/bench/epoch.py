"""Whole runs of main_pretrain.py under the clock: how fast, and what of the time is no training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
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
from util.train import run as run_module
from util.train.monitor import Monitor

PARTS = ("training", "data wait", "saving", "evaluation", "start")


def run_variant(config: EpochConfig) -> dict[str, float]:
    """One run in a fresh process and a folder of its own below --output_dir, which is removed again."""
    parent = writable_folder(config.output_dir, "output_dir")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        return run_alone(timed_run, recipe_of(config), config.effective_batch, folder)


def recipe_of(config: EpochConfig) -> dict[str, Any]:
    """The settings of main_pretrain.py among these, as a recipe says them."""
    settings = {name: as_dict(config)[name] for name in (field.name for field in dataclasses.fields(PretrainConfig))}
    own = ("recipe", "output_dir", "log_dir", "resume", "auto_resume")
    return {name: value for name, value in settings.items() if value not in (None, "", []) and name not in own}


def timed_run(settings: dict[str, Any], images_per_update: int, folder: str) -> dict[str, float]:
    """main_pretrain.py with these settings: what `summary` says, and graphs compiled after the first update."""
    recipe = Path(folder) / "settings.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    program, run = main_pretrain.__file__, Path(folder) / "run"
    seconds = dict.fromkeys(("saving", "evaluation", "epochs"), 0.0)

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

    graphs: list[int] = []  # that torch.compile had made after each update

    def counts(update: Callable) -> Callable:
        def call(*args: Any) -> None:
            update(*args)
            graphs.append(compiled_graphs())

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(PretrainTrainer, "update", counts))
        stack.enter_context(patched(run_module, "save", adds_to("saving")))
        stack.enter_context(patched(run_module, "train_one_epoch", adds_to("epochs")))
        stack.enter_context(patched(Monitor, "evaluate", adds_to("evaluation")))
        argv = [program, "--recipe", str(recipe), "--output_dir", str(run)]
        stack.enter_context(patched(sys, "argv", lambda _: argv))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        begin = time.perf_counter()
        main_pretrain.main()
        total = time.perf_counter() - begin
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    found = summary([line for line in lines if "images_per_second" in line], images_per_update, seconds, total)
    return found | {"compiled_later": compiled_graphs() - graphs[0]}


def summary(
    lines: list[dict[str, Any]], images_per_update: int, seconds: dict[str, float], total: float
) -> dict[str, float]:
    """What the lines of a run's log and the seconds of its parts come to.

    Args:
        lines: those of training, in their order.
        seconds: of `saving`, `evaluation` and `epochs`.
        total: seconds of the whole run.
    """
    steps = [line["step"] for line in lines]
    images = [images_per_update * (after - before) for before, after in itertools.pairwise([0, *steps])]
    spent = [n / line["images_per_second"] for n, line in zip(images, lines, strict=True)]
    waited = sum(share * line["data_wait"] for share, line in zip(spent, lines, strict=True))
    settled = slice(1 if len(lines) > 1 else 0, None)  # the first interval starts loaders and compiles
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
