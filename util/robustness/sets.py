"""The columns of Table 5: whose images, in which layout, which answers are right, which classes compete.

`find_below` and `plan_tasks` touch file names only, and refuse a folder that is not the set that it is given for.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.data.datasets import open_images
from util.data.sources import ImageSource, JoinedSource
from util.robustness.imagenet import (
    NUM_VALIDATION,
    VALIDATION_NAME,
    Answer,
    Answers,
    imagenet_a_folders,
    imagenet_folders,
    imagenet_o_folders,
    imagenet_r_folders,
    imagenet_v2_folders,
    objectnet_folders,
    real_answers,
    si_score_folders,
    si_score_released,
    validation_labels,
)
from util.runtime.errors import UserError
from util.weights.reader import shortened

OBJECTNET_BORDER = 2  # red pixels around each image, which would tell the set

# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images as they are published: in folders whose names are the labels."""

    title: str
    folders: Callable[[], Answers]  # all that may be there, and what is right for their images
    images: int | None  # that are published in these folders
    usual: tuple[str, ...]  # names of the whole below --data_root, small and without punctuation
    required: Callable[[], Iterable[str]] | None = None  # folders of the complete set; None: all of `folders`
    has_others: bool = False  # folders of other names belong to it, and do not count

    @property
    def complete(self) -> set[str]:
        """The folders of the complete set."""
        return set((self.required or self.folders)())


_SI = dict(folders=si_score_folders, images=None, required=si_score_released)
IMAGE_SETS = {  # by their flags
    "imagenet": ImageSet(
        "ImageNet-1k's validation images",
        imagenet_folders,
        NUM_VALIDATION,
        ("imagenet", "imagenet1k", "in1k", "ilsvrc2012"),
    ),
    "imagenet_v2": ImageSet(
        "ImageNet-V2",
        imagenet_v2_folders,
        10_000,
        ("imagenetv2matchedfrequencyformatval", "imagenetv2matchedfrequency", "imagenetv2"),
    ),
    "imagenet_a": ImageSet("ImageNet-A", imagenet_a_folders, 7_500, ("imageneta",)),
    "imagenet_o": ImageSet("ImageNet-O", imagenet_o_folders, 2_000, ("imageneto",)),
    "sketch": ImageSet("ImageNet-Sketch", imagenet_folders, 50_889, ("imagenetsketch", "sketch")),
    "imagenet_r": ImageSet("ImageNet-R", imagenet_r_folders, 30_000, ("imagenetr",)),
    "objectnet": ImageSet("ObjectNet", objectnet_folders, 18_574, ("objectnet10", "objectnet"), has_others=True),
    "si_size": ImageSet("SI-Score, size", usual=("objectsize", "sisize", "area"), **_SI),
    "si_location": ImageSet(
        "SI-Score, location", usual=("objectlocation", "silocation", "location20area02min0pc"), **_SI
    ),
    "si_rotation": ImageSet("SI-Score, rotation", usual=("objectrotation", "sirotation", "rotation"), **_SI),
}
SI_FOLDERS = ("siscore", "siscoredataset")  # which may hold the last three


