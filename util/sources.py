"""Where images are: folders, tar files, embedded digits, and the readers of timm and torchvision.

`open_images` finds them; a source gives image number i undecoded.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from util.errors import UserError
from util.shards import read_shard


class BadImage(Exception):
    """An image that cannot be read or decoded; the message says why, not which."""


# --------------------------------------------------------------------------------------------------------
# Sources: a list of encoded images, by index
# --------------------------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """Images by index, undecoded, with the name of each and its label where it has one."""

    labels: list[int] | None
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """Encoded bytes, a PIL image, or pixels [C, h, w]."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class Names(Sequence[str]):
    """Strings in two arrays.

    Of a list each loader process would soon have a copy of its own: what is read counts its readers, and so the memory
    that a fork shares is written. 140 bytes for each of ImageNet's names, in each of 80 processes, are 14 GB.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


Member = tuple[str, str, int, int]  # tar file, name, offset, bytes


class Members(Sequence[Member]):
    """Members of tar files in arrays, for the same reason."""

    def __init__(self, members: Sequence[Member]):
        self._tars = sorted({tar for tar, *_ in members})
        numbers = {tar: number for number, tar in enumerate(self._tars)}
        self._names = Names(name for _, name, _, _ in members)
        self._places = np.array([(numbers[tar], *place) for tar, _, *place in members], np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Member:
        tar, offset, size = self._places[index].tolist()
        return self._tars[tar], self._names[index], offset, size


@dataclass
class FileSource:
    """Image files in a folder."""

    paths: Sequence[str]
    labels: list[int] | None
    class_names: list[str] | None

    def __post_init__(self) -> None:
        self.paths = Names(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        with open(self.paths[index], "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        """Its path."""
        return self.paths[index]


@dataclass
class TarSource:
    """Image files inside uncompressed .tar files.

    Members are read by their offset (`pread`), not through `tarfile`: an open `tarfile` has one position, which
    forked loader processes would share.
    """

    members: Sequence[Member]
    labels: list[int] | None
    class_names: list[str] | None
    _files: dict[tuple[int, str], int] = field(default_factory=dict)  # (process, tar file) -> descriptor

    def __post_init__(self) -> None:
        self.members = Members(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        tar, _, offset, size = self.members[index]
        key = (os.getpid(), tar)
        if key not in self._files:
            self._files[key] = os.open(tar, os.O_RDONLY)
        return os.pread(self._files[key], size, offset)

    def name(self, index: int) -> str:
        """tar file and member."""
        tar, name, _, _ = self.members[index]
        return f"{tar}:{name}"


@dataclass
class ArraySource:
    """Images that are in memory already."""

    images: Tensor  # [N, C, h, w] uint8
    labels: list[int] | None
    class_names: list[str] | None
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Pixels [C, h, w]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Number in the data set."""
        return f"{self.title}[{index}]"


@dataclass
class ReaderSource:
    """A reader of timm's that yields (file, label), or a data set of torchvision's: (PIL image, label)."""

    dataset: Any
    title: str
    labels: list[int] | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes | Image.Image:
        """The image, decoded or not."""
        try:
            image = self.dataset[index][0]
            if isinstance(image, Image.Image):
                return image
            with image as file:
                return file.read()
        except Exception as error:  # each reader raises its own
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Number in the data set."""
        return f"{self.title}[{index}]"


@dataclass
class SubsetSource:
    """Some images of another source, by their numbers in it."""

    source: ImageSource
    indices: np.ndarray  # [n] int64
    labels: list[int] | None = field(init=False)

    def __post_init__(self) -> None:
        known = self.source.labels
        self.labels = None if known is None else [known[index] for index in self.indices]

    @property
    def class_names(self) -> list[str] | None:
        """Of the whole source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """As the source."""
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        """As the source."""
        return self.source.name(self.indices[index])


