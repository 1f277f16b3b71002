"""Data sets in the layout that their authors publish, by name: those that transfer learning is measured on.

`train` is all that a set's protocol trains on (of Aircraft and Flowers the training and validation parts together),
`val` what it is judged by: the test part, of iNaturalist the validation part, whose labels alone are public. Labels
count from 0 in the order of the set's own class numbers or list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.data.banner import BannerlessSource
from util.data.folders import open_folder
from util.data.sources import ArraySource, FileSource, ImageSource
from util.runtime.errors import UserError


@dataclass(frozen=True)
class Published:
    """A data set, and the files by which its folder is recognised."""

    title: str
    home: str  # where to get it
    archive: str  # folder that its archive unpacks to, inside --data_path; empty: it has none of its own
    files: tuple[tuple[str, ...], ...]  # all files of one of these groups exist
    read: Callable[[Path, str], ImageSource]  # arguments: the folder that holds the files, and `train` or `val`
    never: str = ""  # file by which another set with the same files is told apart


def open_published(dataset: str, data_path: str, split: str) -> ImageSource:
    """Open a split of one of DATASETS, in --data_path, or there in a folder of its name or its archive's.

    Raises:
        UserError: the set is not there, is another one of them, or its lists do not agree.
    """
    published = DATASETS[dataset]
    title = published.title
    if not data_path:
        raise UserError(f"--data_path: is missing, --dataset {dataset} needs the folder of {title}")
    if not os.path.exists(data_path):
        raise UserError(f"--data_path {data_path}: there is no such file or folder")
    folder = find(dataset, Path(data_path))
    if folder is None:
        raise UserError(
            f"--data_path {data_path}: is not {title}, {expected_files(dataset)}{other_set(Path(data_path))}"
        )
    try:
        source = published.read(folder, split)
    except UserError:
        raise
    except Exception as error:  # lists of another program, cut short, not text, ...: each reader raises its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--data_path {folder}: cannot be read as {title} ({reason})") from error
    if not len(source):
        raise UserError(f"--data_path {folder}: the lists of {title} name no image of split {split}")
    if isinstance(source, FileSource):
        check_paths(source, folder, title)
    return source


def check_paths(source: FileSource, folder: Path, title: str) -> None:
    """Raise UserError if a list names a file outside of its set's folder, or its first or last file is missing."""
    inside = str(folder / "x")[:-1]  # "" for the current folder
    for path in source.paths:
        below = path.removeprefix(inside)
        if not path.startswith(inside) or below.startswith("/") or "/../" in f"/{below}":
            raise UserError(f"--data_path {folder}: the lists of {title} name {path}, which is not in this folder")
    for path in (source.paths[0], source.paths[-1]):
        if not os.path.isfile(path):
            raise UserError(f"--data_path {folder}: the lists of {title} name {path}, which is not there")


def find(dataset: str, root: Path) -> Path | None:
    """Return the folder with the files of the data set, or None."""
    published = DATASETS[dataset]
    for folder in dict.fromkeys((root, root / dataset, root / published.archive)):
        complete = any(all(os.path.exists(folder / name) for name in group) for group in published.files)
        if complete and not (published.never and os.path.exists(folder / published.never)):
            return folder
    return None


def expected_files(dataset: str) -> str:
    """Return in words what `find` looks for."""
    published = DATASETS[dataset]
    groups = " or ".join(", ".join(group) for group in published.files)
    inside = [f"{name}/" for name in dict.fromkeys((dataset, published.archive)) if name]
    return f"looked for {groups} in it and in its {', '.join(inside)}"


def other_set(root: Path) -> str:
    """Return in words which of DATASETS a folder is; nothing where it is none."""
    return next((f"; it holds {DATASETS[name].title} (--dataset {name})" for name in DATASETS if find(name, root)), "")


# --------------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------------


def numbered(paths: Sequence[Path], ids: Sequence[int], names: Mapping[int, str]) -> FileSource:
    """Return files with labels: the rank of each class id among all ids, the keys of `names`."""
    sorted_ids = sorted(names)
    labels = {number: label for label, number in enumerate(sorted_ids)}
    return FileSource([str(path) for path in paths], [labels[n] for n in ids], [names[n] for n in sorted_ids])


