"""From --data_path and --dataset to an image source: folders, published sets, embedded digits, readers of timm."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from util.data.decode import warn_of_unused_bits
from util.data.folders import find_split, list_folder, open_folder, split_path, tar_files
from util.data.sources import ArraySource, ImageSource, ReaderSource, hold_out, labelled_or_none, read_file
from util.data.splits import split_kind
from util.data.tars import holds_validation, open_tars
from util.runtime.errors import UserError

READERS = ("torch", "hfds", "hfids", "tfds", "wds")


def open_images(data_path: str, dataset: str, split: str, flag: str = "--data_path") -> ImageSource | IterableDataset:
    """Open the images of a split, train or val, found as DataConfig describes.

    Args:
        flag: what `data_path` was given to, for messages.

    Raises:
        UserError: nothing is there, it cannot be read, holds no image, or one cannot know what its folders are.
    """
    if dataset == "digits":
        if data_path:
            fix = 'leave one of them out; with a recipe that names it, add --dataset ""'
            raise UserError(f"{flag} {data_path}: --dataset digits has images of its own, {fix}")
        return digits(split)
    if dataset in published_names():
        from util.data.published import open_published

        return open_published(dataset, data_path, split)
    if dataset:
        return open_reader(dataset, data_path, split)
    if not data_path:
        fix = "give a folder or .tar of images, or --dataset digits for those that come with scikit-learn"
        raise UserError(f"{flag}: is missing, {fix}")
    source = open_files(Path(data_path), split, flag)
    warn_of_unused_bits(source, f"{flag} {data_path}")
    return source


def open_files(path: Path, split: str, flag: str) -> ImageSource:
    """Open a folder or .tar of images, or the split that lies in it; errors as `open_images`."""
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: there is no such file or folder")
    check_access(path, flag)
    split_path = find_split(path, split, flag) if path.is_dir() else None
    is_split = split_path is not None or split_kind(path.stem) is not None
    path = split_path or path
    check_access(path, flag)
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise UserError(f"{flag} {path}: is a {path.suffix or 'plain'} file, give a folder or a .tar file")
        return open_tars(path, [path], split, flag, is_split)
    tars = tar_files(path)
    if not tars:
        return open_folder(path, flag, is_split)
    if images := list_folder(path, flag).images:
        folder, names = min(images.items())
        fix = "keep one of the two kinds there, or name a file or folder in it"
        image = os.path.join(path, folder, min(names))
        raise UserError(f"{flag} {path}: holds .tar files ({tars[0].name}) and images ({image}), {fix}")
    return open_tars(path, tars, split, flag, is_split)


def check_access(path: Path, flag: str) -> None:
    """Raise UserError if a file or folder may not be read."""
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UserError(f"{flag} {path}: may not be read, check its permissions")


def find_validation(data_path: str, dataset: str, val_path: str) -> ImageSource | None:
    """Open the labelled images to judge by: those of --val_path, or beside the training images; or None."""
    if val_path:
        return labelled_or_none(open_images(val_path, "", "val", "--val_path"))
    if dataset in published_names():  # it has a validation split: that it cannot be read is an error
        return open_images(data_path, dataset, "val")
    if dataset:
        try:
            return labelled_or_none(open_images(data_path, dataset, "val"))
        except UserError:
            return None
    path = Path(data_path)
    beside = split_path(path.parent if split_kind(path.stem) == "train" else path, "val", "--data_path")
    if beside:
        return labelled_or_none(open_images(str(beside), "", "val"))
    tars = [path] if path.is_file() else tar_files(path) if path.is_dir() else []
    if tars and holds_validation(tars, "--data_path", path):
        return labelled_or_none(open_tars(path, tars, "val", "--data_path", is_split=False))
    return None


def digits(split: str) -> ArraySource:
    """Return the 8x8 handwritten digits of scikit-learn, 1 channel; each fifth one is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    keep = (np.arange(len(data.target)) % 5 == 0) == (split != "train")
    pixels = torch.from_numpy(np.round(data.images[keep] * (255 / 16)).astype(np.uint8))
    return ArraySource(pixels.unsqueeze(1), data.target[keep].tolist(), [str(n) for n in range(10)], "digits")


def published_names() -> list[str]:
    """Return the names of the data sets that util/data/published.py reads."""
    from util.data.published import DATASETS

    return list(DATASETS)


def open_reader(dataset: str, data_path: str, split: str) -> ReaderSource | IterableDataset:
    """Open a data set by its name in timm's `create_dataset`; streams (wds/, tfds/, hfids/) come as IterableDataset.

    Raises:
        UserError: the name is unknown, or the reader cannot open it.
    """
    from timm.data import create_dataset

    from util.runtime.errors import nearest

    if dataset.partition("/")[0] not in READERS:
        known = ["digits", *published_names()]
        raise UserError(
            f"--dataset {dataset}: unknown{nearest(dataset, known)} (one of {', '.join(known)}, or a reader of"
            f" {', '.join(READERS)} and a name: hfds/user/name)"
        )
    split = {"val": "validation"}.get(split, split)  # what all readers know it by
    try:
        images = create_dataset(dataset, root=data_path or None, split=split, is_training=split == "train")
    except Exception as error:  # each reader raises its own; all of them mean that the name or place is wrong
        raise UserError(
            f"--dataset {dataset}: cannot be opened under --data_path {data_path!r}, split {split}"
            f" ({type(error).__name__}: {error})"
        ) from error
    if isinstance(images, IterableDataset):
        return images
    if hasattr(images, "loader"):
        images.loader = read_file  # torchvision's folders would open every format that Pillow knows
    labels = [int(label) for label in getattr(images, "targets", ())] or None
    reader = getattr(images, "reader", images)  # timm's class around its reader skips bad images unasked
    return ReaderSource(reader, dataset, labels, getattr(images, "classes", None))


def hold_out_labelled(
    source: ImageSource | IterableDataset, share: float, where: str
) -> tuple[ImageSource, ImageSource]:
    """Divide labelled training images into those to train on and a share of each class to evaluate on (--holdout).

    Args:
        where: the flag and value that name the images, for messages.

    Raises:
        UserError: the images have no labels, or no class has two images.
    """
    if isinstance(source, IterableDataset) or source.labels is None:
        raise UserError(f"--holdout {share}: {where} has no labels, leave it out")
    train, val = hold_out(source, share)
    if len(val) == 0:
        raise UserError(f"--holdout {share}: no class of {where} has two images, leave it out")
    return train, val
