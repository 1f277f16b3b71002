"""Images with masks on disk: which mask belongs to which image, what its numbers mean, and what is wrong with it.

Inside the program a mask is uint8 [h, w]: the number of a class, counted from 0, or `IGNORED`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from util.data.decode import check_size
from util.data.folders import SPLIT_NAMES, open_folder
from util.data.sources import BadImage, FileSource
from util.runtime.errors import UserError

IGNORED = 255  # pixels that neither train nor count
MOST_CLASSES = 255
MASK_FOLDERS = ("masks", "annotations")
MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")  # lossless ones
CLASS_FILES = ("classes.json", "classes.txt")
ADE20K_CLASSES = "objectInfo150"
UNKNOWN = -1  # in a table: a number that is no class and is not ignored


# --------------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """Names of the classes, and what the numbers in masks mean."""

    names: tuple[str, ...]  # K
    table: np.ndarray  # [65536] int16: class of each number, IGNORED or UNKNOWN
    origin: str  # where the names come from, for messages

    @property
    def known(self) -> str:
        """The numbers that a mask may hold, in words."""
        ignored = self.table == IGNORED
        classes = in_words(np.flatnonzero(~ignored & (self.table != UNKNOWN)).tolist())
        return (
            f"{len(self.names)} classes ({classes}) and ignores {in_words(np.flatnonzero(ignored).tolist()) or 'none'}"
        )


def make_classes(names: Sequence[str], first_label: int, ignored: Sequence[int], origin: str) -> Classes:
    """Classes `first_label`, `first_label` + 1, ...; what stands among the `ignored` numbers is no class.

    Raises:
        UserError: fewer than two classes, or more than a mask can tell apart.
    """
    table = np.full(2**16, UNKNOWN, dtype=np.int16)
    numbers = [number for number in range(first_label, first_label + len(names)) if number not in ignored]
    kept = tuple(names[number - first_label] for number in numbers)
    if not 2 <= len(kept) <= MOST_CLASSES:
        raise UserError(f"{origin}: names {len(kept)} classes, there must be 2 to {MOST_CLASSES}")
    table[numbers] = np.arange(len(kept))
    table[[number for number in ignored if number < len(table)]] = IGNORED
    return Classes(kept, table, origin)


def read_classes(path: Path, flag: str) -> tuple[list[str], tuple[int, ...] | None]:
    """The names in a class file, and the numbers that it says are ignored (None: it does not say).

    Raises:
        UserError: not there, or of no known form.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    ignored: tuple[int, ...] | None = None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            names, ignored = json_classes(json.loads(text))
        elif re.match(r"idx[\t,]", text, re.IGNORECASE):
            names = object_info(text)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        fix = 'give a name per line, or JSON: [...] or {"class_names": [...], "ignore_index": N}'
        raise UserError(f"{flag} {path}: cannot be read as a list of classes ({error!r}); {fix}") from error
    return names, ignored


def json_classes(found: Any) -> tuple[list[str], tuple[int, ...] | None]:
    """A list of names, or an object with `class_names` and perhaps `ignore_index`, one number or several."""
    ignored = None
    if isinstance(found, dict):
        if "ignore_index" in found:
            given = found["ignore_index"]
            ignored = tuple(int(n) for n in (given if isinstance(given, list) else [given]))
        found = found["class_names"]
    if not isinstance(found, list):
        raise TypeError("no list")
    return [str(name) for name in found], ignored


def object_info(text: str) -> list[str]:
    """The first synonym of each class in ADE20K's objectInfo150.txt (tabs) or .csv (commas), in their order."""
    delimiter = "\t" if "\t" in text.splitlines()[0] else ","
    rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
    return [re.split("[;,]", row["Name"])[0].strip() for row in sorted(rows, key=lambda row: int(row["Idx"]))]