def birds(folder: Path, split: str) -> FileSource:
    """Read CUB-200-2011 and NABirds: `image path`, `image class` and `image 1-if-training`, a line each.

    An image is known by its number (CUB) or UUID (NABirds). Of NABirds' 1,011 numbered classes most are inner nodes of
    a hierarchy, or leaves without an image: the classes are those that occur, 555 in the whole set.
    """
    paths, classes = columns(folder / "images.txt"), columns(folder / "image_class_labels.txt")
    in_training, names = columns(folder / "train_test_split.txt"), columns(folder / "classes.txt")
    occurring = {int(number) for number in classes.values()}
    images = [image for image in paths if (in_training[image] == "1") == (split == "train")]
    return numbered(
        [folder / "images" / paths[image] for image in images],
        [int(classes[image]) for image in images],
        {int(number): name for number, name in names.items() if int(number) in occurring},
    )


def columns(path: Path) -> dict[str, str]:
    """Return the first word of each line -> the rest of it."""
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {key: rest.strip() for key, rest in lines}


def dogs(folder: Path, split: str) -> FileSource:
    """Read Stanford Dogs: lists in MATLAB files, labels from 1; a class is named by its folder, n02085620-Chihuahua."""
    lists = folder if (folder / "train_list.mat").exists() else folder / "lists"
    files, labels = {}, {}
    for name, part in (("train", "train"), ("val", "test")):
        columns_of = load_mat(lists / f"{part}_list.mat")
        files[name] = [str(cell.item()) for cell in columns_of["file_list"].ravel()]
        labels[name] = columns_of["labels"].ravel().astype(int).tolist()
    names = {
        label: Path(file).parent.name for name in files for file, label in zip(files[name], labels[name], strict=True)
    }
    return numbered([folder / "Images" / file for file in files[split]], labels[split], names)


def flowers(folder: Path, split: str) -> FileSource:
    """Read Oxford Flowers-102: images and labels are numbered from 1; `setid.mat` names the parts by their purpose.

    `trnid` and `valid` have 10 images per class each, `tstid` the other 6,149. torchvision has this reader, but shows
    labels with decoded images only; the test compares the two.
    """
    parts, labels = load_mat(folder / "setid.mat"), load_mat(folder / "imagelabels.mat")["labels"].ravel().astype(int)
    chosen = ("trnid", "valid") if split == "train" else ("tstid",)
    images = np.concatenate([parts[name].ravel() for name in chosen]).astype(int).tolist()
    paths = [folder / "jpg" / f"image_{image:05d}.jpg" for image in images]
    names = {number: f"{number:03d}" for number in set(labels.tolist())}
    return numbered(paths, [int(labels[image - 1]) for image in images], names)


def load_mat(path: Path) -> dict[str, Any]:
    """Return the arrays of a MATLAB file by their names."""
    from scipy.io import loadmat

    return loadmat(path)


def aircraft(folder: Path, split: str) -> FileSource:
    """Read FGVC-Aircraft, 100 variants: `0056978 F/A-18` per image, in the order of variants.txt (as torchvision)."""
    variants = [line.strip() for line in (folder / "variants.txt").read_text(encoding="utf-8").splitlines()]
    names = dict(enumerate(name for name in variants if name))
    numbers = {name: number for number, name in names.items()}
    variant_of = columns(folder / f"images_variant_{'trainval' if split == 'train' else 'test'}.txt")
    paths = [folder / "images" / f"{image}.jpg" for image in variant_of]
    return numbered(paths, [numbers[name] for name in variant_of.values()], names)


def aircraft_cropped(folder: Path, split: str) -> BannerlessSource:
    """Read FGVC-Aircraft without the banner of 20 pixels at the bottom of each image."""
    images = aircraft(folder, split)
    return BannerlessSource(images.paths, images.labels, images.class_names)


def naturalist(train: str, val: str) -> Callable[[Path, str], FileSource]:
    """Return a reader of iNaturalist's annotations, in COCO's form; paths are relative to the JSON file."""

    def read(folder: Path, split: str) -> FileSource:
        content = json.loads((folder / (train if split == "train" else val)).read_text(encoding="utf-8"))
        category = {each["image_id"]: each["category_id"] for each in content["annotations"]}
        images = [image for image in content["images"] if image["id"] in category]
        return numbered(
            [folder / image["file_name"] for image in images],
            [category[image["id"]] for image in images],
            {each["id"]: str(each["name"]) for each in content["categories"]},
        )

    return read


MINI = {"train": ("train_mini", "2021_train_mini"), "val": ("val", "2021_valid")}  # by its archives, by torchvision