def plain_name(name: str) -> str:
    """A folder's name, as it is compared with `usual`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_below(root: Path) -> dict[str, str]:
    """The sets that a folder holds under one of their usual names: flag -> path.

    Raises:
        UserError: no such folder, or none of them in it.
    """
    if not root.is_dir():
        raise UserError(f"--data_root {root}: there is no such folder")
    below = {plain_name(path.name): path for path in sorted(root.iterdir()) if path.is_dir()}
    for name in set(SI_FOLDERS) & below.keys():
        below |= {plain_name(path.name): path for path in sorted(below[name].iterdir()) if path.is_dir()}
    found = {}
    for flag, images in IMAGE_SETS.items():
        names = [name for name in images.usual if name in below]
        if names:
            found[flag] = str(below[names[0]])
    if not found:
        raise UserError(
            f"--data_root {root}: holds none of the sets under its usual name (imagenet, imagenetv2, imagenet-a,"
            " imagenet-o, imagenet-r, sketch, objectnet-1.0, object_size, object_location, object_rotation)"
        )
    return found


@dataclass(frozen=True)
class OpenSet:
    """The images of a set that count."""

    source: ImageSource
    places: list[int]  # in the source
    answers: list[Answer]  # of each
    lacking: str  # what the published set has and this one lacks, in words
    numbers: list[int] | None = None  # of validation images, counted from 1; None: their names have none


def open_set(flag: str, path: str, partial: bool) -> OpenSet:
    """The images of a set below a path, once they are known to be that set's.

    Args:
        partial: it may lack classes and images.

    Raises:
        UserError: not there, another set, or incomplete.
    """
    images, where = IMAGE_SETS[flag], f"--{flag} {path}"
    source = open_images(path, "", "val", f"--{flag}")
    numbers = validation_numbers(source)
    if flag == "imagenet" and numbers is not None:
        return validation_set(source, numbers, where, partial)
    if numbers is not None:
        raise UserError(f"{where}: holds ImageNet-1k's validation images (ILSVRC2012_val_...), not {images.title}")
    folders = [source.class_names[label] for label in source.labels]
    refuse_others(images, set(folders), where)
    name = plain_name(Path(path).name)  # all that tells SI-Score's three apart
    named = [other for other, known in IMAGE_SETS.items() if other != flag and name in known.usual]
    if named:
        raise UserError(f"{where}: is named as the images of --{named[0]} are, give them to that flag")
    known = images.folders()
    places = [place for place, folder in enumerate(folders) if folder in known]
    lacking = what_is_lacking(images, {folders[place] for place in places}, len(places), where, partial)
    return OpenSet(source, places, [known[folders[place]] for place in places], lacking)


def refuse_others(images: ImageSet, found: set[str], where: str) -> None:
    """UserError where folders are not those of the set."""
    known = images.folders()
    unknown = sorted(found - known.keys())
    if (not images.has_others and not unknown) or (images.has_others and found & known.keys()):
        return
    alike = [other.title for other in IMAGE_SETS.values() if other.complete <= found and not other.has_others]
    raise UserError(
        f"{where}: is not {images.title}; {len(unknown)} of its {len(found)} folders are unknown there"
        f" ({shortened(unknown, 3)}), expected are {len(images.complete)} ({shortened(sorted(images.complete), 3)})"
        + (f"; it looks like {alike[0]}" if alike else "")
    )


def what_is_lacking(images: ImageSet, found: set[str], count: int, where: str, partial: bool) -> str:
    """What the published set has besides, in words; empty: nothing.

    Raises:
        UserError: something, unless `partial`, or there are more images than were published.
    """
    absent = sorted(images.complete - found)
    if images.images is not None and count > images.images:
        raise UserError(f"{where}: is not {images.title}, which has {images.images} images; {count} are here")
    lacking = []
    if absent:
        lacking.append(f"{len(images.complete) - len(absent)} of {len(images.complete)} classes")
    if images.images is not None and count < images.images:
        lacking.append(f"{count} of {images.images} images")
    if lacking and not partial:
        missing = f", without {shortened(absent, 3)}" if absent else ""
        same = [other.title for other in IMAGE_SETS.values() if other is not images and found == other.complete]
        raise UserError(
            f"{where}: holds {' and '.join(lacking)} of {images.title}{missing}"
            + (f"; it looks like {same[0]}" if same else "; --partial scores what is there")
        )
    return " and ".join(lacking)


def validation_numbers(source: ImageSource) -> list[int] | None:
    """The numbers in the names of ImageNet's validation images; None where a name has none."""
    matches = [VALIDATION_NAME.search(os.path.basename(source.name(place))) for place in range(len(source))]
    return [int(match[1]) for match in matches] if all(matches) else None


def validation_set(source: ImageSource, numbers: list[int], where: str, partial: bool) -> OpenSet:
    """ImageNet's validation images by their numbers, in one folder or in class folders, which must agree.

    Raises:
        UserError: a number is impossible or twice there, class folders disagree with the original labels, or
            images are missing.
    """
    known, labels = imagenet_folders(), validation_labels()
    wrong = [number for number in numbers if not 1 <= number <= NUM_VALIDATION]
    if wrong:
        raise UserError(f"{where}: holds an image number {wrong[0]}, ImageNet-1k's are 1 to {NUM_VALIDATION}")
    twice = len(numbers) - len(set(numbers))
    if twice:
        number = next(number for number, count in Counter(numbers).items() if count > 1)
        raise UserError(f"{where}: holds {twice} images twice, first number {number}; leave one of each")
    answers = [(int(labels[number - 1]),) for number in numbers]
    if source.class_names and set(source.class_names) & known.keys():
        folders = [source.class_names[label] for label in source.labels]
        differ = [i for i, folder in enumerate(folders) if known.get(folder) != answers[i]]
        if differ:
            right = {answer: wnid for wnid, answer in known.items()}[answers[differ[0]]]
            raise UserError(
                f"{where}: {len(differ)} of {len(numbers)} images lie in another folder than their class's, first"
                f" {source.name(differ[0])}, whose class is {right}; sort them anew, or give them in one flat folder"
            )
    wnids = list(known)
    found = {wnids[answer[0]] for answer in answers}
    lacking = what_is_lacking(IMAGE_SETS["imagenet"], found, len(numbers), where, partial)
    return OpenSet(source, list(range(len(numbers))), answers, lacking, numbers)


