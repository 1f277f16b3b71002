"""Image sources: image number i, undecoded, from files, tar members, arrays or a reader."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset


class BadImage(Exception):
    """An image that cannot be read or decoded; the message says why, not which."""


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


def fingerprint(source: ImageSource | IterableDataset) -> str:
    """Of the names of classes and of the first and last thousand images, wherever they lie; empty for a stream."""
    if isinstance(source, IterableDataset):
        return ""
    number = len(source)
    looked_at = range(number) if number <= 2000 else [*range(1000), *range(number - 1000, number)]
    names = [re.split("[/:]", source.name(index))[-1] for index in looked_at]  # folders and .tar files may move
    said = "\0".join([*(getattr(source, "class_names", None) or ()), "", *names])
    return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()


def labelled_or_none(source: ImageSource | IterableDataset) -> ImageSource | None:
    """The source, unless it is a stream or has no labels of at least two classes."""
    return source if getattr(source, "labels", None) and len(set(source.labels)) > 1 else None


def same_classes(train: ImageSource, val: ImageSource | None) -> bool:
    """Whether both are labelled, with the same class names (or numbers where there are no names)."""
    return val is not None and train.labels is not None and train.class_names == val.class_names
