"""One update of a classifier, and its evaluation: the same for fine-tuning and linear probing.

Letters: B images, C channels, H x W pixels, K classes, N images of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from util.config.classifier import ClassifierConfig
from util.data.cache import cache_images
from util.data.device_views import Normalise
from util.data.labelled import ClassifierDataset, LabelledBatch, LabelledDataset, seed_generators
from util.runtime.distributed import Processes, rank, sum_over_ranks
from util.runtime.sharding import local
from util.train.classification import LabelledImages, predict, train_dataset
from util.train.downstream import Prepared, show_plan, train_and_evaluate
from util.train.evaluation import Evaluation, evaluation_loader, share_of_images, write_per_class
from util.train.trainer import Trainer

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels [B] to mixed ones, targets [B, K]


@dataclass
class ClassifierTrainer(Trainer):
    """`state.model` is the classifier, `state.model_ema` the moving average of its weights or None."""

    config: ClassifierConfig
    mix: Mix | None = None  # Mixup and CutMix, which smooth the labels too
    smoothing: float = 0.0  # of the labels, without `mix`
    ema_decay: float = 0.0

    def batch_to_device(self, batch: LabelledBatch) -> LabelledBatch:
        """Images and labels."""
        images, labels = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.labels))
        return batch._replace(images=images, labels=labels)

    def update(self, batches: list[LabelledBatch]) -> None:
        """One optimiser step on the mean loss over `accum_iter` batches of equal size, on the device already."""
        state = self.state
        seed_generators(self.config.seed, state.updates, rank(), device=self.device)  # for stochastic depth and Mixup
        self.begin_update()
        for i, batch in enumerate(batches):
            images, targets = batch.images, batch.labels
            if self.mix is not None:
                images, targets = self.mix(images, targets)
            with self.gradients_stay_local(unless=i == len(batches) - 1), self.autocast():
                logits = self.model(images)  # [B, K]
            smoothing = self.smoothing if self.mix is None else 0.0
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            state.scaler.scale(loss / len(batches)).backward()
            self.record(loss=loss)
        taken = self.step_optimizer(batches)
        if taken and state.model_ema is not None:
            self.update_average()
        state.updates += 1

    def update_average(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        with torch.no_grad():
            mine, theirs = ([local(p) for p in m.parameters()] for m in (self.state.model_ema, self.state.model))
            get_ema_multi_avg_fn(self.ema_decay)(mine, theirs, None)


class Scores(NamedTuple):
    """Of all images together, each counted once."""

    loss: float  # mean cross-entropy
    top1: float  # %
    top5: float  # %, of the K best where there are fewer than five classes
    images: int  # N
    confusion: Tensor | None  # [K, K] int64 on the CPU: row the true class, column the one that was said

    @property
    def values(self) -> dict[str, float]:
        """What goes into a log."""
        return {"val_loss": self.loss, "top1": self.top1, "top5": self.top5}

    @property
    def per_class(self) -> Tensor:
        """[K] accuracy of each class in %, nan where the evaluation has none of it."""
        return 100 * self.confusion.diagonal().double() / self.confusion.sum(dim=1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # the last batch is short: no compilation for its sake
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    normalise: Normalise,
    num_classes: int,
    device: torch.device,
    autocast: torch.autocast,
    per_class: bool = False,
) -> Scores:
    """Scores of a classifier over the images of all ranks.

    `loader` yields uint8 images and labels; ranks hold disjoint parts, of any sizes, also none (or every image is
    on one of them). The sums travel, not the means, so that each image weighs the same. The confusion matrix is made
    with `per_class` alone: of 10,000 classes it takes 800 MB.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, correct in the first five, images
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device) if per_class else None
    for logits, labels in predict(model, loader, normalise, device, autocast):
        best = logits.topk(min(5, num_classes), dim=1).indices  # [B, 5]
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (best[:, 0] == labels).sum()
        sums[2] += (best == labels[:, None]).sum()
        sums[3] += len(labels)
        if confusion is not None:
            confusion.view(-1).index_add_(0, labels * num_classes + best[:, 0], torch.ones_like(labels))
    loss, correct, in_five, images = sum_over_ranks(sums).tolist()
    if confusion is not None:
        confusion = sum_over_ranks(confusion).cpu()
    return Scores(loss / images, 100 * correct / images, 100 * in_five / images, int(images), confusion)


def train_classifier(trainer: ClassifierTrainer, prepared: Prepared, stage: str, said: str) -> Scores | None:
    """The whole run of a classifier that has been built: resume, epochs, evaluations, result; or --eval alone.

    Args:
        stage: `finetune` or `linprobe`, for results.jsonl.
        said: where the weights came from, for the log.
    """
    config, data, order = prepared.config, prepared.data, prepared.order
    if config.dry_run:
        images = f"{order.num_samples} training, {len(data.val)} validation, {data.num_classes} classes"
        made = None if data.train is None else lambda: train_dataset(config, data.train)
        show_plan(trainer, images, order, made)
        return None

    def make_dataset() -> ClassifierDataset:
        images = data.train
        if config.cache == "ram":
            about = (config.in_chans, config.resolved_num_workers, config.loader_timeout)
            images = cache_images(images, *about, config.on_bad_image == "skip", exif=config.exif)
        return train_dataset(config, images)

    def make_evaluation() -> ClassifierEvaluation:
        return ClassifierEvaluation(trainer, data, prepared.processes)

    return train_and_evaluate(trainer, prepared, make_dataset, make_evaluation, stage, said)


class ClassifierEvaluation(Evaluation):
    """Accuracy on the validation images."""

    metric = "top1"

    def __init__(self, trainer: ClassifierTrainer, data: LabelledImages, processes: Processes):
        super().__init__(trainer)
        config: ClassifierConfig = trainer.config
        self.data = data
        indices = share_of_images(len(data.val), processes, config.dist_eval)
        dataset = LabelledDataset(data.val, indices, config.resolved_input_size, config.in_chans, exif=config.exif)
        self.loader = evaluation_loader(dataset, trainer, config.batch_size)
        self.normalise = Normalise(config.resolved_mean, config.resolved_std, trainer.device)

    def evaluate(self) -> Scores:
        """Of the moving average where there is one, else of the classifier; the same on all ranks."""
        trainer = self.trainer
        state, autocast = trainer.state, trainer.autocast()
        # ranks may have different numbers of batches: none may wait for the others' weights
        model = state.unsharded(state.model if state.model_ema is None else state.model_ema, trainer.device)
        about = (self.data.num_classes, trainer.device, autocast, trainer.config.per_class)
        return evaluate(model, self.loader, self.normalise, *about)

    def describe(self, scores: Scores) -> str:
        """The scores in one line."""
        accuracies = f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %"
        return f"{accuracies}, loss {scores.loss:.4f} on {scores.images} images"

    def write_classes(self, scores: Scores) -> str:
        """The accuracy per class and the confusion matrix."""
        names = self.data.val.class_names or [str(number) for number in range(len(scores.confusion))]
        images = scores.confusion.sum(dim=1).tolist()
        rows = [
            {"class": name, "images": number, "accuracy": None if number == 0 else round(accuracy, 4)}
            for name, number, accuracy in zip(names, images, scores.per_class.tolist(), strict=True)
        ]
        confusion = scores.confusion.numpy()
        return write_per_class(self.trainer.config.output_dir, rows, confusion, confusion)