def naturalist_mini(folder: Path, split: str) -> FileSource:
    """Read iNaturalist 2021 mini by its annotations, or by its folders, whose names begin with the class number."""
    if all((folder / name).exists() for name in ("train_mini.json", "val.json")):
        return naturalist("train_mini.json", "val.json")(folder, split)
    return open_folder(next(folder / name for name in MINI[split] if (folder / name).is_dir()), "--data_path")


def cifar(number: int) -> Callable[[Path, str], ArraySource]:
    """Return torchvision's reader of CIFAR-10 or CIFAR-100, which checks each pickled file's MD5 before it opens it."""

    def read(folder: Path, split: str) -> ArraySource:
        from torchvision import datasets

        base = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[number]
        reader = type(base.__name__, (base,), {"base_folder": ""})  # the files are in `folder` itself
        images = reader(str(folder), train=split == "train")
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()  # [N, 32, 32, 3] -> [N, 3, 32, 32]
        return ArraySource(pixels, [int(label) for label in images.targets], list(images.classes), f"cifar{number}")

    return read


INATURALIST = "https://github.com/visipedia/inat_comp"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images")
BATCHES = tuple(f"data_batch_{n}" for n in range(1, 6))

# names are also those of the columns of Tables 2 and 3 in tables/paper.yaml
DATASETS = {
    "inat2018": Published(
        "iNaturalist 2018",
        INATURALIST,
        "",
        (("train2018.json", "val2018.json"),),
        naturalist("train2018.json", "val2018.json"),
    ),
    "inat2019": Published(
        "iNaturalist 2019",
        INATURALIST,
        "",
        (("train2019.json", "val2019.json"),),
        naturalist("train2019.json", "val2019.json"),
    ),
    "inat2021_mini": Published(
        "iNaturalist 2021 mini",
        INATURALIST,
        "",
        (("train_mini.json", "val.json"), ("train_mini", "val"), ("2021_train_mini", "2021_valid")),
        naturalist_mini,
    ),
    "aircraft": Published(
        "FGVC-Aircraft",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        "fgvc-aircraft-2013b/data",
        (("images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"),),
        aircraft,
    ),
    "aircraft_cropped": Published(
        "FGVC-Aircraft",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        "fgvc-aircraft-2013b/data",
        (("images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"),),
        aircraft_cropped,
    ),
    "nabirds": Published(
        "NABirds", "https://dl.allaboutbirds.org/nabirds", "nabirds", ((*LISTS, "hierarchy.txt"),), birds
    ),
    "cub200": Published(
        "CUB-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        "CUB_200_2011",
        (LISTS,),
        birds,
        never="hierarchy.txt",
    ),
    "cifar10": Published(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-10-batches-py",
        ((*BATCHES, "test_batch", "batches.meta"),),
        cifar(10),
    ),
    "cifar100": Published(
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-100-python",
        (("train", "test", "meta"),),
        cifar(100),
    ),
    "dogs": Published(
        "Stanford Dogs",
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        "",
        (("Images", "train_list.mat", "test_list.mat"), ("Images", "lists/train_list.mat", "lists/test_list.mat")),
        dogs,
    ),
    "flowers102": Published(
        "Oxford Flowers-102",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        "flowers-102",
        (("jpg", "imagelabels.mat", "setid.mat"),),
        flowers,
    ),
}


# --------------------------------------------------------------------------------------------------------
# Download
# --------------------------------------------------------------------------------------------------------


def download(dataset: str, data_path: str) -> None:
    """Fetch a data set into --data_path by torchvision, unless it is there.

    Raises:
        UserError: torchvision has no download of it, or it failed.
    """
    from torchvision import datasets

    if find(dataset, Path(data_path)) is not None:
        return
    fetch: dict[str, Callable[[], Any]] = {
        "cifar10": lambda: datasets.CIFAR10(data_path, download=True),
        "cifar100": lambda: datasets.CIFAR100(data_path, download=True),
        "flowers102": lambda: datasets.Flowers102(data_path, download=True),
        "aircraft": lambda: datasets.FGVCAircraft(data_path, download=True),
        "inat2021_mini": lambda: [
            datasets.INaturalist(data_path, version=part, download=True) for part in ("2021_train_mini", "2021_valid")
        ],
    }
    title, home = DATASETS[dataset].title, DATASETS[dataset].home
    if dataset not in fetch:
        raise UserError(f"--download: torchvision cannot fetch {title}, get it from {home} and unpack it")
    try:
        fetch[dataset]()
    except Exception as error:  # no network, no space, a changed file, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--download: {title} cannot be fetched into {data_path} ({reason})") from error
