"""A classifier's predictions for the images of a pass, and the scores of Table 5's columns.

Letters: N images of a pass, B of a batch, C channels, H x W pixels, K classes that compete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.config.groups import DataConfig
from util.data.decode import load_image
from util.data.formats import Exif
from util.data.loader import Loader
from util.data.sources import ImageSource
from util.data.views import Normalise
from util.figures.pictures import colours, drawable
from util.robustness.imagenet import NUM_CLASSES, Answer
from util.robustness.sets import Task
from util.runtime.distributed import Processes, is_main, sum_over_ranks
from util.runtime.errors import UserError
from util.runtime.progress import progress
from util.train.classification import predict
from util.train.evaluation import share_of_images
from util.weights.classifiers import NamedClassifier, View, without_border

Fill = Literal["mean", "black"]
UNREADABLE = -1  # position of an image that could not be read

# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


@dataclass
class PassImages(Dataset):
    """The images of a pass: uint8 views [C, H, W], each with its position in the pass, or UNREADABLE."""

    source: ImageSource
    indices: Sequence[int]  # of the pass's images in the source
    share: Sequence[int]  # positions in `indices` that this rank evaluates
    view: View
    in_chans: int
    skip_unreadable: bool
    size: tuple[int, int]
    exif: Exif = "ignore"

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        position = self.share[number]
        index = self.indices[position]
        try:
            image, _ = load_image(self.source, index, self.in_chans, skip_bad=False, exif=self.exif)
            return self.view_of(image, index), position
        except UserError:
            if not self.skip_unreadable:
                raise
            return torch.zeros(self.in_chans, *self.size, dtype=torch.uint8), UNREADABLE

    def view_of(self, image: Tensor, index: int) -> Tensor:
        """Return the view of an image; UserError with its name if it has none."""
        try:
            return self.view(image)
        except ValueError as error:
            raise UserError(f"{self.source.name(index)}: cannot be used ({error}); add --on_bad_image skip") from error


@dataclass(frozen=True)
class OccludeCentre:
    """Normalise uint8 pixels [B, C, H, W] and cover the rectangle in the middle."""

    normalise: Normalise
    share: float  # of each side
    fill: Fill  # mean: zero after normalisation; black: zero before it

    def __call__(self, pixels: Tensor) -> Tensor:
        images = self.normalise(pixels)
        h, w = (round(side * self.share) for side in images.shape[-2:])
        top, left = (images.shape[-2] - h) // 2, (images.shape[-1] - w) // 2
        covered = -self.normalise.shift / self.normalise.scale if self.fill == "black" else 0.0
        images[..., top : top + h, left : left + w] = covered
        return images


# --------------------------------------------------------------------------------------------------------
# A pass over images
# --------------------------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """The predictions for N images, on the CPU; the same on all ranks."""

    top5: Tensor  # [N, 5] int64: classes of ImageNet, the most likely first
    confidence: Tensor  # [N] float64: largest softmax probability among the classes that compete
    readable: Tensor  # [N] bool

    def select(self, rows: Sequence[int] | Tensor) -> Predictions:
        """Return the predictions for some of the images."""
        return Predictions(*(x[torch.as_tensor(rows, dtype=torch.int64)] for x in self))


class Example(NamedTuple):
    """An image as the model sees it, and its prediction."""

    image: np.ndarray  # uint8 [H, W, 3]
    predicted: int  # class of ImageNet
    answer: Answer


@dataclass(frozen=True)
class PassSettings:
    """The settings of all passes over images."""

    processes: Processes
    dtype: torch.dtype | None  # of autocast; None: fp32
    batch_size: int
    loading: DataConfig  # loader workers, unreadable images
    occlusion: float
    fill: Fill

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.processes.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def classify(
    classifier: NamedClassifier, task: Task, indices: Sequence[int], settings: PassSettings, title: str
) -> Predictions:
    """Return the predictions for the images of the task's source at `indices`, shown as the task asks.

    Each image is evaluated once, by one of the ranks.
    """
    processes, device = settings.processes, settings.processes.device
    share = share_of_images(len(indices), processes, dist_eval=True)
    loader = Loader(
        pass_images(classifier, task, indices, share, settings),
        batch_size=settings.batch_size,
        num_workers=settings.loading.resolved_num_workers,
        pin_memory=settings.loading.pins(device),
        loader_timeout=settings.loading.loader_timeout,
    )
    batches = progress(loader, len(share), title, "images", lambda batch: len(batch[1])) if is_main() else loader
    prepare = input_transform(classifier, task, settings)
    classes = torch.tensor(task.classes or range(NUM_CLASSES), device=device)
    top5 = torch.zeros(len(indices), 5, dtype=torch.int64, device=device)
    confidence = torch.zeros(len(indices), dtype=torch.float64, device=device)
    readable = torch.zeros(len(indices), dtype=torch.int64, device=device)
    for logits, positions in predict(classifier.model, batches, prepare, device, settings.autocast()):
        logits, positions = logits[positions != UNREADABLE][:, classes], positions[positions != UNREADABLE]  # [B, K]
        top5[positions] = classes[logits.topk(5, dim=1).indices]
        confidence[positions] = logits.double().softmax(dim=1).amax(dim=1)
        readable[positions] = 1
    # each image has zeros on all ranks but one
    top5, confidence, readable = (sum_over_ranks(x).cpu() for x in (top5, confidence, readable))
    return Predictions(top5, confidence, readable.bool())


def pass_images(
    classifier: NamedClassifier, task: Task, indices: Sequence[int], share: Sequence[int], settings: PassSettings
) -> PassImages:
    """Return the images of the task's source at `indices`; `share`: positions that this rank evaluates."""
    view = partial(without_border, view=classifier.view, border=task.border) if task.border else classifier.view
    skip_unreadable = settings.loading.on_bad_image == "skip"
    chans, size, exif = classifier.in_chans, classifier.size, settings.loading.exif
    return PassImages(task.source, indices, share, view, chans, skip_unreadable, size, exif)


