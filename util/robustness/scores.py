"""What a classifier says of each image, and the scores of Table 5's columns.

Letters: N images of a pass, B of a batch, C channels, H x W pixels, K classes that compete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.utils.data import Dataset

from util.config.groups import DataConfig
from util.data.decode import load_image
from util.data.device_views import Normalise
from util.data.formats import Exif
from util.data.loader import Loader
from util.data.sources import ImageSource
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
BAD = -1  # instead of the place of an image that could not be read

# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


@dataclass
class PlacedImages(Dataset):
    """uint8 views of some images of a source, each with its place among them; BAD where an image is left out."""

    source: ImageSource
    places: Sequence[int]  # in the source
    share: Sequence[int]  # of `places`, this rank's
    view: View
    in_chans: int
    skip_bad: bool
    size: tuple[int, int]
    exif: Exif = "ignore"

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        place = self.share[number]
        index = self.places[place]
        try:
            image, _ = load_image(self.source, index, self.in_chans, skip_bad=False, exif=self.exif)
            return self.seen(image, index), place
        except UserError:
            if not self.skip_bad:
                raise
            return torch.zeros(self.in_chans, *self.size, dtype=torch.uint8), BAD

    def seen(self, image: Tensor, index: int) -> Tensor:
        """The view; UserError with the image's name where there is none."""
        try:
            return self.view(image)
        except ValueError as error:
            raise UserError(f"{self.source.name(index)}: cannot be used ({error}); or --on_bad_image skip") from error


@dataclass(frozen=True)
class WithoutCentre:
    """uint8 pixels [B, C, H, W] to the model's input, without the rectangle in the middle."""

    normalise: Normalise
    share: float  # of each side
    fill: Fill  # mean: zero for the model; black: zero before normalisation

    def __call__(self, pixels: Tensor) -> Tensor:
        images = self.normalise(pixels)
        h, w = (round(side * self.share) for side in images.shape[-2:])
        top, left = (images.shape[-2] - h) // 2, (images.shape[-1] - w) // 2
        nothing = -self.normalise.shift / self.normalise.scale if self.fill == "black" else 0.0
        images[..., top : top + h, left : left + w] = nothing
        return images


# --------------------------------------------------------------------------------------------------------
# A pass over images
# --------------------------------------------------------------------------------------------------------


class Records(NamedTuple):
    """What was said of N images, on the CPU; the same on all ranks."""

    best: Tensor  # [N, 5] int64: classes of ImageNet, the most likely first
    confidence: Tensor  # [N] float64: largest softmax probability among the classes that compete
    seen: Tensor  # [N] bool: false for images that could not be read

    def of(self, rows: Sequence[int]) -> Records:
        """Those of some of the images."""
        return Records(*(x[torch.as_tensor(rows, dtype=torch.int64)] for x in self))


class Example(NamedTuple):
    """An image as the model sees it, and what it says of it."""

    image: np.ndarray  # uint8 [H, W, 3]
    said: int  # class of ImageNet
    right: Answer


