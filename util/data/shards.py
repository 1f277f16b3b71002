"""Shards of a prepared data set: .tar files of images, each with a manifest that verifies and indexes it.

A split is a folder of `train-00000.tar`, `train-00001.tar`, ..., and a member is `CLASS/NAME.jpg`. Beside each shard
lies its manifest `train-00000.tar.json`; as with checkpoints the shard is durable before its manifest is written, so a
manifest never speaks of half a file. No time, user or process goes into either: the same images give the same bytes.
"""

from __future__ import annotations

import json
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from util.runtime.errors import UserError
from util.runtime.files import TEMPORARY, HashingWriter, manifest_path, sha256_of, write_durably


class Sample(NamedTuple):
    """The files of one image in a shard, or why it has none."""

    source_name: str
    source_bytes: int
    files: Sequence[tuple[str, bytes]]  # member name and content: the image, then its label file; empty where bad
    bad: str = ""  # why the image cannot be read


@dataclass
class Shard:
    """The manifest of a shard."""

    begin: int  # number of its first image in the source
    end: int  # one past its last
    classes: list[str] | None  # names by label, including classes without images; None: no labels
    bytes: int = 0
    sha256: str = ""
    source_bytes: int = 0  # of the images before they were prepared
    members: list[tuple[str, int, int]] = field(default_factory=list)  # of images only: name, offset, bytes
    bad: list[tuple[str, str]] = field(default_factory=list)  # left out: name in the source, reason


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return the path of a shard of a split."""
    return folder / f"{split}-{number:05d}.tar"


# --------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------


def write_shard(path: Path, begin: int, samples: Iterator[Sample], most_bytes: int, classes: list[str] | None) -> Shard:
    """Write samples, the first of which is image `begin`, until the shard has `most_bytes` or they end.

    The shard ends with the image that reaches `most_bytes`. An error in `samples` leaves no file behind.

    Raises:
        OSError: the shard cannot be written, for example on a full disk.
    """
    shard = Shard(begin, begin, classes)

    def write(file: HashingWriter) -> None:
        for sample in samples:
            shard.end += 1
            shard.source_bytes += sample.source_bytes
            if sample.bad:
                shard.bad.append((sample.source_name, sample.bad))
            for name, content in sample.files[:1]:
                shard.members.append((name, write_member(file, name, content), len(content)))
            for name, content in sample.files[1:]:
                write_member(file, name, content)
            if file.bytes >= most_bytes:
                break
        end = file.bytes + 2 * tarfile.BLOCKSIZE  # two empty blocks, and then up to a whole record
        file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))

    shard.sha256, shard.bytes = write_durably(path, write)
    write_durably(manifest_path(path), lambda file: file.write(json.dumps(asdict(shard)).encode()))
    return shard


def write_member(file: HashingWriter, name: str, content: bytes) -> int:
    """Append a tar member without time or owner, and return the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    offset = file.bytes
    file.write(content + bytes(padding(len(content))))
    return offset


def padding(size: int) -> int:
    """Return the number of bytes up to the next block of a tar file."""
    return -size % tarfile.BLOCKSIZE


def bytes_in_tar(sample: Sample) -> int:
    """Return the number of bytes that the sample takes in a shard."""
    return sum(tarfile.BLOCKSIZE + len(content) + padding(len(content)) for _, content in sample.files)


def delete_leftovers(folder: Path, split: str, number: int) -> None:
    """Remove what a killed call left unfinished, and shards beyond the first `number`."""
    shards = {shard_path(folder, split, n) for n in range(number)}
    surplus = set(folder.glob(f"{split}-*.tar")) - shards
    for path in [*folder.glob(f"{TEMPORARY}*"), *map(manifest_path, surplus), *surplus]:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


MOST_MANIFEST_BYTES = 2**28  # of a shard of a million images


def read_shard(path: Path) -> Shard | None:
    """Return the manifest of a shard; None where there is none, or one of another program or of another length.

    Raises:
        UserError: it is one of ours, but its values are of wrong types or point out of the shard.
    """
    manifest = manifest_path(path)
    try:
        size, status = path.stat().st_size, manifest.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_MANIFEST_BYTES:
            raise damaged(manifest, f"is no file of at most {MOST_MANIFEST_BYTES} bytes")
        shard = Shard(**json.loads(manifest.read_text()))
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        return None
    except RecursionError as error:
        raise damaged(manifest, "is nested too deeply") from error
    check_types(shard, manifest)
    if shard.bytes != size:
        return None
    for name, offset, length in shard.members:
        if min(offset, length) < 0 or offset + length > size:
            raise damaged(manifest, f"places {name!r} at {offset} to {offset + length} of {size} bytes")
    return shard


def check_types(shard: Shard, manifest: Path) -> None:
    """Raise UserError unless all values of a manifest have their types, and refer to each other rightly."""
    numbers = (shard.begin, shard.end, shard.bytes, shard.source_bytes)
    if not all(type(number) is int for number in numbers) or not 0 <= shard.begin <= shard.end:
        raise damaged(manifest, "begin, end, bytes and source_bytes must be whole numbers from 0")
    if type(shard.sha256) is not str:
        raise damaged(manifest, "sha256 must be a text")
    classes = shard.classes
    if classes is not None and not (isinstance(classes, list) and all(type(name) is str for name in classes)):
        raise damaged(manifest, "classes must be a list of names")
    for key, types in (("members", [str, int, int]), ("bad", [str, str])):
        rows = getattr(shard, key)
        if not isinstance(rows, list) or not all(isinstance(row, list) and [*map(type, row)] == types for row in rows):
            raise damaged(manifest, f"{key} must be a list of [{', '.join(kind.__name__ for kind in types)}]")
    if classes is not None and len(set(classes)) != len(classes):
        raise damaged(manifest, "classes must be different names")


def damaged(manifest: Path, reason: str) -> UserError:
    """Return the error for a manifest that was not written by us as it is."""
    return UserError(f"{manifest}: {reason}; remove it, or prepare the data set again")


def is_intact(path: Path, shard: Shard) -> bool:
    """Return True if the file is the one that the manifest was written for."""
    with open(path, "rb") as file:
        return sha256_of(file) == shard.sha256
