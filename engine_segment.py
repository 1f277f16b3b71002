"""One update of a segmenter, and its evaluation by windows that slide over images of any size.

Letters: B images, C channels, H x W pixels of a crop or window, h x w of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_upernet import UperNet, resized
from util.config.segment import SegmentConfig
from util.data.decode import MUST_BE_READ
from util.data.joint_views import resized_image, scaled_size
from util.data.labelled import seed_generators
from util.data.masked_samples import MaskedBatch, WholeImages, load_pair
from util.data.masks import IGNORED
from util.data.views import Normalise, Size
from util.figures.figure import save_figure
from util.figures.pictures import drawable
from util.figures.segment_pictures import Predicted, as_array, segmentation_figure
from util.optim.schedules import polynomial_rate
from util.runtime.distributed import Processes, is_main, rank, sum_over_ranks
from util.runtime.logs import RunLog
from util.runtime.progress import progress
from util.train.evaluation import Evaluation, evaluation_loader, share_of_images, write_class_files
from util.train.plan import show_downstream_plan
from util.train.run import Run, train_and_evaluate
from util.train.segmentation import MaskedImages, train_dataset
from util.train.trainer import Trainer

MAX_LOGITS = 2**26  # that are held at an image's size at a time: 256 MiB


@dataclass
class SegmenterTrainer(Trainer):
    """Train the UperNet `state.model`. The schedule spans --max_updates, wherever in an epoch they end."""

    config: SegmentConfig
    normalise: Normalise | None = None

    @property
    def total_updates(self) -> int:
        """The optimiser steps of the whole run."""
        return self.config.max_updates

    def lr(self, updates: int) -> float:
        """Return the learning rate of the update that follows `updates` others."""
        config = self.config
        return polynomial_rate(
            updates, self.total_updates, config.warmup_updates, config.peak_lr, config.min_lr, config.power
        )

    def batch_to_device(self, batch: MaskedBatch) -> MaskedBatch:
        """Copy images, normalised there, and masks to the device."""
        images, masks = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.masks))
        return batch._replace(images=self.normalise(images), masks=masks)

    def update(self, batches: list[MaskedBatch]) -> None:
        """Take one optimiser step on the mean loss over `accum_iter` batches of equal size, on the device already."""
        state = self.state
        seed_generators(self.config.seed, state.updates, rank(), device=self.device)  # for stochastic depth and dropout
        self.begin_update()
        for i, batch in enumerate(batches):
            with self.gradients_stay_local(unless=i == len(batches) - 1), self.autocast():
                logits = self.model(batch.images)
            main, auxiliary = (pixel_loss(each, batch.masks) for each in logits)
            loss = main + self.config.auxiliary_weight * auxiliary
            state.scaler.scale(loss / len(batches)).backward()
            self.record(loss=loss, main=main, auxiliary=auxiliary)
        self.step_optimizer(batches)
        state.updates += 1


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy [] of logits [B, K, h, w] enlarged to the masks [B, H, W], summed and divided by B H W.

    Ignored pixels count as 0, as in mmsegmentation: parts of an update, and ranks, then weigh the same however many of
    their pixels are ignored.
    """
    logits = resized(logits.float(), masks.shape[-2:])
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum") / masks.numel()


# --------------------------------------------------------------------------------------------------------
# Prediction
# --------------------------------------------------------------------------------------------------------

Predict = Callable[[Tensor], Tensor]  # images [B, C, H, W] to logits [B, K, H, W]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin so that they cover `length` >= `window`: every `stride`, and one at the end."""
    return [*range(0, length - window, stride), length - window]


def slide(predict: Predict, image: Tensor, window: Size, stride: Size, batch_size: int) -> Tensor:
    """Return the mean logits [K, h, w] of all windows that cover a pixel.

    Args:
        image: normalised, [C, h, w], at least as large as the window.
        batch_size: the largest number of windows at a time.
    """
    size = image.shape[-2:]
    rows, columns = (window_starts(*each) for each in zip(size, window, stride, strict=True))
    windows = [(slice(y, y + window[0]), slice(x, x + window[1])) for y in rows for x in columns]
    total: Tensor | None = None
    count = image.new_zeros(size)
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size]
        logits = predict(torch.stack([image[:, y, x] for y, x in batch])).float()  # [B, K, H, W]
        if total is None:
            total = logits.new_zeros(logits.shape[1], *size)
        for (y, x), window_logits in zip(batch, logits, strict=True):
            total[:, y, x] += window_logits
            count[y, x] += 1
    return total / count


