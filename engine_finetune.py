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
from util.data.labelled import LabelledBatch, LabelledDataset, seed_generators
from util.data.views import Normalise
from util.runtime.distributed import Processes, rank, sum_over_ranks
from util.runtime.sharding import local
from util.train.classification import LabelledImages, cached, predict, train_dataset
from util.train.evaluation import Evaluation, evaluation_loader, share_of_images, write_class_files
from util.train.plan import show_downstream_plan
from util.train.run import Run, train_and_evaluate
from util.train.trainer import Trainer

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels [B] to mixed ones, targets [B, K]


@dataclass
class ClassifierTrainer(Trainer):
    """Train the classifier `state.model`, and keep the EMA of its weights `state.model_ema` where there is one."""

    config: ClassifierConfig
    mix: Mix | None = None  # Mixup and CutMix, which smooth the labels too
    smoothing: float = 0.0  # of the labels, without `mix`
    ema_decay: float = 0.0

    def batch_to_device(self, batch: LabelledBatch) -> LabelledBatch:
        """Copy images and labels to the device."""
        images, labels = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.labels))
        return batch._replace(images=images, labels=labels)

    def update(self, batches: list[LabelledBatch]) -> None:
        """Take one optimiser step on the mean loss over `accum_iter` batches of equal size, on the device already."""
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
            self.update_ema()
        state.updates += 1

    def update_ema(self) -> None:
        """Update the EMA: average <- decay * average + (1 - decay) * weights."""
        with torch.no_grad():
            averages, weights = ([local(p) for p in m.parameters()] for m in (self.state.model_ema, self.state.model))
            get_ema_multi_avg_fn(self.ema_decay)(averages, weights, None)


class Scores(NamedTuple):
    """Scores over all images, each counted once."""

    loss: float  # mean cross-entropy
    top1: float  # %
    top5: float  # %; with fewer than five classes among the K best
    images: int  # N
    confusion: Tensor | None  # [K, K] int64 on the CPU: row: true class, column: predicted class

    @property
    def values(self) -> dict[str, float]:
        """The numbers that are logged, by name."""
        return {"val_loss": self.loss, "top1": self.top1, "top5": self.top5}

    @property
    def per_class(self) -> Tensor:
        """The accuracy of each class in %, [K]; nan where the images have none of it."""
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
    """Return the scores of a classifier over the images of all ranks.

    Ranks exchange sums, not means, so that each image weighs the same.

    Args:
        loader: yields uint8 images [B, C, H, W] and labels [B]; each image is on one rank, and a rank may have none.
        per_class: also count the confusion matrix, which takes 800 MB for 10,000 classes.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, correct among the best five, images
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device) if per_class else None
    for logits, labels in predict(model, loader, normalise, device, autocast):
        best = logits.topk(min(5, num_classes), dim=1).indices  # [B, 5]
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (best[:, 0] == labels).sum()
        sums[2] += (best == labels[:, None]).sum()
        sums[3] += len(labels)
        if confusion is not None:
            confusion.view(-1).index_add_(0, labels * num_classes + best[:, 0], torch.ones_like(labels))
    loss, correct, correct_in_five, images = sum_over_ranks(sums).tolist()
    if confusion is not None:
        confusion = sum_over_ranks(confusion).cpu()
    return Scores(loss / images, 100 * correct / images, 100 * correct_in_five / images, int(images), confusion)


def run_classifier(run: Run, trainer: ClassifierTrainer, origin: str) -> None:
    """Train and evaluate a classifier that has been built; with --eval or --dry_run do that alone.

    Args:
        origin: a line that says where the weights came from.
    """
    config, data = run.config, run.data
    if config.dry_run:
        dataset = None if data.train is None else train_dataset(config, data.train)
        show_downstream_plan(run, trainer, dataset, origin)
        return
    dataset = None if data.train is None else train_dataset(config, cached(config, data.train))
    train_and_evaluate(run, trainer, dataset, ClassifierEvaluation(trainer, data, run.processes), origin)


class ClassifierEvaluation(Evaluation):
    """Evaluate the accuracy on the validation images."""

    metric = "top1"

    def __init__(self, trainer: ClassifierTrainer, data: LabelledImages, processes: Processes):
        super().__init__(trainer)
        config: ClassifierConfig = trainer.config
        self.every = config.eval_freq
        self.data = data
        indices = share_of_images(len(data.val), processes, config.dist_eval)
        dataset = LabelledDataset(data.val, indices, config.resolved_input_size, config.in_chans, exif=config.exif)
        self.loader = evaluation_loader(dataset, trainer, config.batch_size)
        self.normalise = Normalise(config.resolved_mean, config.resolved_std, trainer.device)

    def evaluate(self) -> Scores:
        """Evaluate the EMA of the weights if there is one, else the classifier; all ranks return the same scores."""
        trainer = self.trainer
        state = trainer.state
        # ranks may have different numbers of batches: none may wait for the others' weights
        model = state.unsharded(state.model if state.model_ema is None else state.model_ema, trainer.device)
        return evaluate(
            model,
            self.loader,
            self.normalise,
            num_classes=self.data.num_classes,
            device=trainer.device,
            autocast=trainer.autocast(),
            per_class=trainer.config.per_class,
        )

    def describe(self, scores: Scores) -> str:
        """Return the scores in one line."""
        accuracies = f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %"
        return f"{accuracies}, loss {scores.loss:.4f} on {scores.images} images"

    def write_per_class(self, scores: Scores) -> str:
        """Write the accuracy per class and the confusion matrix, if --per_class asks for them."""
        if not self.trainer.config.per_class:
            return ""
        names = self.data.val.class_names or [str(number) for number in range(len(scores.confusion))]
        images = scores.confusion.sum(dim=1).tolist()
        rows = [
            {"class": name, "images": number, "accuracy": None if number == 0 else round(accuracy, 4)}
            for name, number, accuracy in zip(names, images, scores.per_class.tolist(), strict=True)
        ]
        confusion = scores.confusion.numpy()
        return write_class_files(self.trainer.config.output_dir, rows, confusion, confusion)
