"""Image sources: image number i, undecoded, from files, tar members, arrays or a reader."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

MOST_BYTES = 2**30  # of an encoded image: the largest that is decoded has 0.7 GB without compression
MOST_OPEN_TARS = 64  # in a process; `ulimit -n` is often 256
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


class BadImage(Exception):
    """An image that cannot be read or decoded; the message says why, not which."""


# --------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------


def check_descriptors(error: OSError) -> None:
    """Raise the error again if no descriptor is left in the process or on the machine: that is no image's fault."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


def open_file(path: str) -> BinaryIO:
    """Open an image file, once it is known to be a file and not too large.

    Raises:
        BadImage: it cannot be opened, is a pipe, a device or a folder, or has more than MOST_BYTES.
        OSError: there is no descriptor left.
    """
    try:
        # a pipe without a writer would be waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, OSError):
            check_descriptors(error)
        raise BadImage(str(error)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BadImage(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'of an unknown kind')}, no file")
    if status.st_size > MOST_BYTES:
        os.close(descriptor)
        raise too_large(status.st_size)
    return os.fdopen(descriptor, "rb")


def read_file(path: str) -> bytes:
    """Return the bytes of an image file; errors as `open_file`, and BadImage where the disk fails."""
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise BadImage(str(error)) from error


def too_large(size: int) -> BadImage:
    """Return the error for a file of so many bytes."""
    return BadImage(f"has {size} bytes, at most {MOST_BYTES} are read")


# --------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """Images by index, undecoded, with the name of each and its label where it has one."""

    labels: list[int] | None
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """Return encoded bytes, a PIL image, or pixels [C, h, w]; BadImage if they cannot be read."""

    def name(self, index: int) -> str:
        """Return what to call the image in a message."""


class Names(Sequence[str]):
    """Strings in two arrays.

    Reading a list changes reference counts, so every forked worker would copy it; arrays stay shared. 140 bytes for
    each of ImageNet's names, in each of 80 processes, are 14 GB.
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
        """Return the file's bytes; errors as `read_file`."""
        return read_file(self.paths[index])

    def name(self, index: int) -> str:
        """Return its path."""
        return self.paths[index]


@dataclass
class TarSource:
    """Image files inside uncompressed .tar files.

    Members are read by their offset (`pread`), not through `tarfile`: an open `tarfile` has one position, which
    forked workers would share. The files read last stay open, MOST_OPEN_TARS of them in each process.
    """

    members: Sequence[Member]
    labels: list[int] | None
    class_names: list[str] | None
    _files: OrderedDict[str, int] = field(default_factory=OrderedDict, repr=False)  # descriptors, the last used last

    def __post_init__(self) -> None:
        self.members = Members(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # another process has other descriptors

    def read(self, index: int) -> bytes:
        """Return the member's bytes.

        Raises:
            BadImage: the .tar cannot be read any more, or the member has more than MOST_BYTES.
            OSError: there is no descriptor left.
        """
        tar, _, offset, size = self.members[index]
        if size > MOST_BYTES:
            raise too_large(size)
        try:
            return os.pread(self._descriptor(tar), size, offset)
        except OSError as error:
            check_descriptors(error)
            raise BadImage(str(error)) from error

    def _descriptor(self, tar: str) -> int:
        if tar not in self._files:
            if len(self._files) >= MOST_OPEN_TARS:
                os.close(self._files.popitem(last=False)[1])
            self._files[tar] = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(tar)
        return self._files[tar]

    def name(self, index: int) -> str:
        """Return tar file and member."""
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
        """Return pixels [C, h, w]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return its number in the data set."""
        return f"{self.title}[{index}]"


@dataclass
class ReaderSource:
    """A reader of timm that yields (file, label), or a data set of torchvision: (PIL image or bytes, label)."""

    dataset: Any
    title: str
    labels: list[int] | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes | Image.Image:
        """Return the image, decoded or not."""
        try:
            image = self.dataset[index][0]
            if isinstance(image, Image.Image | bytes):
                return image
            with image as file:
                return file.read()
        except Exception as error:  # each reader raises its own
            if isinstance(error, OSError):
                check_descriptors(error)
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Return its number in the data set."""
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
        """Return those of the whole source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """Read from the whole source."""
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        """Return what the whole source calls it."""
        return self.source.name(self.indices[index])


def hold_out(source: ImageSource, share: float) -> tuple[SubsetSource, SubsetSource]:
    """Divide a labelled source: the images to train on, and `share` of each class to hold out.

    One image of a class at least is held out, and none of a class of one image. Which images these are follows from
    the source and the share alone: all runs hold out the same.
    """
    labels = np.array(source.labels)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(len(labels), dtype=bool)
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # one class after the other
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return SubsetSource(source, np.flatnonzero(~held_out)), SubsetSource(source, np.flatnonzero(held_out))


@dataclass
class JoinedSource:
    """The images of several sources, one after the other; labels are left behind, since their numbers may differ."""

    parts: Sequence[ImageSource]
    labels: None = None
    class_names: None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """Read from the part that holds it."""
        part, index = self._find(index)
        return part.read(index)

    def name(self, index: int) -> str:
        """Return what the part that holds it calls it."""
        part, index = self._find(index)
        return part.name(index)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def fingerprint(source: ImageSource | IterableDataset) -> str:
    """Return a hash of the names of classes and of the first and last thousand images; empty for a stream.

    Folders and .tar files may move: the names are those without a path.
    """
    if isinstance(source, IterableDataset):
        return ""
    number = len(source)
    sampled = range(number) if number <= 2000 else [*range(1000), *range(number - 1000, number)]
    names = [re.split("[/:]", source.name(index))[-1] for index in sampled]
    text = "\0".join([*(getattr(source, "class_names", None) or ()), "", *names])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def labelled_or_none(source: ImageSource | IterableDataset) -> ImageSource | None:
    """Return the source, or None if it is a stream or has no labels of at least two classes."""
    return source if getattr(source, "labels", None) and len(set(source.labels)) > 1 else None


def same_classes(train: ImageSource, val: ImageSource | None) -> bool:
    """Return True if both are labelled, with the same class names (or numbers where there are no names)."""
    return val is not None and train.labels is not None and train.class_names == val.class_names
