"""What fine-tuning and linear probing share: labelled images, their augmentation, and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from util.config.checks import check
from util.config.classifier import ClassifierConfig, LinprobeConfig
from util.data.cache import CachedImages, cache_images
from util.data.clamped_crop import ClampedResizedCrop
from util.data.datasets import find_validation, hold_out_labelled, open_images
from util.data.labelled import ClassifierDataset
from util.data.sources import ImageSource
from util.runtime.distributed import Processes
from util.runtime.errors import UserError


@dataclass(frozen=True)
class LabelledImages:
    """The two splits that a classifier needs; `train` is None for --eval."""

    train: ImageSource | None
    val: ImageSource
    num_classes: int  # K

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes in the order of their numbers; None if the data has none."""
        return self.val.class_names


def open_labelled(config: ClassifierConfig, processes: Processes | None = None) -> LabelledImages:
    """Open the labelled images that the settings name.

    Raises:
        UserError: a split is missing, empty, a stream, without labels, or the splits' classes differ from each other
            or from --nb_classes.
    """
    where = f"--dataset {config.dataset}" if config.dataset else f"--data_path {config.data_path}"
    needs_train = config.holdout or not config.eval
    train = None if not needs_train else open_images(config.data_path, config.dataset, "train")
    if isinstance(train, IterableDataset):
        raise UserError(f"{where}: is a stream, a classifier needs images that can be drawn by number")
    if train is not None and (train.labels is None or len(set(train.labels)) < 2):
        fix = "give train/ and val/ with a folder for each class"
        if train.class_names:
            folder = f"in {train.class_names[0]!r}" if train.class_names[0] else "in no folder"
            fix += f"; an image's class is the folder that it lies in, and all lie {folder}"
        raise UserError(f"{where}: has no labels of two classes, {fix}")
    if config.holdout:
        train, val = hold_out_labelled(train, config.holdout, where)
        train = None if config.eval else train
    else:
        val = find_validation(config.data_path, config.dataset, config.val_path)
    if val is None:
        raise UserError(f"{where}: no validation images of two classes, add val/ beside train/ or give --val_path")
    for source in filter(None, (train, val)):
        if "" in (source.class_names or ()):
            stray = source.name(source.labels.index(source.class_names.index("")))
            raise UserError(f"{where}: {stray} lies in no class folder; move such images into one, or away")
    if train is not None and train.class_names != val.class_names:
        raise UserError(f"{where}: {class_difference(train.class_names or [], val.class_names or [])}")

    names = val.class_names
    num_classes = len(names) if names else 1 + max(max(s.labels) for s in (train, val) if s is not None)
    classes = config.nb_classes
    fix = f"the data has {num_classes} classes, leave the flag out or give that number"
    check(classes is None or classes == num_classes, "nb_classes", classes, fix)
    return LabelledImages(train, val, num_classes)


def class_difference(train: list[str], val: list[str]) -> str:
    """Return a sentence that says how the classes of the splits differ."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [
        f"{len(names)} classes are in {split} but not in {other} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, split, other in ((only_train, "train", "val"), (only_val, "val", "train"))
        if names
    ]
    return "; ".join(parts) + "; make the class folders the same"


def cached(config: ClassifierConfig, source: ImageSource) -> ImageSource | CachedImages:
    """Return the images, decoded once and kept where --cache asks for it."""
    if config.cache == "none":
        return source
    workers, skip_bad = config.resolved_num_workers, config.on_bad_image == "skip"
    return cache_images(source, config.in_chans, workers, config.loader_timeout, skip_bad, exif=config.exif)


def train_dataset(config: ClassifierConfig, source: ImageSource) -> ClassifierDataset:
    """Return the augmented training images.

    Raises:
        UserError: timm does not know the policy of --aa.
    """
    try:
        with posterize_of_any_strength():
            transform = create_transform(**config.augmentation)
    except (AssertionError, ValueError, KeyError) as error:
        policy = config.augmentation.get("auto_augment")
        raise UserError(f"--aa {policy}: timm does not know this policy ({error!r})") from error
    if isinstance(config, LinprobeConfig):
        transform.transforms[0] = ClampedResizedCrop(config.resolved_input_size, config.crop_scale)
    skip_bad = config.on_bad_image == "skip"
    return ClassifierDataset(source, transform, config.in_chans, config.seed, skip_bad, config.exif)


@contextmanager
def posterize_of_any_strength() -> Iterator[None]:
    """Let timm's policies keep 0 bits of a pixel, which Pillow refuses from version 13 on.

    This holds for policies that are made inside of the context.
    """
    original = {name: operation for name, operation in NAME_TO_OP.items() if operation is auto_augment.posterize}
    NAME_TO_OP.update(dict.fromkeys(original, posterize))
    try:
        yield
    finally:
        NAME_TO_OP.update(original)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each pixel like timm; 0 bits give black, as in older versions of Pillow."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    autocast: torch.autocast,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each batch the logits [B, K], float32, of a classifier in eval mode, and the loader's second tensor.

    Args:
        loader: yields uint8 images [B, C, H, W] and a tensor [B], such as their labels.
        normalise: makes the model's input of images on the device.
    """
    was_training = model.training
    model.eval()
    for pixels, others in loader:
        images = normalise(pixels.to(device, non_blocking=True))
        with autocast:
            logits = model(images)
        yield logits.float(), others.to(device, non_blocking=True)
    model.train(was_training)