def input_transform(classifier: NamedClassifier, task: Task, settings: PassSettings) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 pixels on the device to the model's input."""
    if task.occluded:
        return OccludeCentre(classifier.normalise, settings.occlusion, settings.fill)
    return classifier.normalise


def evaluate_pass(
    classifier: NamedClassifier, tasks: Sequence[Task], settings: PassSettings, title: str
) -> Iterator[tuple[Task, dict[str, float]]]:
    """Yield the metrics of each task of a pass."""
    indices = indices_of(tasks)
    predictions = classify(classifier, tasks[0], indices, settings, title)
    row = {index: i for i, index in enumerate(indices)}
    for task in tasks:
        yield task, score(task, predictions.select([row[index] for index in task.indices]))


def group_by_pass(tasks: Sequence[Task]) -> list[list[Task]]:
    """Return groups of tasks that share their forward passes, in the order of each group's first task."""
    passes: dict[tuple, list[Task]] = {}
    for task in tasks:
        passes.setdefault(task.pass_key, []).append(task)
    return list(passes.values())


def indices_of(tasks: Sequence[Task]) -> list[int]:
    """Return the indices of the images that one or another of the tasks needs."""
    return sorted({index for task in tasks for index in task.indices})


def examples_of(classifier: NamedClassifier, task: Task, number: int, settings: PassSettings) -> list[Example]:
    """Return some of the task's readable images, evenly spread over all, as the model sees them."""
    chosen = np.unique(np.linspace(0, len(task.indices) - 1, number).round().astype(int)).tolist()
    dataset = pass_images(classifier, task, [task.indices[i] for i in chosen], range(len(chosen)), settings)
    items = [(*dataset[i], task.answers[chosen[i]]) for i in range(len(chosen))]
    items = [(pixels, answer) for pixels, position, answer in items if position != UNREADABLE]
    if not items:
        return []
    pixels, prepare = torch.stack([pixels for pixels, _ in items]), input_transform(classifier, task, settings)
    classes = torch.tensor(task.classes or range(NUM_CLASSES))
    batches, device = [(pixels, torch.zeros(len(items)))], settings.processes.device
    ((logits, _),) = predict(classifier.model, batches, prepare, device, settings.autocast())
    predicted = classes[logits.cpu()[:, classes].argmax(dim=1)].tolist()
    images = colours(prepare(pixels.to(device)).cpu(), classifier.normalise.mean, classifier.normalise.std)
    answers = [answer for _, answer in items]
    return [Example(*example) for example in zip(drawable(images), predicted, answers, strict=True)]


# --------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------


def score(task: Task, predictions: Predictions) -> dict[str, float]:
    """Return metrics in %, Table 5's first, and the numbers of readable and unreadable images.

    Raises:
        UserError: no image could be read, or none of the outliers or of the inliers of IN-O.
    """
    unreadable = int((~predictions.readable).sum())
    answers = [answer for answer, ok in zip(task.answers, predictions.readable.tolist(), strict=True) if ok]
    if not answers or (task.key == "o" and len({bool(answer) for answer in answers}) < 2):
        raise UserError(f"--on_bad_image skip: nothing of {task.key} is left, {unreadable} images could not be read")
    predictions = predictions.select(predictions.readable.nonzero()[:, 0])
    if task.key == "o":
        metrics = outlier_scores(np.array([not answer for answer in answers]), predictions.confidence.numpy())
    else:
        metrics = accuracies(answers, predictions.top5)
    return {**metrics, "images": len(answers), "bad_images": unreadable}


def accuracies(answers: Sequence[Answer], top5: Tensor) -> dict[str, float]:
    """Return top-1 and top-5 in %: the share of images with a correct class first, or anywhere, in top5 [N, 5]."""
    most = max(map(len, answers))
    correct = torch.tensor([(*answer, *(answer[:1] * (most - len(answer)))) for answer in answers])  # [N, most]
    hits = (top5[:, :, None] == correct[:, None, :]).any(dim=2)  # [N, 5]
    return {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(dim=1).double().mean().item()}


def outlier_scores(is_outlier: np.ndarray, confidence: np.ndarray) -> dict[str, float]:
    """Return AUPR, with outliers as the positive class, and AUROC in % of low confidence (Hendrycks et al. 2021)."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    return {
        "aupr": 100 * float(average_precision_score(is_outlier, -confidence)),
        "auroc": 100 * float(roc_auc_score(is_outlier, -confidence)),
    }
