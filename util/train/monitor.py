"""The evaluation of pre-training: a picture of reconstructions, kNN and linear-probe accuracy, the rank of features."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from models_lut import Student
from util.analysis.probe import extract_features, knn_accuracy, rankme, ridge_probe_accuracy
from util.config.pretrain import PretrainConfig
from util.data.datasets import find_validation
from util.data.labelled import labelled_loader
from util.data.sources import ImageSource, same_classes
from util.data.views import Normalise
from util.figures.pictures import RECONSTRUCTION_COLUMNS, as_grid, reconstruction_cells, save_png
from util.runtime.distributed import is_main
from util.runtime.logs import RunLog
from util.train.evaluation import Evaluation
from util.train.pretraining import TrainingImages
from util.train.trainer import Trainer

ROWS = 8  # of the picture


@dataclass(frozen=True)
class MonitorScores:
    """RankMe of the pooled features, and accuracies in % where there are labels; no values on ranks other than 0."""

    values: dict[str, float] = field(default_factory=dict)


class Monitor(Evaluation):
    """Evaluate the frozen student on rank 0. Training images are read without augmentation.

    A stream cannot be read twice the same: it gets no scores.

    Args:
        trainer: whose state holds the student.
        data: the training images, and with --holdout those that are held out.
        normalise: makes the student's input of uint8 pixels on the device.
    """

    metric = "knn"

    def __init__(self, trainer: Trainer, data: TrainingImages, normalise: Normalise):
        super().__init__(trainer)
        self.config: PretrainConfig = trainer.config
        self.every = self.config.monitor_freq
        self.at_start = self.every > 0
        self.train = None if isinstance(data.train, IterableDataset) else data.train
        self.held_out = data.held_out
        self.normalise = normalise
        self.picture: np.ndarray | None = None  # uint8 [height, width, 3], of the latest evaluation

    @cached_property
    def val(self) -> ImageSource | None:
        """The labelled validation images of the training images' classes; None, logged once, if there are none."""
        config = self.config
        if self.held_out is not None:
            return self.held_out
        val = find_validation(config.data_path, config.dataset, config.val_path)
        if val is None and config.val_path:
            print(f"no kNN accuracy: --val_path {config.val_path} has no labels of two classes", flush=True)
        if val is not None and not same_classes(self.train, val):
            print("no kNN accuracy: the classes of the training and the validation images differ", flush=True)
            return None
        return val

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than the training's: no compilation in between
    def evaluate(self) -> MonitorScores:
        """Return the scores of the student as it is now, and keep a picture of its reconstructions."""
        trainer = self.trainer
        evaluates = is_main() and self.train is not None
        student = trainer.state.unsharded(trainer.state.model, trainer.device, keep=evaluates)
        if not evaluates:
            return MonitorScores()
        was_training = student.training
        student.eval()
        if student.reconstructs:  # a student without a decoder does not
            self.picture = self.reconstructions(student)
        features, labels = self.features(student, self.train)
        values = {"rankme": rankme(features)}
        if self.val is not None:
            val_features, val_labels = self.features(student, self.val)
            values["knn"] = knn_accuracy(features, labels, val_features, val_labels)
            values["linear"] = ridge_probe_accuracy(features, labels, val_features, val_labels)
        student.train(was_training)
        return MonitorScores(values)

    def features(self, student: Student, source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pooled features [N, D] and labels [N] of at most --monitor_images images."""
        loader = self.loader(source, self.config.monitor_images, self.config.resolved_num_workers)
        device = self.trainer.device
        return extract_features(lambda pixels: student.features(self.normalise(pixels.to(device))), loader)

    def loader(self, source: ImageSource, most: int, num_workers: int) -> torch.utils.data.DataLoader:
        """Return centre views and labels of at most `most` images, always the same ones."""
        config = self.config
        return labelled_loader(
            source,
            most,
            size=config.resolved_input_size,
            in_chans=config.in_chans,
            num_workers=num_workers,
            loader_timeout=config.loader_timeout,
            skip_bad=config.on_bad_image == "skip",
            exif=config.exif,
        )

    def reconstructions(self, student: Student) -> np.ndarray:
        """Return a picture of the same images with the same masks each time: uint8 [height, width, 3]."""
        device = self.trainer.device
        loader = self.loader(self.val or self.train, ROWS, num_workers=0)
        images = self.normalise(next(iter(loader))[0].to(device))
        noise = torch.rand(len(images), student.num_patches, generator=torch.Generator().manual_seed(0))
        mask, prediction = student.reconstruct(images, noise.to(device))
        mean, std = self.normalise.mean, self.normalise.std
        cells = reconstruction_cells(images, mask, prediction, student.patch_size, mean, std, student.norm_pix_loss)
        return as_grid(cells, RECONSTRUCTION_COLUMNS)

    def describe(self, scores: MonitorScores) -> str:
        """Return the scores in one line."""
        if not scores.values:
            return "no scores of a stream"
        numbers = "  ".join(f"{name} {value:.2f}" for name, value in scores.values.items())
        return f"{numbers} (accuracies in %, RankMe of at most {self.trainer.state.model.embed_dim})"

    def draw(self, title: str, name: str, log: RunLog | None) -> None:
        """Save the picture as pictures/reconstruction-NAME.png."""
        if self.picture is None:
            return
        save_png(self.picture, Path(self.config.output_dir) / "pictures" / f"reconstruction-{name}.png")
        if log is not None:
            log.image(self.trainer.state.updates, "reconstruction", self.picture)

    def result(self) -> dict[str, float]:
        """Return the means of the last log line, and the latest scores."""
        return self.trainer.means | (self.latest.values if self.latest else {})
