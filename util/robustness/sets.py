"""The columns of Table 5: their images and layouts, the correct answers, the classes that compete.

`find_sets` and `plan_tasks` read file names only, and refuse a folder that holds another set than its flag says.
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

OBJECTNET_BORDER = 2  # red pixels around each image, by which one could recognise the set

# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """A set as it is published: images in folders whose names are the labels."""

    title: str
    folders: Callable[[], Answers]  # the answers of all folders that the set may have
    images: int | None  # number of published images in these folders; None: unknown
    usual_names: tuple[str, ...]  # of the set's folder below --data_root, in lower case without punctuation
    required: Callable[[], Iterable[str]] | None = None  # folders of the complete set; None: all of `folders`
    has_others: bool = False  # the set has other folders too, whose images do not count

    @property
    def complete(self) -> set[str]:
        """Return the folders of the complete set."""
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
    "si_size": ImageSet("SI-Score, size", usual_names=("objectsize", "sisize", "area"), **_SI),
    "si_location": ImageSet(
        "SI-Score, location", usual_names=("objectlocation", "silocation", "location20area02min0pc"), **_SI
    ),
    "si_rotation": ImageSet("SI-Score, rotation", usual_names=("objectrotation", "sirotation", "rotation"), **_SI),
}
SI_FOLDERS = ("siscore", "siscoredataset")  # folders around the last three


def plain_name(name: str) -> str:
    """Return a folder's name in lower case without punctuation, to be compared with `usual_names`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_sets(root: Path) -> dict[str, str]:
    """Return the path of each set that a folder holds under a usual name, by flag; UserError if it holds none."""
    if not root.is_dir():
        raise UserError(f"--data_root {root}: there is no such folder")
    below = {plain_name(path.name): path for path in sorted(root.iterdir()) if path.is_dir()}
    for name in set(SI_FOLDERS) & below.keys():
        below |= {plain_name(path.name): path for path in sorted(below[name].iterdir()) if path.is_dir()}
    paths = {}
    for flag, image_set in IMAGE_SETS.items():
        names = [name for name in image_set.usual_names if name in below]
        if names:
            paths[flag] = str(below[names[0]])
    if not paths:
        raise UserError(
            f"--data_root {root}: holds none of the sets under its usual name (imagenet, imagenetv2, imagenet-a,"
            " imagenet-o, imagenet-r, sketch, objectnet-1.0, object_size, object_location, object_rotation)"
        )
    return paths


@dataclass(frozen=True)
class OpenSet:
    """The images of a set that are scored."""

    source: ImageSource
    indices: list[int]  # of these images in the source
    answers: list[Answer]  # of each
    lacking: str  # classes and images of the published set that are missing here, in words
    numbers: list[int] | None = None  # of ImageNet's validation images, from 1; None: their names have none


def open_set(flag: str, path: str, partial: bool) -> OpenSet:
    """Return the images of a set, after a check that the path holds this set.

    Args:
        partial: accept a set that lacks classes or images.

    Raises:
        UserError: the path does not exist, or holds another set or an incomplete one.
    """
    image_set, where = IMAGE_SETS[flag], f"--{flag} {path}"
    source = open_images(path, "", "val", f"--{flag}")
    numbers = validation_numbers(source)
    if flag == "imagenet" and numbers is not None:
        return validation_set(source, numbers, where, partial)
    if numbers is not None:
        raise UserError(f"{where}: holds ImageNet-1k's validation images (ILSVRC2012_val_...), not {image_set.title}")
    folders = [source.class_names[label] for label in source.labels]
    check_folders(image_set, set(folders), where)
    name = plain_name(Path(path).name)  # SI-Score's three sets differ in nothing else
    named = [other for other, known in IMAGE_SETS.items() if other != flag and name in known.usual_names]
    if named:
        raise UserError(f"{where}: is named like the images of --{named[0]}, give them to that flag")
    known = image_set.folders()
    indices = [index for index, folder in enumerate(folders) if folder in known]
    lacking = missing_parts(image_set, {folders[index] for index in indices}, len(indices), where, partial)
    return OpenSet(source, indices, [known[folders[index]] for index in indices], lacking)


def check_folders(image_set: ImageSet, folders: set[str], where: str) -> None:
    """Raise UserError if the folders are not those of the set."""
    known = image_set.folders()
    unknown = sorted(folders - known.keys())
    if (not image_set.has_others and not unknown) or (image_set.has_others and folders & known.keys()):
        return
    alike = [other.title for other in IMAGE_SETS.values() if other.complete <= folders and not other.has_others]
    expected = sorted(image_set.complete)
    raise UserError(
        f"{where}: is not {image_set.title}; {len(unknown)} of its {len(folders)} folders are unknown there"
        f" ({shortened(unknown, 3)}), expected are {len(expected)} ({shortened(expected, 3)})"
        + (f"; it looks like {alike[0]}" if alike else "")
    )


def missing_parts(image_set: ImageSet, folders: set[str], count: int, where: str, partial: bool) -> str:
    """Return how many of the published classes and images are present, in words; empty if all are.

    Raises:
        UserError: some are missing, unless `partial`; or there are more images than were published.
    """
    complete, published = image_set.complete, image_set.images
    absent = sorted(complete - folders)
    if published is not None and count > published:
        raise UserError(f"{where}: is not {image_set.title}, which has {published} images; {count} are here")
    lacking = []
    if absent:
        lacking.append(f"{len(complete) - len(absent)} of {len(complete)} classes")
    if published is not None and count < published:
        lacking.append(f"{count} of {published} images")
    if lacking and not partial:
        missing = f", without {shortened(absent, 3)}" if absent else ""
        same = [other.title for other in IMAGE_SETS.values() if other is not image_set and folders == other.complete]
        raise UserError(
            f"{where}: holds {' and '.join(lacking)} of {image_set.title}{missing}"
            + (f"; it looks like {same[0]}" if same else "; --partial scores what is there")
        )
    return " and ".join(lacking)


