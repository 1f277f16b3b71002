"""What fine-tuning and linear probing share around a classifier: labelled data, evaluation, the run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.data import create_transform
from torch.utils.data import IterableDataset

from engine_finetune import ClassifierTrainer, Scores, evaluate
from util.amp import autocast_dtype
from util.cache import cache_images
from util.classifier_config import ClassifierConfig
from util.config import as_dict, check, check_same_run
from util.cost import classifier_flops, count_parameters
from util.data import BatchOrder, ClassifierDataset, LabelledDataset, Loader, Normalise, training_loader
from util.distributed import Processes, is_main, start_processes
from util.errors import UserError
from util.interop import load_weights
from util.logs import RunLog
from util.pictures import confusion_picture
from util.results import append_result
from util.run import check_batch, checkpoint_to_resume, fit_to_processes, open_log, open_store, train
from util.sharding import check_sharding
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
    where = f"--dataset {config.dataset_name}" if config.dataset_name else f"--data_path {config.data_path}"
    unseen = config.eval and not config.holdout  # --eval looks at no training image
    train = None if unseen else open_images(config.data_path, config.dataset_name, "train")
    if isinstance(train, IterableDataset):
        raise UserError(f"{where}: is a stream, a classifier needs images that can be drawn by number")
    if train is not None and (train.labels is None or len(set(train.labels)) < 2):
        raise UserError(f"{where}: has no labels of two classes, give train/ and val/ with a folder for each class")
    if config.holdout:
        train, val = hold_out(train, config.holdout)
        if len(val) == 0:
            raise UserError(f"--holdout {config.holdout}: no class of {where} has two images, leave it out")
        train = None if config.eval else train
    else:
        val = find_validation(config.data_path, config.dataset_name, config.val_path)
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


def start_from(model: torch.nn.Module, config: ClassifierConfig) -> str:
    """Load --finetune, or with --eval the whole classifier of --finetune or --resume; what to say of it."""
    if config.eval:
        flag, path = ("--resume", config.resume) if config.resume else ("--finetune", config.finetune)
        return f"{flag} {path}: {load_weights(model, Path(path), config.weights, flag, whole=True)}"
    if not config.finetune:
        return "no --finetune: from scratch"
    report = load_weights(model, Path(config.finetune), config.weights, "--finetune")
    return f"--finetune {config.finetune}: {report}"


@dataclass(frozen=True)
class Prepared:
    """What can be wrong with the input, found before a model is built."""

    config: ClassifierConfig  # the batch fitted to the processes (--elastic)
    processes: Processes
    dtype: torch.dtype | None  # of autocast; None: fp32
    data: LabelledImages
    order: BatchOrder


def prepare(config: ClassifierConfig) -> Prepared:
    """Processes, precision, data and batches of a run; every UserError that they may hold."""
    processes = start_processes(config.device, config.dist_backend)
    dtype = autocast_dtype(config.amp, processes.device)
    check_sharding(config.parallel, dtype, processes.device)
    data = open_labelled(config)
    config = fit_to_processes(config)
    return Prepared(config, processes, dtype, data, training_order(config, data, processes))


def training_order(config: ClassifierConfig, data: LabelledImages, processes: Processes) -> BatchOrder:
    """Which images make up which batch; an epoch of none is an error."""
    images = len(data.train or data.val)
    shape = (config.batch_size, config.accum_iter, processes.rank, processes.world_size)
    order = BatchOrder(images, *shape, config.seed)
    if not config.eval:
        check_batch(config, order)
    return order


def train_classifier(trainer: ClassifierTrainer, prepared: Prepared, stage: str, said: str) -> Scores | None:
    """The whole run of a classifier that has been built: resume, epochs, evaluations, result; or --eval alone.

    Args:
        stage: `finetune` or `linprobe`, for results.jsonl.
        said: where the weights came from, for the log.
    """
    config, data, order, processes = prepared.config, prepared.data, prepared.order, prepared.processes
    if config.dry_run:
        show_plan(trainer, data, order)
        return None
    store = open_store(config)
    evaluation = Evaluation(trainer, data, processes)
    if config.eval:
        return evaluation.alone(stage, said)
    binding = config.binding_settings(len(data.train))
    resumed = checkpoint_to_resume(config, store)
    if resumed is not None:
        check_same_run(binding, resumed, config.elastic)
        trainer.state.load_state_dict(resumed)
    images = data.train
    if config.cache == "ram" and not isinstance(images, IterableDataset):
        images = cache_images(images, config.in_chans, config.loader_workers, config.on_bad_image == "skip")
    loader = training_loader(
        train_dataset(config, images),
        order,
        config.loader_workers,
        config.pins(trainer.device),
        config.loader_timeout,
    )
    log = open_log(config, trainer, processes, len(data.train))
    if resumed is None:
        log.text(said)
    best = store.best_metric

    def look(epochs: int, last: bool) -> float | None:
        nonlocal best
        if not last and epochs % config.eval_freq:
            return None
        scores = evaluation.scores()
        best = max(best or 0.0, scores.top1)
        evaluation.report(scores, epochs, best, log, last)
        return scores.top1

    seconds = train(trainer, loader, order, data.train, store, log, look, binding)
    scores = evaluation.latest
    if is_main() and scores is not None:
        append_result(config.output_dir, stage, as_dict(config), scores.values | {"best_top1": best}, seconds)
    log.close()
    return scores


def train_dataset(config: ClassifierConfig, source: ImageSource) -> ClassifierDataset:
    """Augmented training images.

    Raises:
        UserError: timm does not know the policy of --aa.
    """
    try:
        transform = create_transform(**config.augmentation)
    except (AssertionError, ValueError, KeyError) as error:
        policy = config.augmentation.get("auto_augment")
        raise UserError(f"--aa {policy}: timm makes no augmentation of it ({error!r})") from error
    return ClassifierDataset(source, transform, config.in_chans, config.seed, config.on_bad_image == "skip")


class Evaluation:
    """The validation images, and what is made of a classifier's scores on them."""

    def __init__(self, trainer: ClassifierTrainer, data: LabelledImages, processes: Processes):
        config: ClassifierConfig = trainer.config
        self.trainer, self.data = trainer, data
        share = slice(processes.rank, None, processes.world_size)
        if not config.dist_eval:
            share = slice(None) if processes.rank == 0 else slice(0)
        indices = range(len(data.val))[share]
        self.loader = Loader(
            LabelledDataset(data.val, indices, config.image_size, config.in_chans),
            batch_size=config.batch_size,
            num_workers=config.loader_workers,
            pin_memory=config.pins(trainer.device),
            persistent_workers=config.loader_workers > 0,
            patience=config.loader_timeout,
        )
        self.normalise = Normalise(config.pixel_mean, config.pixel_std, trainer.device)
        self.latest: Scores | None = None

    def scores(self) -> Scores:
        """Of the moving average where there is one, else of the classifier; the same on all ranks."""
        trainer = self.trainer
        state, autocast = trainer.state, trainer.autocast()
        # ranks may have different numbers of batches: none may wait for the others' weights
        model = state.unsharded(state.model if state.model_ema is None else state.model_ema, trainer.device)
        self.latest = evaluate(model, self.loader, self.normalise, self.data.num_classes, trainer.device, autocast)
        return self.latest

    def report(self, scores: Scores, epochs: int, best: float, log: RunLog, last: bool) -> None:
        """A line of log, and at the end what --per_class asks for."""
        log.scalars(self.trainer.state.updates, scores.values, epoch=epochs)
        log.text(f"after epoch {epochs}: {describe(scores)}, best {best:.2f} %")
        if last and self.trainer.config.per_class and is_main():
            log.text(write_classes(scores, self.data.val.class_names, Path(self.trainer.config.output_dir)))

    def alone(self, stage: str, said: str) -> Scores:
        """--eval: print and record the scores."""
        config: ClassifierConfig = self.trainer.config
        begin = time.monotonic()
        scores = self.scores()
        if is_main():
            print(f"{said}\n{describe(scores)}")
            if config.per_class:
                print(write_classes(scores, self.data.val.class_names, Path(config.output_dir)))
            append_result(config.output_dir, f"{stage}-eval", as_dict(config), scores.values, time.monotonic() - begin)
        return scores