def image_logits(model: UperNet, image: Tensor, config: SegmentConfig) -> Tensor:
    """Return logits [K, h, w] of a normalised image [C, h, w] by --eval_mode, padded with the mean where need be."""
    h, w = image.shape[-2:]
    if config.eval_mode == "whole":
        bottom, right = (-side % config.resolved_patch_size for side in (h, w))
        logits = model.predict(F.pad(image, (0, right, 0, bottom)).unsqueeze(0))[0]
    else:
        bottom, right = (max(0, want - have) for want, have in zip(config.resolved_input_size, (h, w), strict=True))
        padded = F.pad(image, (0, right, 0, bottom))
        logits = slide(model.predict, padded, config.resolved_input_size, config.window_stride, config.batch_size)
    return logits[:, :h, :w]


def classes_at(logits: Tensor, size: Size) -> Tensor:
    """Return the class of each pixel, [H, W] int64, of logits [K, h, w] enlarged to `size`.

    Classes are compared in groups: 150 of them at the size of a large photograph would not fit on a GPU.
    """
    step = max(1, MAX_LOGITS // (size[0] * size[1]))
    best = classes = None
    for first in range(0, len(logits), step):
        value, place = resized(logits[None, first : first + step], size)[0].max(dim=0)
        if best is None:
            best, classes = value, place
        else:
            better = value > best
            best, classes = torch.where(better, value, best), torch.where(better, place + first, classes)
    return classes


# --------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------


class SegmentScores(NamedTuple):
    """Scores over the pixels of all images together; ignored ones do not count."""

    confusion: Tensor  # [K, K] int64 on the CPU: row: true class, column: predicted class
    images: int

    @property
    def iou(self) -> Tensor:
        """The intersection over union of each class in %, [K]; nan if a class neither occurs nor is predicted."""
        both = self.confusion.diagonal().double()
        return 100 * both / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - both)

    @property
    def accuracy(self) -> Tensor:
        """The accuracy of each class in %, [K]; nan where the images have none of it."""
        return 100 * self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    @property
    def values(self) -> dict[str, float]:
        """The numbers that are logged, in %: mean IoU, accuracy of all pixels, mean accuracy of the classes."""
        correct = 100 * self.confusion.diagonal().sum().double() / self.confusion.sum()
        means = {"miou": self.iou.nanmean(), "aacc": correct, "macc": self.accuracy.nanmean()}
        return {name: value.item() for name, value in means.items()}


