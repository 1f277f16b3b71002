"""What fine-tuning and linear probing share around a classifier: labelled data, evaluation, the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import NAME_TO_OP
from torch.utils.data import IterableDataset

from engine_finetune import ClassifierTrainer, Scores, evaluate
from util import evaluation
from util.cache import cache_images
from util.classifier_config import ClassifierConfig
from util.config import check
from util.data import ClassifierDataset, LabelledDataset, Normalise
from util.distributed import Processes
from util.errors import UserError
from util.evaluation import (
    Evaluation,
    Prepared,
    evaluation_loader,
    share_of_images,
    show_plan,
    train_and_evaluate,
    write_per_class,
)
from util.sources import ImageSource, find_validation, hold_out, open_images


@dataclass(frozen=True)
class LabelledImages:
    """The two splits that a classifier needs; `train` is None for --eval."""

    train: ImageSource | None
    val: ImageSource
    num_classes: int  # K


def open_labelled(config: ClassifierConfig) -> LabelledImages:
    """The labelled images that the settings name.

    Raises:
        UserError: a split is missing, empty, a stream, without labels, or the splits' classes differ from each other
            or from --nb_classes.
    """
    where = f"--dataset {config.dataset}" if config.dataset else f"--data_path {config.data_path}"
    unseen = config.eval and not config.holdout  # --eval looks at no training image
    train = None if unseen else open_images(config.data_path, config.dataset, "train")
    if isinstance(train, IterableDataset):
        raise UserError(f"{where}: is a stream, a classifier needs images that can be drawn by number")
    if train is not None and (train.labels is None or len(set(train.labels)) < 2):
        fix = "give train/ and val/ with a folder for each class"
        if train.class_names:
            fix += f"; a file's class is the folder that it lies in, and all lie in {train.class_names[0]!r}"
        raise UserError(f"{where}: has no labels of two classes, {fix}")
    if config.holdout:
        train, val = hold_out(train, config.holdout)
        if len(val) == 0:
            raise UserError(f"--holdout {config.holdout}: no class of {where} has two images, leave it out")
        train = None if config.eval else train
    else:
        val = find_validation(config.data_path, config.dataset, config.val_path)
    if val is None:
        raise UserError(f"{where}: no validation images of two classes, add val/ beside train/ or give --val_path")
    if train is not None and train.class_names != val.class_names:
        raise UserError(f"{where}: {difference(train.class_names or [], val.class_names or [])}")

    names = val.class_names
    num_classes = len(names) if names else 1 + max(max(s.labels) for s in (train, val) if s is not None)
    classes = config.nb_classes
    fix = f"the data has {num_classes} classes, leave the flag out or give that number"
    check(classes is None or classes == num_classes, "nb_classes", classes, fix)
    return LabelledImages(train, val, num_classes)


def difference(train: list[str], val: list[str]) -> str:
    """How the classes of the splits differ, in words."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    said = [
        f"{len(names)} classes are in {there} but not in {other} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, there, other in ((only_train, "train", "val"), (only_val, "val", "train"))
        if names
    ]
    return "; ".join(said) + "; make the class folders the same"


def prepare(config: ClassifierConfig) -> Prepared:
    """Processes, precision, data and batches of a run; every UserError that they may hold."""
    return evaluation.prepare(config, lambda config, _: open_labelled(config))


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
            about = (config.in_chans, config.loader_workers, config.loader_timeout)
            images = cache_images(images, *about, config.on_bad_image == "skip")
        return train_dataset(config, images)

    def make_evaluation() -> ClassifierEvaluation:
        return ClassifierEvaluation(trainer, data, prepared.processes)

    return train_and_evaluate(trainer, prepared, make_dataset, make_evaluation, stage, said)


def train_dataset(config: ClassifierConfig, source: ImageSource) -> ClassifierDataset:
    """Augmented training images.

    Raises:
        UserError: timm does not know the policy of --aa.
    """
    try:
        with posterize_of_any_strength():
            transform = create_transform(**config.augmentation)
    except (AssertionError, ValueError, KeyError) as error:
        policy = config.augmentation.get("auto_augment")
        raise UserError(f"--aa {policy}: timm makes no augmentation of it ({error!r})") from error
    return ClassifierDataset(source, transform, config.in_chans, config.seed, config.on_bad_image == "skip")


@contextmanager
def posterize_of_any_strength() -> Iterator[None]:
    """Policies of timm that are made meanwhile may leave 0 bits of a pixel, which Pillow refuses from version 13 on."""
    theirs = {name: operation for name, operation in NAME_TO_OP.items() if operation is auto_augment.posterize}
    NAME_TO_OP.update(dict.fromkeys(theirs, posterize))
    try:
        yield
    finally:
        NAME_TO_OP.update(theirs)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's, and black for 0 bits, as older Pillows have it."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


class ClassifierEvaluation(Evaluation):
    """Accuracy on the validation images."""

    metric = "top1"

    def __init__(self, trainer: ClassifierTrainer, data: LabelledImages, processes: Processes):
        super().__init__(trainer)
        config: ClassifierConfig = trainer.config
        self.data = data
        indices = share_of_images(len(data.val), processes, config.dist_eval)
        dataset = LabelledDataset(data.val, indices, config.image_size, config.in_chans)
        self.loader = evaluation_loader(dataset, trainer, config.batch_size)
        self.normalise = Normalise(config.pixel_mean, config.pixel_std, trainer.device)

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
