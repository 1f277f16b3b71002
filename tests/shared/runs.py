"""Folders of runs as the mains leave them, made without training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.figures.pictures import save_png
from util.results.results import append_result
from util.runtime.files import sha256_of
from util.runtime.logs import write_run_info
from util.weights.checkpoint import Manifest, write_manifest


def pretraining_lines(epochs: int, updates_per_epoch: int, every: int = 1, monitor_freq: int = 1) -> list[dict]:
    """Return lines of a log as a pre-training writes them, with noise that is always the same."""
    rng = np.random.default_rng(0)
    lines = [{"step": 0, "epoch": 0, "seconds": 0.5, "rankme": 3.0, "knn": 11.0}]
    for step in range(1, epochs * updates_per_epoch + 1):
        epoch = (step - 1) // updates_per_epoch
        if step % every == 0 or step % updates_per_epoch == 0:
            mim = 1 / math.sqrt(step) + 0.02 * float(rng.random())
            values = {"loss": 1.1 * mim, "mim": mim, "bc": 0.1 * mim, "grad_norm": 1.0, "lr": 1e-3 * step}
            values |= {"images_per_second": 100.0 + step % 7, "data_wait": 0.25, "memory_bytes": 2**30}
            lines.append({"step": step, "epoch": epoch, "seconds": 2.0 * step, **values})
        if step % (monitor_freq * updates_per_epoch) == 0:
            monitored = {"step": step, "epoch": epoch + 1, "seconds": 2.0 * step + 1}
            lines.append(monitored | {"rankme": 3.0 + epoch, "knn": 20.0 + epoch})
    return lines


def segmenting_lines(updates: int, per_epoch: int) -> list[dict]:
    """Return lines of a log as a segmentation of so many updates writes them."""
    lines = []
    for step in range(1, updates + 1):
        epoch = (step - 1) // per_epoch
        common = {"step": step, "epoch": epoch, "seconds": 2.0 * step}
        lines.append(common | {"loss": 1.4, "main": 1.0, "auxiliary": 1.0, "lr": 1e-4})
        if step % per_epoch == 0 or step == updates:
            lines.append(common | {"epoch": epoch + 1, "miou": 40.0 + epoch, "aacc": 80.0, "macc": 50.0})
    return lines


def write_run(
    folder: Path,
    lines: list[dict],
    config: dict | None = None,
    pictures: tuple[int, ...] = (),
    finished: dict | None = None,
    stage: str = "pretrain",
    command: str | None = None,
    **facts: object,
) -> Path:
    """Write a run's folder; `finished`: metrics of its result, None: still training; `facts`: more for run.json."""
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1)) if config is None else config
    command = f"/usr/bin/python3 main_{stage}.py --output_dir {folder}" if command is None else command
    facts = {"stage": stage, "recipe": config.get("recipe", ""), "command": command} | facts
    write_run_info(folder, config, **facts)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch in pictures:
        cells = np.full((40, 84, 3), 10 * epoch % 256, dtype=np.uint8)
        save_png(cells, folder / "pictures" / f"reconstruction-{epoch:04d}.png")
    if finished is not None:
        append_result(folder, stage, config, finished, 60.0, {})
    return folder


def complete(path: Path, epoch: int, step: int) -> Path:
    """Write the manifest beside a checkpoint."""
    with path.open("rb") as file:
        write_manifest(path, Manifest(sha256_of(file), path.stat().st_size, epoch, step, metric=None, time=0.0))
    return path
