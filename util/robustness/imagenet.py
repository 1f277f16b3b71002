"""Labels of ImageNet-1k and of the sets derived from it, read from timm and from util/robustness/data.

A class is the index of its WordNet id among the 1,000 sorted ones; an answer is a tuple of classes, each of which is
correct.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo, RealLabelsImagenet

NUM_CLASSES = 1000
NUM_VALIDATION = 50_000
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")  # numbered from 1

Answer = tuple[int, ...]
Answers = dict[str, Answer]  # by folder name

_DATA = Path(__file__).resolve().parent / "data"
_TIMM = resources.files("timm.data") / "_info"


@functools.cache
def imagenet_folders() -> Answers:
    """Return the class of each of the 1,000 WordNet ids."""
    return {wnid: (index,) for index, wnid in enumerate(ImageNetInfo().label_names())}


@functools.cache
def class_names() -> list[str]:
    """Return a short name for each of the 1,000 classes."""
    return [description.partition(",")[0] for description in ImageNetInfo().label_descriptions()]


def _subset(wnids: str) -> Answers:
    """Return the classes of the WordNet ids that a text lists."""
    return {wnid: imagenet_folders()[wnid] for wnid in sorted(wnids.split())}


def imagenet_a_folders() -> Answers:
    """Return the 200 classes of ImageNet-A."""
    return _subset((_TIMM / "imagenet_a_synsets.txt").read_text(encoding="utf-8"))


def imagenet_r_folders() -> Answers:
    """Return the 200 classes of ImageNet-R."""
    return _subset((_TIMM / "imagenet_r_synsets.txt").read_text(encoding="utf-8"))


def imagenet_o_folders() -> Answers:
    """Return the 200 classes whose validation images are the inliers of ImageNet-O; its images show none of them."""
    return _subset((_DATA / "imagenet_o_synsets.txt").read_text(encoding="utf-8"))


def imagenet_v2_folders() -> Answers:
    """Return the class that each folder name states: 0 to 999 without leading zeros, so text order is another one."""
    return {str(index): (index,) for index in range(NUM_CLASSES)}


def objectnet_folders() -> Answers:
    """Return the classes of the 113 of ObjectNet's 313 folders that stand for classes of ImageNet, 125 in all."""
    classes = json.loads((_DATA / "objectnet_classes.json").read_text(encoding="utf-8"))
    return {folder: tuple(indices) for folder, indices in classes.items()}


def si_score_folders() -> Answers:
    """Return the classes of the 112 labels that SI-Score's generator knows."""
    classes = json.loads((_DATA / "si_score_classes.json").read_text(encoding="utf-8"))
    return {label: (index,) for label, index in classes.items()}


def si_score_released() -> list[str]:
    """Return the 61 labels of the released images."""
    return (_DATA / "si_score_released.txt").read_text(encoding="utf-8").split()


@functools.cache
def validation_labels() -> np.ndarray:
    """Return int64 [50000]: the original label of validation image number i + 1 at index i."""
    return np.load(_DATA / "imagenet_val_labels.npy").astype(np.int64)


@functools.cache
def real_answers() -> list[Answer]:
    """Return ReaL's labels (Beyer et al. 2020) of validation image number i + 1 at index i; 3,163 have none."""
    by_name = RealLabelsImagenet([""] * NUM_VALIDATION).real_labels  # timm wants a name per image
    return [tuple(by_name[f"ILSVRC2012_val_{number:08d}.JPEG"]) for number in range(1, NUM_VALIDATION + 1)]