def describe(scores: Scores) -> str:
    """The scores in one line."""
    return f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, loss {scores.loss:.4f} on {scores.images} images"


def write_classes(scores: Scores, names: list[str] | None, folder: Path) -> str:
    """Write the accuracy per class and the confusion matrix; say where."""
    names = names or [str(number) for number in range(len(scores.confusion))]
    images = scores.confusion.sum(dim=1).tolist()
    rows = [
        {"class": name, "images": number, "accuracy": None if number == 0 else round(accuracy, 4)}
        for name, number, accuracy in zip(names, images, scores.per_class.tolist(), strict=True)
    ]
    (folder / "per_class.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    np.save(folder / "confusion.npy", scores.confusion.numpy())
    confusion_picture(scores.confusion.numpy(), names, folder / "confusion.png")
    return f"accuracy per class: {folder}/per_class.json, confusion matrix: {folder}/confusion.png and .npy"


def show_plan(trainer: ClassifierTrainer, data: LabelledImages, order: BatchOrder) -> None:
    """--dry_run: the settings, what the run costs, and one real batch."""
    config: ClassifierConfig = trainer.config
    print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    total = order.updates_per_epoch * config.epochs
    flops = classifier_flops(trainer.state.model, (config.in_chans, *config.image_size))
    facts: dict[str, Any] = {
        "images": f"{order.num_samples} training, {len(data.val)} validation, {data.num_classes} classes",
        "updates": f"{order.updates_per_epoch} per epoch x {config.epochs} epochs = {total}",
        "effective batch": f"{config.effective_batch}, peak lr {config.peak_lr:.3g}",
        "parameters": f"{count_parameters(trainer.state.model) / 1e6:.2f} M",
        "GFLOP": f"{flops / 1e9:.2f} per image, forward and backward",
    }
    if data.train is not None:
        begin = time.perf_counter()
        batch = next(iter(training_loader(train_dataset(config, data.train), order, 0, False, 0)))
        facts["one batch"] = f"{tuple(batch.images.shape)}, made in {time.perf_counter() - begin:.2f} s by one process"
    for name, fact in facts.items():
        print(f"{name:<17}{fact}")
