"""Evaluations between the epochs of a training: scores, a log line, pictures, files."""

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
    """The scores of an evaluation over all of its images, each counted once."""

    @property
    def values(self) -> dict[str, float]:
        """The numbers that are logged, by name."""


class Evaluation:
    """Evaluate a model every so often; a kind of training says how.

    Attributes:
        metric: the score by which the best checkpoint is chosen, in %; higher is better.
        every: epochs between two evaluations; 0: never. The end of a run always has one, unless 0.
        at_start: also evaluate before the first update.
    """

    metric: str
    every: int
    at_start = False

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.latest: Scores | None = None

    def evaluate(self) -> Scores:
        """Evaluate the model as it is now. A collective: the scores are those of the images of all ranks."""
        raise NotImplementedError

    def describe(self, scores: Scores) -> str:
        """Return the scores in one line."""
        raise NotImplementedError

    def draw(self, title: str, name: str, log: RunLog | None) -> None:
        """Draw pictures of the latest evaluation, on rank 0. Nothing is drawn unless a kind of training does."""

    def write_per_class(self, scores: Scores) -> str:
        """Write the files of --per_class, and return a line that says where they are; empty: none were asked for."""
        return ""

    def evaluate_epoch(self, epochs: int, log: RunLog, last: bool = False) -> float | None:
        """Evaluate and report after so many finished epochs; return the metric where this rank knows it."""
        trainer = self.trainer
        scores = self.latest = self.evaluate()
        metric = scores.values.get(self.metric)
        log.scalars(trainer.state.updates, scores.values, epoch=epochs)
        best = max((x for x in (metric, trainer.state.best_metric) if x is not None), default=None)
        best_so_far = "" if metric is None else f", best {best:.2f} %"
        log.text(f"after epoch {epochs}: {self.describe(scores)}{best_so_far}")
        if is_main():
            self.draw(f"after update {trainer.state.updates}: {self.describe(scores)}", f"{epochs:04d}", log)
            if last and (files := self.write_per_class(scores)):
                log.text(files)
        return metric

    def evaluate_alone(self, stage: str, origin: str) -> None:
        """Print and record the scores of a model that is not trained (--eval)."""
        trainer, begin = self.trainer, time.monotonic()
        scores = self.evaluate()
        if not is_main():
            return
        print(f"{origin}\n{self.describe(scores)}")
        self.draw(self.describe(scores), "eval", None)
        if files := self.write_per_class(scores):
            print(files)
        hardware, seconds = hardware_info(trainer.device, trainer.dtype), time.monotonic() - begin
        settings = as_dict(trainer.config)
        append_result(trainer.config.output_dir, f"{stage}-eval", settings, scores.values, seconds, hardware)

    def result(self) -> dict[str, float]:
        """Return the metrics of a finished run: the latest scores, and the best metric of the run."""
        return self.latest.values | {f"best_{self.metric}": self.trainer.state.best_metric}


def share_of_images(number: int, processes: Processes, dist_eval: bool) -> range:
    """Return which of `number` images this rank evaluates; without `dist_eval` rank 0 evaluates all of them."""
    if dist_eval:
        return range(number)[processes.rank :: processes.world_size]
    return range(number) if processes.rank == 0 else range(0)


def evaluation_loader(dataset: Dataset, trainer: Trainer, batch_size: int | None) -> Loader:
    """Return a loader of batches in the dataset's order, or (batch_size None) of one sample after the other."""
    config = trainer.config
    return Loader(
        dataset,
        batch_size=batch_size,
        num_workers=config.resolved_num_workers,
        pin_memory=config.pins(trainer.device),
        persistent_workers=config.resolved_num_workers > 0,
        loader_timeout=config.loader_timeout,
    )


def write_class_files(
    folder: str | Path, rows: Sequence[dict[str, Any]], confusion: np.ndarray, drawn: np.ndarray
) -> str:
    """Write per_class.json and the confusion matrix [K, K], as array and as picture; return a line that says where.

    Args:
        rows: the scores of each class, with its name under `class`.
        drawn: the numbers that the picture shows, [K, K].
    """
    folder = Path(folder)
    (folder / "per_class.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    np.save(folder / "confusion.npy", confusion)
    confusion_picture(drawn, [row["class"] for row in rows], folder / "confusion.png")
    return f"scores per class: {folder}/per_class.json, confusion matrix: {folder}/confusion.png and .npy"
