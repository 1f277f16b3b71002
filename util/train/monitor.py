"""What is watched while pre-training: a picture, kNN and linear-probe accuracy, and the rank of the features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models_lut import Student
from util.analysis.probe import extract_features, knn_accuracy, rankme, ridge_probe_accuracy
from util.data.device_views import Normalise
from util.data.formats import Exif
from util.data.labelled import labelled_loader
from util.data.sources import ImageSource
from util.data.views import Size
from util.figures.pictures import as_grid, reconstruction_cells, save_png
from util.runtime.logs import RunLog

PICTURES = 8  # rows of the reconstruction picture


@dataclass
class Monitor:
    """Looks at the student every so often, on one rank; the training images are seen without augmentation."""

    train: ImageSource
    val: ImageSource | None  # labelled, of the same classes; None: RankMe alone
    size: Size
    in_chans: int
    most_images: int
    normalise: Normalise
    output_dir: Path
    device: torch.device
    num_workers: int
    loader_timeout: float  # seconds to wait for a batch, 0: for ever
    skip_bad: bool  # as the training
    exif: Exif = "ignore"  # as the training

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than the training's: no compilation in between
    def look(self, student: Student, epoch: int, updates: int, log: RunLog) -> dict[str, float]:
        """Save the picture and return RankMe of the pooled features, and accuracies (%) where there are labels.

        There is no picture of a student without a decoder. `epoch` counts finished epochs.
        """
        was_training = student.training
        student.eval()
        if student.reconstructs:
            picture = self.picture(student)
            save_png(picture, self.output_dir / "pictures" / f"reconstruction-{epoch:04d}.png")
            log.image(updates, "reconstruction", picture)
        features, labels = self.features(student, self.train)
        values = {"rankme": rankme(features)}
        if self.val is not None:
            unseen = self.features(student, self.val)
            values["knn"] = knn_accuracy(features, labels, *unseen)
            values["linear"] = ridge_probe_accuracy(features, labels, *unseen)
        student.train(was_training)
        log.scalars(updates, values, epoch=epoch)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        log.text(f"after epoch {epoch}: {shown} (accuracies in %, RankMe of at most {student.embed_dim})")
        return values

    def features(self, student: Student, source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features [N, D] and labels [N] of at most `most_images` images."""
        about = (self.size, self.in_chans, self.num_workers, self.loader_timeout, self.skip_bad, self.exif)
        loader = labelled_loader(source, self.most_images, *about)
        return extract_features(lambda pixels: student.features(self.normalise(pixels.to(self.device))), loader)

    def picture(self, student: Student) -> np.ndarray:
        """Reconstructions of the same images with the same masks, each time."""
        about = (self.size, self.in_chans, 0, self.loader_timeout, self.skip_bad, self.exif)
        loader = labelled_loader(self.val or self.train, PICTURES, *about)
        images = self.normalise(next(iter(loader))[0].to(self.device))
        noise = torch.rand(len(images), student.num_patches, generator=torch.Generator().manual_seed(0))
        mask, prediction = student.reconstruct(images, noise.to(self.device))
        pixels = self.normalise.mean, self.normalise.std
        cells = reconstruction_cells(images, mask, prediction, student.patch_size, *pixels, student.norm_pix_loss)
        return as_grid(cells)