def in_words(numbers: Sequence[int]) -> str:
    """Sorted numbers as `0 to 10, 255`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


# --------------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------------


@dataclass
class MaskedSource(FileSource):
    """Image files, each with a mask; `class_names` are those of pixels."""

    masks: list[str]
    classes: Classes

    def read_mask(self, index: int, size: tuple[int, int]) -> Tensor:
        """The mask of an image of `size` (height, width).

        Raises:
            BadImage: the file cannot be decoded.
            UserError: it is no mask, has another size, or holds a number that is no class.
        """
        path = self.masks[index]
        with open_mask(path) as image:
            self.check_mask_size(index, image.size, (size[1], size[0]))
            return self.as_classes(path, image)

    def check_mask_size(self, index: int, mask: tuple[int, int], image: tuple[int, int]) -> None:
        """UserError unless both (width, height) are equal."""
        if mask != image:
            said = f"is {mask[0]} x {mask[1]} pixels, its image {self.paths[index]} {image[0]} x {image[1]}"
            raise UserError(f"{self.masks[index]}: {said}; make the mask anew in the image's size")

    def as_classes(self, path: str, image: Image.Image) -> Tensor:
        """An open mask's numbers [h, w] as classes."""
        try:
            numbers = np.asarray(image)
        except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
            raise BadImage(f"{path}: {type(error).__name__}: {error}") from error
        numbers = numbers.astype(np.int64)
        if numbers.max() >= len(self.classes.table):
            raise self.out_of_range(path, int(numbers.max()))
        found = self.classes.table[numbers]
        if found.min() == UNKNOWN:
            raise self.out_of_range(path, int(numbers[found == UNKNOWN].min()))
        return torch.from_numpy(found.astype(np.uint8))

    def out_of_range(self, path: str, number: int) -> UserError:
        """For a number that is no class."""
        classes = self.classes
        return UserError(
            f"{path}: holds the number {number}, but {classes.origin} knows {classes.known};"
            " mend it, or see --classes, --first_label and --ignore_index"
        )

    def count(self, index: int) -> np.ndarray:
        """Pixels of each class in a mask, [256], IGNORED at its own place; errors as `read_mask`, of the image too."""
        with open_image(self.paths[index]) as image:
            width, height = image.size
        return np.bincount(self.read_mask(index, (height, width)).flatten().numpy(), minlength=IGNORED + 1)


