"""Labels of ImageNet-1k and of the sets made after it: facts that timm ships, and those in util/robustness/data.

A class is its place among the 1,000 sorted WordNet ids; an answer is a tuple of the classes that are all right.
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
Answers = dict[str, Answer]  # by the name of a folder

_OURS = Path(__file__).resolve().parent / "data"
_TIMM = resources.files("timm.data") / "_info"


@functools.cache
def imagenet_folders() -> Answers:
    """The 1,000 WordNet ids."""
    return {wnid: (place,) for place, wnid in enumerate(ImageNetInfo().label_names())}


@functools.cache
def class_names() -> list[str]:
    """A short name for each of the 1,000 classes."""
    return [description.partition(",")[0] for description in ImageNetInfo().label_descriptions()]


def _chosen(wnids: str) -> Answers:
    """Those of the 1,000 that a text lists."""
    return {wnid: imagenet_folders()[wnid] for wnid in sorted(wnids.split())}


def imagenet_a_folders() -> Answers:
    """The 200 classes of ImageNet-A."""
    return _chosen((_TIMM / "imagenet_a_synsets.txt").read_text(encoding="utf-8"))


def imagenet_r_folders() -> Answers:
    """The 200 classes of ImageNet-R."""
    return _chosen((_TIMM / "imagenet_r_synsets.txt").read_text(encoding="utf-8"))


def imagenet_o_folders() -> Answers:
    """The 200 classes that ImageNet-O is set against; its own images are of none of them."""
    return _chosen((_OURS / "imagenet_o_synsets.txt").read_text(encoding="utf-8"))


def imagenet_v2_folders() -> Answers:
    """Folders are named by the class: 0, 1, ..., 999 without leading zeros, which sort otherwise as text."""
    return {str(place): (place,) for place in range(NUM_CLASSES)}


def objectnet_folders() -> Answers:
    """The 113 of ObjectNet's 313 folders that have classes of ImageNet, 125 in all."""
    found = json.loads((_OURS / "objectnet_classes.json").read_text(encoding="utf-8"))
    return {folder: tuple(places) for folder, places in found.items()}


def si_score_folders() -> Answers:
    """The 112 labels that SI-Score's generator knows."""
    found = json.loads((_OURS / "si_score_classes.json").read_text(encoding="utf-8"))
    return {label: (place,) for label, place in found.items()}


def si_score_released() -> list[str]:
    """The 61 labels of the released images."""
    return (_OURS / "si_score_released.txt").read_text(encoding="utf-8").split()


@functools.cache
def validation_labels() -> np.ndarray:
    """[50000] the original label of validation image number i + 1."""
    return np.load(_OURS / "imagenet_val_labels.npy").astype(np.int64)


@functools.cache
def real_answers() -> list[Answer]:
    """ReaL's labels of validation image number i + 1 (Beyer et al. 2020); none for 3,163 of them."""
    by_name = RealLabelsImagenet([""] * NUM_VALIDATION).real_labels  # timm asks for as many names as there are images
    return [tuple(by_name[f"ILSVRC2012_val_{number:08d}.JPEG"]) for number in range(1, NUM_VALIDATION + 1)]