def confusion_of(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (row) and predicted class (column), [K, K]; IGNORED ones do not count."""
    counted = truth != IGNORED
    pairs = truth[counted].long() * num_classes + prediction[counted]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def evaluate(
    model: UperNet,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    normalise: Normalise,
    config: SegmentConfig,
    device: torch.device,
    autocast: torch.autocast,
) -> SegmentScores:
    """Return the scores of a segmenter over the images of all ranks.

    Args:
        loader: yields an image, uint8 [C, h, w] as `predicted_classes` takes it, and its mask at its original size;
            each image is on one rank, and a rank may have none.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    for pixels, mask in loader:
        prediction = predicted_classes(model, pixels, tuple(mask.shape), normalise, config, device, autocast)
        confusion += confusion_of(mask.to(device, non_blocking=True), prediction, num_classes)
        images += 1
    return SegmentScores(sum_over_ranks(confusion).cpu(), int(sum_over_ranks(images)))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # images of any size: no compilation for each
def predicted_classes(
    model: UperNet,
    pixels: Tensor,
    size: Size,
    normalise: Normalise,
    config: SegmentConfig,
    device: torch.device,
    autocast: torch.autocast,
) -> Tensor:
    """Return the class of each pixel, [H, W] = `size`, of an image uint8 [C, h, w] that `scaled_size` has resized."""
    was_training = model.training
    model.eval()
    image = normalise(pixels.to(device, non_blocking=True))
    with autocast:
        logits = image_logits(model, image, config)
    model.train(was_training)
    return classes_at(logits, size)


def run_segmenter(run: Run, trainer: SegmenterTrainer, origin: str) -> None:
    """Train and evaluate a segmenter that has been built; with --eval or --dry_run do that alone.

    Args:
        origin: a line that says where the weights came from.
    """
    config, data = run.config, run.data
    dataset = None if data.train is None else train_dataset(config, data.train)
    if config.dry_run:
        show_downstream_plan(run, trainer, dataset, origin)
        return
    train_and_evaluate(run, trainer, dataset, SegmentEvaluation(trainer, data, run.processes), origin)


class SegmentEvaluation(Evaluation):
    """Evaluate the mean intersection over union on the validation images, and draw some of them."""

    metric = "miou"

    def __init__(self, trainer: SegmenterTrainer, data: MaskedImages, processes: Processes):
        super().__init__(trainer)
        config: SegmentConfig = trainer.config
        self.every = config.eval_freq
        self.data = data
        indices = share_of_images(len(data.val), processes, config.dist_eval)
        dataset = WholeImages(data.val, indices, config.resolved_input_size, config.in_chans, config.exif)
        self.loader = evaluation_loader(dataset, trainer, batch_size=None)
        self.examples: list[Predicted] = []  # of the latest evaluation

    def evaluate(self) -> SegmentScores:
        """Evaluate the segmenter; the scores are the same on all ranks."""
        trainer = self.trainer
        # ranks have different numbers of windows: none may wait for the others' weights
        model = trainer.state.unsharded(trainer.state.model, trainer.device)
        arguments = (trainer.normalise, trainer.config, trainer.device, trainer.autocast())
        loader = progress(self.loader, len(self.loader), "evaluating", "images") if is_main() else self.loader
        scores = evaluate(model, loader, self.data.num_classes, *arguments)
        if is_main():
            self.examples = [self.example(model, index) for index in self.example_indices]
        return scores

    @property
    def example_indices(self) -> list[int]:
        """Return the indices of the validation images that are drawn, spread evenly over all of them."""
        number = min(self.trainer.config.pictures, len(self.data.val))
        return np.linspace(0, len(self.data.val) - 1, number).round().astype(int).tolist()

    def example(self, model: UperNet, index: int) -> Predicted:
        """Return a validation image with its mask and the prediction."""
        trainer, val = self.trainer, self.data.val
        image, mask, _ = load_pair(val, index, trainer.config.in_chans, False, MUST_BE_READ, trainer.config.exif)
        pixels = resized_image(image, scaled_size(tuple(mask.shape), trainer.config.resolved_input_size))
        arguments = (trainer.normalise, trainer.config, trainer.device, trainer.autocast())
        prediction = predicted_classes(model, pixels, tuple(mask.shape), *arguments).cpu().to(torch.uint8)
        return Predicted(Path(val.name(index)).name, drawable(image / 255), mask.numpy(), prediction.numpy())

    def describe(self, scores: SegmentScores) -> str:
        """Return the scores in one line."""
        miou, aacc, macc = scores.values.values()
        return f"mIoU {miou:.2f} %, aAcc {aacc:.2f} %, mAcc {macc:.2f} % on {scores.images} images"

    def draw(self, title: str, name: str, log: RunLog | None) -> None:
        """Save the examples as pictures/segmentation-NAME.png."""
        if not self.examples:
            return
        figure = segmentation_figure(self.examples, self.data.val.classes.names, title)
        save_figure(figure, Path(self.trainer.config.output_dir) / "pictures" / f"segmentation-{name}.png")
        if log is not None:
            log.image(self.trainer.state.updates, "segmentation", as_array(figure))

    def write_per_class(self, scores: SegmentScores) -> str:
        """Write IoU, accuracy and the confusion matrix, drawn in % of the true class, if --per_class asks for them."""
        if not self.trainer.config.per_class:
            return ""
        confusion = scores.confusion.numpy()
        pixels = confusion.sum(axis=1)
        rows = [
            {"class": name, "pixels": int(number), "iou": rounded(iou), "accuracy": rounded(accuracy)}
            for name, number, iou, accuracy in zip(
                self.data.val.classes.names, pixels, scores.iou.tolist(), scores.accuracy.tolist(), strict=True
            )
        ]
        percent = (100 * confusion / np.maximum(pixels[:, None], 1)).round().astype(int)
        return write_class_files(self.trainer.config.output_dir, rows, confusion, percent)


def rounded(percent: float) -> float | None:
    """Round a score for JSON, which has no nan."""
    return None if percent != percent else round(percent, 4)