@dataclass(frozen=True)
class Look:
    """How the images of all passes are looked at."""

    processes: Processes
    dtype: torch.dtype | None  # of autocast; None: fp32
    batch_size: int
    loading: DataConfig  # loader processes, bad images
    occlusion: float
    fill: Fill

    def autocast(self) -> torch.autocast:
        """For a forward pass."""
        return torch.autocast(self.processes.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def look_at(classifier: NamedClassifier, task: Task, places: Sequence[int], look: Look, title: str) -> Records:
    """What the classifier says of the images at `places` of the task's source, seen as the task says.

    Each image is looked at once, by one of the ranks.
    """
    processes, device = look.processes, look.processes.device
    share = share_of_images(len(places), processes, dist_eval=True)
    loader = Loader(
        images_of(classifier, task, places, share, look),
        batch_size=look.batch_size,
        num_workers=look.loading.resolved_num_workers,
        pin_memory=look.loading.pins(device),
        loader_timeout=look.loading.loader_timeout,
    )
    batches = progress(loader, len(share), title, "images", lambda batch: len(batch[1])) if is_main() else loader
    prepare = input_of(classifier, task, look)
    classes = torch.tensor(task.classes or range(NUM_CLASSES), device=device)
    best = torch.zeros(len(places), 5, dtype=torch.int64, device=device)
    confidence = torch.zeros(len(places), dtype=torch.float64, device=device)
    seen = torch.zeros(len(places), dtype=torch.int64, device=device)
    for logits, numbers in predict(classifier.model, batches, prepare, device, look.autocast()):
        logits, numbers = logits[numbers != BAD][:, classes], numbers[numbers != BAD]
        best[numbers] = classes[logits.topk(5, dim=1).indices]
        confidence[numbers] = logits.double().softmax(dim=1).amax(dim=1)
        seen[numbers] = 1
    best, confidence, seen = (sum_over_ranks(x).cpu() for x in (best, confidence, seen))  # others hold zeros
    return Records(best, confidence, seen.bool())


def images_of(
    classifier: NamedClassifier, task: Task, places: Sequence[int], share: Sequence[int], look: Look
) -> PlacedImages:
    """The images at `places` of the task's source, of which `share` are this rank's."""
    view = partial(without_border, view=classifier.view, border=task.border) if task.border else classifier.view
    skips, exif = look.loading.on_bad_image == "skip", look.loading.exif
    return PlacedImages(task.source, places, share, view, classifier.in_chans, skips, classifier.size, exif)


def input_of(classifier: NamedClassifier, task: Task, look: Look) -> Callable[[Tensor], Tensor]:
    """What makes the model's input of uint8 pixels on its device."""
    if task.occluded:
        return WithoutCentre(classifier.normalise, look.occlusion, look.fill)
    return classifier.normalise


def examples(classifier: NamedClassifier, task: Task, number: int, look: Look) -> list[Example]:
    """Some of the task's images, evenly over all of them, as the model sees them; without those that are left out."""
    chosen = np.unique(np.linspace(0, len(task.places) - 1, number).round().astype(int)).tolist()
    dataset = images_of(classifier, task, [task.places[i] for i in chosen], range(len(chosen)), look)
    found = [(*dataset[i], task.answers[chosen[i]]) for i in range(len(chosen))]
    found = [(pixels, answer) for pixels, place, answer in found if place != BAD]
    if not found:
        return []
    pixels, prepare = torch.stack([pixels for pixels, _ in found]), input_of(classifier, task, look)
    classes = torch.tensor(task.classes or range(NUM_CLASSES))
    loader = [(pixels, torch.zeros(len(found)))]
    ((logits, _),) = predict(classifier.model, loader, prepare, look.processes.device, look.autocast())
    said = classes[logits.cpu()[:, classes].argmax(dim=1)].tolist()
    seen = colours(prepare(pixels.to(look.processes.device)).cpu(), classifier.normalise.mean, classifier.normalise.std)
    return [Example(image, best, answer) for image, best, (_, answer) in zip(drawable(seen), said, found, strict=True)]


def in_passes(tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks, those together that the same forward passes serve, in the order of the first of each."""
    passes: dict[tuple, list[Task]] = {}
    for task in tasks:
        passes.setdefault(task.pass_key, []).append(task)
    return list(passes.values())


def places_of(tasks: Sequence[Task]) -> list[int]:
    """The images that one or another of the tasks needs."""
    return sorted({place for task in tasks for place in task.places})


def scores_of_pass(
    classifier: NamedClassifier, tasks: Sequence[Task], look: Look, title: str
) -> Iterator[tuple[Task, dict[str, float]]]:
    """The metrics of tasks that one pass serves."""
    places = places_of(tasks)
    records = look_at(classifier, tasks[0], places, look, title)
    row = {place: i for i, place in enumerate(places)}
    for task in tasks:
        yield task, score(task, records.of([row[place] for place in task.places]))


# --------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------


def score(task: Task, records: Records) -> dict[str, float]:
    """Metrics in %, the one of Table 5 first, and counts of images.

    Raises:
        UserError: no image could be read.
    """
    bad = int((~records.seen).sum())
    answers = [answer for answer, seen in zip(task.answers, records.seen.tolist(), strict=True) if seen]
    if not answers or (task.key == "o" and len({bool(answer) for answer in answers}) < 2):
        raise UserError(f"--on_bad_image skip: nothing of {task.key} is left, {bad} images could not be read")
    records = records.of(records.seen.nonzero()[:, 0])
    if task.key == "o":
        found = outlier_scores(np.array([not answer for answer in answers]), records.confidence.numpy())
    else:
        found = accuracies(answers, records.best)
    return {**found, "images": len(answers), "bad_images": bad}


def accuracies(answers: Sequence[Answer], best: Tensor) -> dict[str, float]:
    """Share of images one of whose right classes is the best [N, 5], or among the best five."""
    widest = max(map(len, answers))
    right = torch.tensor([(*answer, *(answer[:1] * (widest - len(answer)))) for answer in answers])  # [N, widest]
    hits = (best[:, :, None] == right[:, None, :]).any(dim=2)  # [N, 5]
    return {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(dim=1).double().mean().item()}


def outlier_scores(is_outlier: np.ndarray, confidence: np.ndarray) -> dict[str, float]:
    """How well low confidence tells outliers: AUPR with outliers as the positive class (Hendrycks et al. 2021)."""
    return {
        "aupr": 100 * float(average_precision_score(is_outlier, -confidence)),
        "auroc": 100 * float(roc_auc_score(is_outlier, -confidence)),
    }
