"""Images with masks on disk: which mask belongs to which image, what its numbers mean, and what is wrong with it.

Inside the program a mask is uint8 [h, w]: the number of a class, counted from 0, or `IGNORED`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.decode import turned, warn_of_unused_bits
from util.data.folders import open_folder
from util.data.formats import Exif, ending_of, is_hidden, open_image, orientation_of, size_of
from util.data.sources import BadImage, FileSource, open_file
from util.data.splits import matching_names, split_kind, the_one
from util.runtime.errors import UserError

IGNORED = 255  # pixels that neither train nor count
MOST_CLASSES = 255
MASK_FOLDERS = ("masks", "annotations")
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")  # lossless ones
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
        """Return the numbers that a mask may hold, in words."""
        ignored = self.table == IGNORED
        classes = in_words(np.flatnonzero(~ignored & (self.table != UNKNOWN)).tolist())
        return (
            f"{len(self.names)} classes ({classes}) and ignores {in_words(np.flatnonzero(ignored).tolist()) or 'none'}"
        )


def make_classes(names: Sequence[str], first_label: int, ignored: Sequence[int], origin: str) -> Classes:
    """Return the classes `first_label`, `first_label` + 1, ...; a number among `ignored` is none of them.

    Raises:
        UserError: fewer than two classes, or more than a mask can tell apart.
    """
    table = np.full(2**16, UNKNOWN, dtype=np.int16)
    numbers = [number for number in range(first_label, first_label + len(names)) if number not in ignored]
    class_names = tuple(names[number - first_label] for number in numbers)
    if not 2 <= len(class_names) <= MOST_CLASSES:
        raise UserError(f"{origin}: names {len(class_names)} classes, there must be 2 to {MOST_CLASSES}")
    table[numbers] = np.arange(len(class_names))
    table[[number for number in ignored if number < len(table)]] = IGNORED
    return Classes(class_names, table, origin)


def read_classes(path: Path, flag: str) -> tuple[list[str], tuple[int, ...] | None]:
    """Return the names in a class file, and the numbers that it ignores (None: it does not say).

    Raises:
        UserError: there is no such file, or it has no known form.
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


def json_classes(content: Any) -> tuple[list[str], tuple[int, ...] | None]:
    """Read a list of names, or an object with `class_names` and perhaps `ignore_index`, one number or several."""
    ignored = None
    if isinstance(content, dict):
        if "ignore_index" in content:
            given = content["ignore_index"]
            ignored = tuple(int(n) for n in (given if isinstance(given, list) else [given]))
        content = content["class_names"]
    if not isinstance(content, list):
        raise TypeError("no list")
    return [str(name) for name in content], ignored


def object_info(text: str) -> list[str]:
    """Read the first synonym of each class in ADE20K's objectInfo150.txt (tabs) or .csv (commas), in their order."""
    delimiter = "\t" if "\t" in text.splitlines()[0] else ","
    rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
    return [re.split("[;,]", row["Name"])[0].strip() for row in sorted(rows, key=lambda row: int(row["Idx"]))]


def in_words(numbers: Sequence[int]) -> str:
    """Return sorted numbers as `0 to 10, 255`."""
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


ORIENTED = IGNORED + 1  # in counts of pixels: the place of the number of images with an EXIF orientation


