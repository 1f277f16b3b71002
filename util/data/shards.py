"""Shards of a prepared data set: .tar files of images, each with a manifest that verifies and indexes it.

A split is a folder of `train-00000.tar`, `train-00001.tar`, ..., and a member is `CLASS/NAME.jpg`. Beside each shard
lies its manifest `train-00000.tar.json`; as with checkpoints the shard is durable before its manifest is written, so a
manifest never speaks of half a file. No time, user or process goes into either: the same images give the same bytes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from util.runtime.files import TEMPORARY, HashingWriter, manifest_path, sha256_of, write_durably


class Sample(NamedTuple):
    """One image on its way into a shard."""

    source_name: str
    source_bytes: int
    files: Sequence[tuple[str, bytes]]  # member name and content: the image, then what belongs to it; empty where bad
    bad: str = ""  # why the image cannot be read


@dataclass
class Shard:
    """The manifest of a shard."""

    begin: int  # its first image's number in the source
    end: int  # one past its last
    classes: list[str] | None  # names in the order of their labels, also of those without images; None: no labels
    bytes: int = 0
    sha256: str = ""
    source_bytes: int = 0  # of the images before they were prepared
    members: list[tuple[str, int, int]] = field(default_factory=list)  # of images only: name, offset, bytes
    bad: list[tuple[str, str]] = field(default_factory=list)  # left out: name in the source, reason


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where the shards of a split lie."""
    return folder / f"{split}-{number:05d}.tar"


# --------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------


def write_shard(path: Path, begin: int, samples: Iterator[Sample], most_bytes: int, classes: list[str] | None) -> Shard:
    """Write the samples, the first of which is image `begin`, until the shard has `most_bytes` or they end.

    The shard ends with the image that reaches `most_bytes`. Whatever `samples` raises leaves no file behind.

    Raises:
        OSError: it cannot be written, as on a full disk.
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
    """Append a tar member without time or owner; the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    offset = file.bytes
    file.write(content + bytes(padding(len(content))))
    return offset


def padding(size: int) -> int:
    """Bytes up to the next block of a tar file."""
    return -size % tarfile.BLOCKSIZE


def bytes_in_tar(sample: Sample) -> int:
    """What the sample takes in a shard."""
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


def read_shard(path: Path) -> Shard | None:
    """The manifest of a shard; None where there is none, or of a file of another length."""
    try:
        shard = Shard(**json.loads(manifest_path(path).read_text()))
        return shard if shard.bytes == path.stat().st_size else None
    except (OSError, ValueError, TypeError):
        return None


def is_intact(path: Path, shard: Shard) -> bool:
    """Whether the file is the one that the manifest was written for."""
    with open(path, "rb") as file:
        return sha256_of(file) == shard.sha256
