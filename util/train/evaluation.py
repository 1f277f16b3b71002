"""Evaluation between the epochs of a training: scores, log line, pictures, files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from util.config.groups import as_dict
from util.data.loader import Loader
from util.figures.pictures import confusion_picture
from util.results.results import append_result, hardware_info
from util.runtime.distributed import Processes, is_main
from util.runtime.logs import RunLog
from util.train.trainer import Trainer


class Scores(Protocol):
    """Of all images together, each counted once."""

    @property
    def values(self) -> dict[str, float]:
        """What goes into a log."""


class Evaluation:
    """The validation images, and what is made of the scores on them; a kind of training says how they are got."""

    metric: str  # among the scores' values, by which the best checkpoint is chosen; in %

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.latest: Scores | None = None

    def evaluate(self) -> Scores:
        """Of the model as it stands; the same on all ranks, a collective."""
        raise NotImplementedError

    def describe(self, scores: Scores) -> str:
        """The scores in one line."""
        raise NotImplementedError

    def write_classes(self, scores: Scores) -> str:
        """Files for --per_class; what to say of them."""
        raise NotImplementedError

    def draw(self, title: str, name: str, log: RunLog | None) -> None:
        """Pictures, on rank 0; a kind of training that has none draws none."""

    def scores(self) -> Scores:
        """`evaluate`, remembered."""
        self.latest = self.evaluate()
        return self.latest

    def report(self, scores: Scores, epochs: int, best: float, log: RunLog, last: bool) -> None:
        """A line of log, pictures, and at the end what --per_class asks for."""
        log.scalars(self.trainer.state.updates, scores.values, epoch=epochs)
        log.text(f"after epoch {epochs}: {self.describe(scores)}, best {best:.2f} %")
        if not is_main():
            return
        self.draw(f"after update {self.trainer.state.updates}: {self.describe(scores)}", f"{epochs:04d}", log)
        if last and self.trainer.config.per_class:
            log.text(self.write_classes(scores))

    def alone(self, stage: str, said: str) -> Scores:
        """--eval: print and record the scores."""
        config = self.trainer.config
        begin = time.monotonic()
        scores = self.scores()
        if is_main():
            print(f"{said}\n{self.describe(scores)}")
            self.draw(self.describe(scores), "eval", None)
            if config.per_class:
                print(self.write_classes(scores))
            about, seconds = hardware_info(self.trainer.device, self.trainer.dtype), time.monotonic() - begin
            append_result(config.output_dir, f"{stage}-eval", as_dict(config), scores.values, seconds, about)
        return scores


def share_of_images(number: int, processes: Processes, dist_eval: bool) -> range:
    """Which of `number` images this rank evaluates; without `dist_eval` rank 0 all of them."""
    if dist_eval:
        return range(number)[processes.rank :: processes.world_size]
    return range(number) if processes.rank == 0 else range(0)


def evaluation_loader(dataset: Dataset, trainer: Trainer, batch_size: int | None) -> Loader:
    """Batches of what is evaluated, or (None) one sample after the other."""
    config = trainer.config
    return Loader(
        dataset,
        batch_size=batch_size,
        num_workers=config.resolved_num_workers,
        pin_memory=config.pins(trainer.device),
        persistent_workers=config.resolved_num_workers > 0,
        loader_timeout=config.loader_timeout,
    )


def write_per_class(
    folder: str | Path, rows: Sequence[dict[str, Any]], confusion: np.ndarray, shown: np.ndarray
) -> str:
    """per_class.json, and the confusion matrix [K, K] as array and, in the numbers `shown`, as picture; say where."""
    folder = Path(folder)
    (folder / "per_class.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    np.save(folder / "confusion.npy", confusion)
    confusion_picture(shown, [row["class"] for row in rows], folder / "confusion.png")
    return f"scores per class: {folder}/per_class.json, confusion matrix: {folder}/confusion.png and .npy"