@dataclass
class MaskedSource(FileSource):
    """Image files, each with a mask; `class_names` are those of pixels."""

    masks: list[str]
    classes: Classes

    def read_mask(self, index: int, size: tuple[int, int], exif: Exif = "ignore") -> Tensor:
        """Return the mask of an image of `size` (height, width), uint8 [h, w].

        Args:
            exif: what is done with the orientation of images; the mask's own, which is rare, is treated alike.

        Raises:
            BadImage: the file cannot be decoded.
            UserError: it is no mask, has another size, or holds a number that is no class.
        """
        path = self.masks[index]
        try:
            with open_file(path) as file, open_image(file) as image:
                check_is_mask(path, image)
                self.check_mask_size(index, size_of(image, exif), (size[1], size[0]))
                orientation = orientation_of(image)
                numbers = decode_numbers(image)
                classes = self.to_classes(path, numbers)
                return turned(classes, image, orientation, exif)
        except BadImage as error:
            raise BadImage(f"{path}: {error}") from error

    def subset(self, indices: Sequence[int]) -> MaskedSource:
        """Return the source of some of the images with their masks."""
        return dataclasses.replace(self, paths=[self.paths[i] for i in indices], masks=[self.masks[i] for i in indices])

    def check_mask_size(self, index: int, mask: tuple[int, int], image: tuple[int, int]) -> None:
        """Raise UserError unless both (width, height) are equal."""
        if mask != image:
            sizes = f"is {mask[0]} x {mask[1]} pixels, its image {self.paths[index]} {image[0]} x {image[1]}"
            raise UserError(f"{self.masks[index]}: {sizes}; make the mask again in the image's size")

    def to_classes(self, path: str, numbers: np.ndarray) -> Tensor:
        """Return the classes, uint8 [h, w], of a mask's numbers [h, w]; UserError where one is no class."""
        for number in (int(numbers.min()), int(numbers.max())):
            if not 0 <= number < len(self.classes.table):
                raise self.out_of_range(path, number)
        classes = self.classes.table[numbers]
        if classes.min() == UNKNOWN:
            raise self.out_of_range(path, int(numbers[classes == UNKNOWN].min()))
        return torch.from_numpy(classes.astype(np.uint8))

    def out_of_range(self, path: str, number: int) -> UserError:
        """Return the error for a number that is no class."""
        classes = self.classes
        return UserError(
            f"{path}: holds the number {number}, but {classes.origin} knows {classes.known};"
            " mend it, or see --classes, --first_label and --ignore_index"
        )

    def count(self, index: int, exif: Exif = "ignore") -> np.ndarray:
        """Return the pixels of each class in a mask, [257]: IGNORED at its own place, and 1 at ORIENTED if it is so.

        Raises:
            BadImage, UserError: as `read_mask`, for the image too.
        """
        path = self.paths[index]
        try:
            with open_file(path) as file, open_image(file) as image:
                (width, height), orientation = size_of(image, exif), orientation_of(image)
        except BadImage as error:
            raise BadImage(f"{path}: {error}") from error
        classes = self.read_mask(index, (height, width), exif).flatten().numpy()
        counts = np.bincount(classes, minlength=ORIENTED + 1)
        counts[ORIENTED] = orientation != 1
        return counts


def check_is_mask(path: str, image: Image.Image) -> None:
    """Raise UserError for a picture of colours."""
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise UserError(f"{path}: is a picture ({image.mode}), not a mask; save class numbers in one channel, as PNG")


def decode_numbers(image: Image.Image) -> np.ndarray:
    """Return the numbers [h, w] of an open mask, int64."""
    try:
        return np.asarray(image).astype(np.int64)
    except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error


def pair_up(
    images: Path, masks: Path, classes: Classes, image_suffix: str, mask_suffix: str, flags: tuple[str, str]
) -> MaskedSource:
    """Give each image below a folder the mask of the same name below the other one.

    Raises:
        UserError: a folder is missing or empty, an image has no mask, or a mask's name occurs with two endings.
    """
    for path, flag in zip((images, masks), flags, strict=True):
        if not path.is_dir():
            raise UserError(f"{flag} {path}: there is no such folder")
    source = open_folder(images, flags[0])
    warn_of_unused_bits(source, f"{flags[0]} {images}")
    mask_of: dict[str, str] = {}
    for path in sorted(mask_files(masks)):
        stem = os.path.splitext(path)[0]
        if stem in mask_of:
            raise UserError(f"{flags[1]} {masks}: holds {mask_of[stem]} and {path}, remove one of the two")
        mask_of[stem] = path
    stems = [stem_of_mask(path, images, image_suffix, mask_suffix, flags[0]) for path in source.paths]
    lacking = [path for path, stem in zip(source.paths, stems, strict=True) if stem not in mask_of]
    if lacking:
        stem = stem_of_mask(lacking[0], images, image_suffix, mask_suffix, flags[0])
        more = f" ({len(lacking)} of {len(stems)} images have none)" if len(lacking) > 1 else ""
        raise UserError(f"{lacking[0]}: has no mask {masks / stem}{MASK_ENDINGS[0]}{more}")
    return MaskedSource(
        source.paths, None, list(classes.names), [str(masks / mask_of[stem]) for stem in stems], classes
    )