def validation_numbers(source: ImageSource) -> list[int] | None:
    """Return the numbers in the names of ImageNet's validation images; None if a name has none."""
    matches = [VALIDATION_NAME.search(os.path.basename(source.name(index))) for index in range(len(source))]
    return [int(match[1]) for match in matches] if all(matches) else None


def validation_set(source: ImageSource, numbers: list[int], where: str, partial: bool) -> OpenSet:
    """Return ImageNet's validation images with the original labels, which their numbers tell.

    Raises:
        UserError: a number is impossible or comes twice, a class folder disagrees with the original label, or images
            are missing.
    """
    known, labels = imagenet_folders(), validation_labels()
    wrong = [number for number in numbers if not 1 <= number <= NUM_VALIDATION]
    if wrong:
        raise UserError(f"{where}: holds an image number {wrong[0]}, ImageNet-1k's are 1 to {NUM_VALIDATION}")
    repeated = len(numbers) - len(set(numbers))
    if repeated:
        number = next(number for number, count in Counter(numbers).items() if count > 1)
        raise UserError(f"{where}: holds {repeated} images twice, first number {number}; leave one of each")
    answers = [(int(labels[number - 1]),) for number in numbers]
    wnids = list(known)
    if source.class_names and set(source.class_names) & known.keys():
        folders = [source.class_names[label] for label in source.labels]
        misplaced = [i for i, folder in enumerate(folders) if known.get(folder) != answers[i]]
        if misplaced:
            name, wnid = source.name(misplaced[0]), wnids[answers[misplaced[0]][0]]
            raise UserError(
                f"{where}: {len(misplaced)} of {len(numbers)} images lie in another folder than their class's, first"
                f" {name}, whose class is {wnid}; sort them again, or give them in one flat folder"
            )
    present = {wnids[answer[0]] for answer in answers}
    lacking = missing_parts(IMAGE_SETS["imagenet"], present, len(numbers), where, partial)
    return OpenSet(source, list(range(len(numbers))), answers, lacking, numbers)


# --------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The images of a column of Table 5, their preparation and their metrics."""

    key: str  # of the column in tables/paper.yaml
    source: ImageSource = field(repr=False)
    indices: list[int] = field(repr=False)  # of the scored images in the source
    answers: list[Answer] = field(repr=False)  # of each: the correct classes of ImageNet; empty: an outlier
    lacking: str = ""  # classes and images of the published set that are missing, in words
    classes: Answer | None = None  # classes of ImageNet that compete; None: all
    occluded: bool = False  # the centre of each image is covered
    border: int = 0  # pixels that are cut off on each side

    @property
    def pass_key(self) -> tuple:
        """Return a key that is equal for tasks that share one pass over the images."""
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
    """Return the flags of all images that a column needs; the inliers of IN-O are images of ImageNet."""
    return (COLUMNS[key], "imagenet") if key == "o" else (COLUMNS[key],)


def plan_tasks(
    columns: Sequence[str], paths: Mapping[str, str], partial: bool, absent: str = "is not given"
) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks of the columns whose images are given, and for each other column why it is missing.

    Args:
        paths: by the flags of IMAGE_SETS.
        absent: how the reason ends for a flag that has no path.

    Raises:
        UserError: a path holds another set, or an incomplete one without `partial`.
    """
    needed = {flag for key in columns for flag in flags_of(key)}
    opened = functools.cache(lambda flag: open_set(flag, paths[flag], partial))
    for flag in IMAGE_SETS:  # wrong paths are refused before any evaluation
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
    """Return the task of a column that is an accuracy."""
    common = dict(key=key, source=images.source, lacking=images.lacking)
    if key == "real":
        answers = [real_answers()[number - 1] for number in images.numbers]
        labelled = [i for i, answer in enumerate(answers) if answer]  # ReaL leaves the others out
        return Task(**common, indices=[images.indices[i] for i in labelled], answers=[answers[i] for i in labelled])
    compete = {"a": imagenet_a_folders, "r": imagenet_r_folders}.get(key)
    return Task(
        **common,
        indices=images.indices,
        answers=images.answers,
        classes=None if compete is None else competing(compete()),
        occluded=key == "cocc",
        border=OBJECTNET_BORDER if key == "objnet" else 0,
    )


def outlier_task(outliers: OpenSet, validation: OpenSet) -> Task:
    """Return the task of ImageNet-O: its images against validation images of 200 classes (Hendrycks et al. 2021)."""
    classes = set(outliers.answers)
    inliers = [i for i, answer in enumerate(validation.answers) if answer in classes]
    offset = len(outliers.source)
    return Task(
        key="o",
        source=JoinedSource([outliers.source, validation.source]),
        indices=[*outliers.indices, *(offset + validation.indices[i] for i in inliers)],
        answers=[*(() for _ in outliers.indices), *(validation.answers[i] for i in inliers)],
        lacking="; ".join(filter(None, (outliers.lacking, validation.lacking))),
        classes=competing(imagenet_o_folders()),
    )


def competing(folders: Answers) -> Answer:
    """Return the classes of all folders, sorted."""
    return tuple(sorted({index for answer in folders.values() for index in answer}))