# --------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What gives a column of Table 5 its number."""

    key: str  # of the column in tables/paper.yaml
    source: ImageSource = field(repr=False)
    places: list[int] = field(repr=False)  # images of the source that count
    answers: list[Answer] = field(repr=False)  # of each: classes of ImageNet that are right; none: an outlier
    lacking: str = ""  # what the published set has besides
    classes: Answer | None = None  # classes of ImageNet that compete; None: all
    occluded: bool = False  # without its centre
    border: int = 0  # pixels that are cut off on each side

    @property
    def pass_key(self) -> tuple:
        """Equal for tasks that one pass over the images serves."""
        return (id(self.source), self.classes, self.occluded, self.border)


COLUMNS = {  # column of Table 5 -> the flag of its images
    "in1k": "imagenet",
    "v2": "imagenet_v2",
    "real": "imagenet",
    "a": "imagenet_a",
    "o": "imagenet_o",
    "sketch": "sketch",
    "r": "imagenet_r",
    "cocc": "imagenet",
    "objnet": "objectnet",
    "si_size": "si_size",
    "si_loc": "si_location",
    "si_rot": "si_rotation",
}


def flags_of(key: str) -> tuple[str, ...]:
    """The flags of all images that a column needs: IN-O is set against ImageNet's."""
    return (COLUMNS[key], "imagenet") if key == "o" else (COLUMNS[key],)


def plan_tasks(
    columns: Sequence[str], paths: Mapping[str, str], partial: bool, absent: str = "is not given"
) -> tuple[list[Task], dict[str, str]]:
    """The tasks of the columns whose images are there, and why each other column is missing.

    Args:
        paths: by the flags of IMAGE_SETS.
        absent: what to say of a flag that is not among them.

    Raises:
        UserError: a path holds something else, or less than is allowed.
    """
    needed = {flag for key in columns for flag in flags_of(key)}
    opened = functools.cache(lambda flag: open_set(flag, paths[flag], partial))
    for flag in IMAGE_SETS:  # all of them before any is used
        if flag in needed and flag in paths:
            opened(flag)
    tasks, missing = [], {}
    for key in columns:
        without = [flag for flag in flags_of(key) if flag not in paths]
        if without:
            missing[key] = " and ".join(f"--{flag}" for flag in without) + f" {absent}"
        elif key == "o":
            tasks.append(outlier_task(opened("imagenet_o"), opened("imagenet")))
        elif key == "real" and opened("imagenet").numbers is None:
            missing[key] = "the names of --imagenet's images have no number (ILSVRC2012_val_00000001.JPEG)"
        else:
            tasks.append(accuracy_task(key, opened(COLUMNS[key])))
    return tasks, missing


def accuracy_task(key: str, images: OpenSet) -> Task:
    """A column that is an accuracy."""
    common = dict(key=key, source=images.source, lacking=images.lacking)
    if key == "real":
        answers = [real_answers()[number - 1] for number in images.numbers]
        kept = [i for i, answer in enumerate(answers) if answer]  # an image without labels is left out
        return Task(**common, places=[images.places[i] for i in kept], answers=[answers[i] for i in kept])
    compete = {"a": imagenet_a_folders, "r": imagenet_r_folders}.get(key)
    return Task(
        **common,
        places=images.places,
        answers=images.answers,
        classes=None if compete is None else competing(compete()),
        occluded=key == "cocc",
        border=OBJECTNET_BORDER if key == "objnet" else 0,
    )


def outlier_task(outliers: OpenSet, validation: OpenSet) -> Task:
    """ImageNet-O: its images against the validation images of the same 200 classes (Hendrycks et al. 2021)."""
    against = set(outliers.answers)
    kept = [i for i, answer in enumerate(validation.answers) if answer in against]
    offset = len(outliers.source)
    return Task(
        key="o",
        source=JoinedSource([outliers.source, validation.source]),
        places=[*outliers.places, *(offset + validation.places[i] for i in kept)],
        answers=[*(() for _ in outliers.places), *(validation.answers[i] for i in kept)],
        lacking="; ".join(filter(None, (outliers.lacking, validation.lacking))),
        classes=competing(imagenet_o_folders()),
    )


def competing(folders: Answers) -> Answer:
    """The classes of all folders, in their order."""
    return tuple(sorted({place for answer in folders.values() for place in answer}))
