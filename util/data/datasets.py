"""From --data_path and --dataset to an image source: folders, published sets, embedded digits, readers of timm."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from util.data.folders import (
    SPLIT_NAMES,
    classes_beside,
    image_paths,
    names_a_split,
    open_folder,
    open_tars,
    split_path,
    splits_of,
    tar_contents,
    train_is_a_class,
    without_training_images,
)
from util.data.sources import ArraySource, ImageSource, ReaderSource, labelled_or_none
from util.runtime.errors import UserError

READERS = ("torch", "hfds", "hfids", "tfds", "wds")


def open_images(data_path: str, dataset: str, split: str, flag: str = "--data_path") -> ImageSource | IterableDataset:
    """The images of a split, found as DataConfig describes.

    Raises:
        UserError: nothing there, unreadable, or without a single image.
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
    path = Path(data_path)
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: there is no such file or folder")
    train, val = (split_path(path, name) for name in SPLIT_NAMES)
    if not names_a_split(path) or (train and val):  # else what it holds are classes, whatever they are called
        if split == "train" and val and not train:
            raise without_training_images(flag, path, val.name)
        if train and not val and (beside := classes_beside(train)):
            raise train_is_a_class(flag, path, train.name, beside)
        path = {"train": train, "val": val}[split] or path
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UserError(f"{flag} {path}: may not be read, check its permissions")
    if path.is_file():
        if path.suffix != ".tar":
            raise UserError(f"{flag} {path}: is a {path.suffix or 'plain'} file, give a folder or a .tar file")
        return open_tars(path, [path], split, flag)
    tars = sorted(path.glob("*.tar"))
    if not tars:
        return open_folder(path, flag)
    if (image := next(image_paths(path, flag), None)) is not None:
        fix = "keep one of the two kinds there, or name a file or folder in it"
        raise UserError(f"{flag} {path}: holds .tar files ({tars[0].name}) and images ({os.path.join(*image)}), {fix}")
    return open_tars(path, tars, split, flag)


def find_validation(data_path: str, dataset: str, val_path: str) -> ImageSource | None:
    """The labelled images to judge by: --val_path, or what lies beside the training images, or None."""
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
    beside = split_path(path.parent if path.stem in SPLIT_NAMES["train"] else path, "val")
    if beside:
        return labelled_or_none(open_images(str(beside), "", "val"))
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))
    members, classes = tar_contents(tars, "--data_path")
    if classes is None and "val" in splits_of([name for _, name, _, _ in members]):
        return labelled_or_none(open_tars(path, tars, "val", "--data_path"))
    return None


def digits(split: str) -> ArraySource:
    """scikit-learn's 8x8 handwritten digits, 1 channel; each fifth one is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    keep = (np.arange(len(data.target)) % 5 == 0) == (split != "train")
    pixels = torch.from_numpy(np.round(data.images[keep] * (255 / 16)).astype(np.uint8))
    return ArraySource(pixels.unsqueeze(1), data.target[keep].tolist(), [str(n) for n in range(10)], "digits")


def published_names() -> list[str]:
    """The data sets that util/data/published.py reads."""
    from util.data.published import DATASETS

    return list(DATASETS)


def open_reader(dataset: str, data_path: str, split: str) -> ReaderSource | IterableDataset:
    """A data set by its name in timm's `create_dataset`; streams (wds/, tfds/, hfids/) come as IterableDataset."""
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
        found = create_dataset(dataset, root=data_path or None, split=split, is_training=split == "train")
    except Exception as error:  # each reader raises its own; all of them mean that the name or place is wrong
        raise UserError(
            f"--dataset {dataset}: cannot be opened under --data_path {data_path!r}, split {split}"
            f" ({type(error).__name__}: {error})"
        ) from error
    if isinstance(found, IterableDataset):
        return found
    labels = [int(label) for label in getattr(found, "targets", ())] or None
    found = getattr(found, "reader", found)  # timm's class around its reader skips bad images unasked
    return ReaderSource(found, dataset, labels, getattr(found, "classes", None))