def hold_out(source: ImageSource, share: float) -> tuple[SubsetSource, SubsetSource]:
    """A labelled source in two: what stays, and `share` of each class, one image at least; of one image none.

    Which images these are follows from the source and the share alone: all runs hold out the same.
    """
    labels = np.array(source.labels)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    held = np.zeros(len(labels), dtype=bool)
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # one class after the other
        held[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    stays, goes = (np.flatnonzero(chosen) for chosen in (~held, held))
    return SubsetSource(source, stays), SubsetSource(source, goes)


@dataclass
class JoinedSource:
    """The images of several sources, one after the other; labels are left behind, since their numbers may differ."""

    parts: Sequence[ImageSource]
    labels: None = None
    class_names: None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """As the part that holds it."""
        part, index = self._find(index)
        return part.read(index)

    def name(self, index: int) -> str:
        """As the part that holds it."""
        part, index = self._find(index)
        return part.name(index)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
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
        from util.published import open_published

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


def without_training_images(flag: str, path: Path, val: str) -> UserError:
    """Training on validation images, which is what is left there, is never meant."""
    fix = "name the training images train, or give their own folder or .tar, and the others to --val_path"
    return UserError(f"{flag} {path}: holds {val} but no train, {fix}")


def names_a_split(path: Path) -> bool:
    """Whether a folder is called as one."""
    return any(path.name in names for names in SPLIT_NAMES.values())


def classes_beside(train: Path) -> list[str]:
    """The folders beside `train` that hold images themselves."""
    if not train.is_dir():
        return []
    folders = sorted(path for path in train.parent.iterdir() if path.is_dir() and path != train)
    return [folder.name for folder in folders if any(map(is_image, os.listdir(folder)))]


def train_is_a_class(flag: str, path: Path, train: str, beside: Sequence[str]) -> UserError:
    """For a folder of which one cannot know whether `train` is a split or a class."""
    others = ", ".join(beside[:3]) + ", ..." * (len(beside) > 3)
    fix = f"give {path / train}; if it is a class, put all of them into a folder {train}"
    return UserError(f"{flag} {path}: holds {train} and {others}, if these are not to be trained on, {fix}")


def is_image(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def split_path(root: Path, split: str) -> Path | None:
    """`root`/train or `root`/train.tar (for val: SPLIT_NAMES in their order), or None."""
    for name in SPLIT_NAMES[split]:
        if os.path.isdir(root / name):
            return root / name
        if os.path.isfile(root / f"{name}.tar"):
            return root / f"{name}.tar"
    return None


def fingerprint(source: ImageSource | IterableDataset) -> str:
    """Of the names of classes and of the first and last thousand images, wherever they lie; empty for a stream."""
    if isinstance(source, IterableDataset):
        return ""
    number = len(source)
    looked_at = range(number) if number <= 2000 else [*range(1000), *range(number - 1000, number)]
    names = [re.split("[/:]", source.name(index))[-1] for index in looked_at]  # folders and .tar files may move
    said = "\0".join([*(getattr(source, "class_names", None) or ()), "", *names])
    return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()


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


def labelled_or_none(source: ImageSource | IterableDataset) -> ImageSource | None:
    """The source, unless it is a stream or has no labels of at least two classes."""
    return source if getattr(source, "labels", None) and len(set(source.labels)) > 1 else None


def same_classes(train: ImageSource, val: ImageSource | None) -> bool:
    """Whether both are labelled, with the same class names (or numbers where there are no names)."""
    return val is not None and train.labels is not None and train.class_names == val.class_names


def open_folder(path: Path, flag: str) -> FileSource:
    """Image files below `path`; the name of the folder that holds a file is its class."""
    found = [
        (os.path.join(folder, name), os.path.basename(folder.removeprefix(str(path))))
        for folder, name in image_paths(path, flag)
    ]
    if not found:
        published = "; one in its published form is named by --dataset" * (flag == "--data_path")
        raise UserError(f"{flag} {path}: holds no images ({' '.join(IMAGE_EXTENSIONS)}) at any depth{published}")
    paths, folders = zip(*sorted(found), strict=True)
    check_one_split(flag, path, {os.path.dirname(os.path.relpath(name, path)) for name in paths})
    return FileSource(list(paths), *number_classes(folders))


def image_paths(path: Path, flag: str) -> Iterator[tuple[str, str]]:
    """Folder and name of each image file at any depth; links to folders are followed.

    Raises:
        UserError: a folder cannot be listed, or is reached again from inside.
    """

    def stop(error: OSError) -> None:  # otherwise os.walk leaves out what it cannot list
        raise UserError(f"{flag} {error.filename}: cannot be listed ({error.strerror})") from error

    above: dict[str, tuple[tuple[int, int], ...]] = {str(path): ()}  # folders on the way to one: device and inode
    for folder, inside, names in os.walk(path, followlinks=True, onerror=stop):
        about, way = os.stat(folder), above.pop(folder)
        this = (about.st_dev, about.st_ino)
        if this in way:
            raise UserError(f"{flag} {folder}: a link leads back to a folder around it, remove the link")
        above |= {os.path.join(folder, name): (*way, this) for name in inside}
        for name in names:
            if is_image(name):
                yield folder, name


def open_tars(root: Path, tars: list[Path], split: str, flag: str) -> TarSource:
    """Image files in .tar files, below train/ (or val/) where there is one; classes are folders, as on disk."""
    found, classes = tar_contents(tars, flag)
    if classes is None:  # in a shard they are classes of these names
        splits = splits_of([name for _, name, _, _ in found])
        if split == "train" and "val" in splits and "train" not in splits:
            raise without_training_images(flag, root, splits["val"].rsplit("/")[-1])
        if split in splits:
            found = [member for member in found if in_folder(member[1], splits[split])]
        check_one_split(flag, root, {os.path.dirname(name) for _, name, _, _ in found})
    if not found:
        raise UserError(f"{flag} {root}: holds no images ({' '.join(IMAGE_EXTENSIONS)})")
    found.sort()
    folders = [PurePosixPath(name).parent.name for _, name, _, _ in found]
    unlisted = set(folders) - set(folders if classes is None else classes)
    if unlisted:
        raise UserError(f"{flag} {root}: holds shards of several data sets, only one has a class {min(unlisted)!r}")
    return TarSource(found, *number_classes(folders, classes))


def tar_contents(tars: Sequence[Path], flag: str) -> tuple[list[tuple[str, str, int, int]], list[str] | None]:
    """File, name, offset and bytes of each image; the classes where scripts/prepare_data.py wrote them down."""
    shards = [read_shard(tar) for tar in tars]  # None where the .tar is not one of scripts/prepare_data.py
    members = [shard.members if shard else tar_members(tar, flag) for tar, shard in zip(tars, shards, strict=True)]
    found = [(str(tar), *member) for tar, inside in zip(tars, members, strict=True) for member in inside]
    return found, next((shard.classes for shard in shards if shard), None)


def splits_of(names: Sequence[str]) -> dict[str, str]:
    """The folders that hold `train` and `val` among members of a .tar: at its top, or in a folder around all of it."""
    folders = {PurePosixPath(name).parts[:-1] for name in names}
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    around = [names[0] for names in shared]
    known = [name for names in SPLIT_NAMES.values() for name in names]
    level = next((i for i, folder in enumerate(around) if folder in known), len(around))
    there = {folder[level]: "/".join(folder[: level + 1]) for folder in folders if len(folder) > level}
    return {split: there[name] for split, names in SPLIT_NAMES.items() for name in reversed(names) if name in there}


def in_folder(name: str, folder: str) -> bool:
    """Whether a member of a .tar lies there, at any depth."""
    return str(PurePosixPath(name)).startswith(f"{folder}/")


def check_one_split(flag: str, root: Path, folders: Iterable[str]) -> None:
    """UserError where training and validation images lie side by side further down, and would both count."""
    inside: dict[PurePosixPath, set[str]] = {}
    for folder in map(PurePosixPath, folders):
        for each in (folder, *folder.parents)[:-2]:  # at the top they are split already, or classes
            inside.setdefault(each.parent, set()).add(each.name)
    for parent, names in inside.items():
        both = [next((name for name in SPLIT_NAMES[split] if name in names), None) for split in SPLIT_NAMES]
        if all(both):
            held = " and ".join(str(parent / name) for name in both)
            raise UserError(f"{flag} {root}: holds {held}, give {root / parent}, or one of the two")


def tar_members(tar: Path, flag: str) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of each image, by looking through the file: 4 s for 100,000."""
    import tarfile

    try:
        with tarfile.open(tar, "r:") as file:
            found = [
                (member.name, member.offset_data, member.size)
                for member in file
                if member.isfile() and is_image(member.name)
            ]
            file.fileobj.seek(file.offset)  # tarfile takes a damaged header for the end
            if file.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"truncated or damaged after {file.offset} bytes")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{flag} {tar}: cannot be read as an uncompressed .tar ({error})") from error
    return found


def number_classes(folders: Sequence[str], classes: list[str] | None = None) -> tuple[list[int], list[str]]:
    """Labels and class names: as listed, or in the lexical order of torchvision's ImageFolder ("10" before "2")."""
    classes = sorted(set(folders)) if classes is None else classes
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], classes


def digits(split: str) -> ArraySource:
    """scikit-learn's 8x8 handwritten digits, 1 channel; each fifth one is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    keep = (np.arange(len(data.target)) % 5 == 0) == (split != "train")
    pixels = torch.from_numpy(np.round(data.images[keep] * (255 / 16)).astype(np.uint8))
    return ArraySource(pixels.unsqueeze(1), data.target[keep].tolist(), [str(n) for n in range(10)], "digits")


def published_names() -> list[str]:
    """The data sets that util/published.py reads."""
    from util.published import DATASETS

    return list(DATASETS)


def open_reader(dataset: str, data_path: str, split: str) -> ReaderSource | IterableDataset:
    """A data set by its name in timm's `create_dataset`; streams (wds/, tfds/, hfids/) come as IterableDataset."""
    from timm.data import create_dataset

    from util.config import nearest

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