def open_mask(path: str) -> Image.Image:
    """A mask, its pixels not decoded yet.

    Raises:
        BadImage: no image. UserError: one of colours.
    """
    image = open_image(path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        image.close()
        raise UserError(f"{path}: is a picture ({image.mode}), not a mask; save class numbers in one channel, as PNG")
    return image


def open_image(path: str) -> Image.Image:
    """An image file of which the header is known; BadImage where it is none, or too large."""
    try:
        image = Image.open(path)
        check_size(*image.size)
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: no image, or of an unknown format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {error}") from error
    return image


def pair_up(
    images: Path, masks: Path, classes: Classes, image_suffix: str, mask_suffix: str, flags: tuple[str, str]
) -> MaskedSource:
    """Each image below a folder with the mask of the same name below the other one.

    Raises:
        UserError: a folder is not there or empty, or an image has no mask.
    """
    for path, flag in zip((images, masks), flags, strict=True):
        if not path.is_dir():
            raise UserError(f"{flag} {path}: there is no such folder")
    paths = open_folder(images, flags[0]).paths
    there = {os.path.splitext(path)[0]: path for path in mask_files(masks)}
    wanted = [stem_of_mask(path, images, image_suffix, mask_suffix, flags[0]) for path in paths]
    lacking = [path for path, stem in zip(paths, wanted, strict=True) if stem not in there]
    if lacking:
        stem = stem_of_mask(lacking[0], images, image_suffix, mask_suffix, flags[0])
        more = f" ({len(lacking)} of {len(paths)} images have none)" if len(lacking) > 1 else ""
        raise UserError(f"{lacking[0]}: has no mask {masks / stem}{MASK_EXTENSIONS[0]}{more}")
    names = [there[stem] for stem in wanted]
    return MaskedSource(paths, None, list(classes.names), [str(masks / name) for name in names], classes)


def mask_files(folder: Path) -> Iterator[str]:
    """Paths, below `folder`, of what may be masks."""
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if os.path.splitext(name)[1].lower() in MASK_EXTENSIONS:
                yield os.path.relpath(os.path.join(place, name), folder)


def stem_of_mask(image: str, folder: Path, image_suffix: str, mask_suffix: str, flag: str) -> str:
    """Path of an image's mask below the folder of masks, without its extension."""
    stem = os.path.splitext(os.path.relpath(image, folder))[0]
    if not stem.endswith(image_suffix):
        raise UserError(f"--image_suffix {image_suffix}: {image} does not end so, mend the flag or {flag}")
    return stem.removesuffix(image_suffix) + mask_suffix


# --------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a folder of the data set is arranged."""

    root: Path
    mask_folder: str
    ade20k: bool  # numbers start at 1, and 0 is ignored

    def folders(self, split: str) -> tuple[Path, Path]:
        """Images and masks of a split, under one of its names.

        Raises:
            UserError: there is none.
        """
        for name in SPLIT_NAMES[split]:
            if (self.root / "images" / name).is_dir():
                return self.root / "images" / name, self.root / self.mask_folder / name
        wanted = ", ".join(f"images/{name}" for name in SPLIT_NAMES[split])
        fix = f"add one, or --{split}_images and --{split}_masks"
        raise UserError(f"--data_path {self.root}: has none of {wanted}; {fix}")


def find_layout(data_path: str) -> Layout:
    """Of --data_path; UserError where it holds no images with masks."""
    root = Path(data_path)
    if not root.exists():
        raise UserError(f"--data_path {root}: there is no such folder")
    wanted = "a segmentation's folder has images/ and masks/ (or annotations/)"
    if not root.is_dir():
        raise UserError(f"--data_path {root}: is a file, {wanted}")
    masks = next((name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        found = sorted(path.name for path in root.iterdir())
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "") if found else "nothing"
        images = any(name in found for names in SPLIT_NAMES.values() for name in names)
        hint = "; is it one for main_finetune.py?" if images else ""
        raise UserError(f"--data_path {root}: holds {shown}, but {wanted}{hint}")
    marks = [root / "annotations" / name for name in ("training", "validation")] + object_info_files(root)
    native = masks == "annotations" and any(mark.exists() for mark in marks)
    native = native and not any((root / name).exists() for name in CLASS_FILES)
    return Layout(root, masks, ade20k=native)


def object_info_files(root: Path) -> list[Path]:
    """Where ADE20K's names of classes may be."""
    return [root / f"{ADE20K_CLASSES}{suffix}" for suffix in (".txt", ".csv")]


def find_classes(
    layout: Layout | None, class_file: str, first_label: int | None, ignore_index: tuple[int, ...]
) -> Classes:
    """What the numbers in the masks mean, by flags, by a file in the data set's folder, or as ADE20K.

    Raises:
        UserError: nothing says it.
    """
    ade20k = layout is not None and layout.ade20k
    inside = [] if layout is None else [layout.root / name for name in CLASS_FILES]
    if ade20k:
        inside += object_info_files(layout.root)
        own = any(path.is_file() for path in object_info_files(layout.root))
        if class_file and first_label is None and not own and Path(class_file).stem != ADE20K_CLASSES:
            fix = "say --first_label 1 if it is that (numbers from 1, 0 is ignored), else --first_label 0"
            raise UserError(f"--classes {class_file}: {layout.root} is arranged as ADE20K is, without its names; {fix}")
    path = Path(class_file) if class_file else next((each for each in inside if each.is_file()), None)
    ignored = None
    if path is not None:
        names, ignored = read_classes(path, "--classes" if class_file else "--data_path")
        origin = str(path)
    elif ade20k:
        names, origin = [f"class {number}" for number in range(1, 151)], "ADE20K"
    else:
        where = "--classes" if layout is None else f"--data_path {layout.root}: holds no classes.json, --classes"
        raise UserError(f"{where}: give a file with the names of the classes")
    first = int(ade20k) if first_label is None else first_label
    if not ignore_index:
        ignore_index = ignored if ignored is not None else ((0,) if first else (IGNORED,))
    return make_classes(names, first, ignore_index, origin)