def mask_files(folder: Path) -> Iterator[str]:
    """Yield the paths, below `folder`, of files that may be masks."""
    for around, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            if ending_of(name) in MASK_ENDINGS and not is_hidden(name):
                yield os.path.relpath(os.path.join(around, name), folder)


def stem_of_mask(image: str, folder: Path, image_suffix: str, mask_suffix: str, flag: str) -> str:
    """Return the path of an image's mask below the folder of masks, without its ending."""
    stem = os.path.splitext(os.path.relpath(image, folder))[0]
    if not stem.endswith(image_suffix):
        raise UserError(f"--image_suffix {image_suffix}: {image} does not end so, mend the flag or {flag}")
    return stem.removesuffix(image_suffix) + mask_suffix


# --------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The arrangement of a folder of the data set."""

    root: Path
    mask_folder: str
    ade20k: bool  # numbers start at 1, and 0 is ignored

    def folders(self, split: str) -> tuple[Path, Path]:
        """Return the folders of images and masks of a split, under one of its names.

        Raises:
            UserError: there is none, or several.
        """
        images = one_split(self.root / "images", split)
        if images is None:
            fix = f"name one {split}, or give --{split}_images and --{split}_masks"
            raise UserError(f"--data_path {self.root}: has no folder images/{split}; {fix}")
        masks = self.root / self.mask_folder / images.name
        return images, masks if masks.is_dir() else one_split(masks.parent, split) or masks


def one_split(folder: Path, split: str) -> Path | None:
    """Return the folder of a split in a folder of splits, or None; UserError where there are several."""
    name = the_one(
        matching_names([path.name for path in folder.iterdir() if path.is_dir()], split), "--data_path", folder
    )
    return folder / name if name else None


def find_layout(data_path: str) -> Layout:
    """Return how --data_path is arranged; UserError where it holds no images with masks."""
    root = Path(data_path)
    if not root.exists():
        raise UserError(f"--data_path {root}: there is no such folder")
    wanted = "a segmentation's folder has images/ and masks/ (or annotations/)"
    if not root.is_dir():
        raise UserError(f"--data_path {root}: is a file, {wanted}")
    masks = next((name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        names = sorted(path.name for path in root.iterdir())
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"
        hint = "; is it one for main_finetune.py?" if any(map(split_kind, names)) else ""
        raise UserError(f"--data_path {root}: holds {shown}, but {wanted}{hint}")
    marks = [root / "annotations" / name for name in ("training", "validation")] + object_info_files(root)
    native = masks == "annotations" and any(mark.exists() for mark in marks)
    native = native and not any((root / name).exists() for name in CLASS_FILES)
    return Layout(root, masks, ade20k=native)


def object_info_files(root: Path) -> list[Path]:
    """Return the files in which ADE20K's names of classes may be."""
    return [root / f"{ADE20K_CLASSES}{suffix}" for suffix in (".txt", ".csv")]


def find_classes(
    layout: Layout | None, class_file: str, first_label: int | None, ignore_index: tuple[int, ...]
) -> Classes:
    """Find what the numbers in the masks mean: by flags, by a file in the data set's folder, or as in ADE20K.

    Raises:
        UserError: neither flags nor a file say it.
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
