"""Files that are complete or absent: written beside their place, made durable, renamed; and their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from util.runtime.errors import UserError, printable

ROOT = Path(__file__).resolve().parents[2]  # the folder of the checkout, or of the installed copy
LFS_POINTER = b"version https://git-lfs."  # begins the text that Git leaves in place of a large file
IS_LFS_POINTER = "a pointer of Git LFS, not the file; git lfs pull fetches it"
TEMPORARY = ".unfinished-"  # prefix of a file that no reader takes for a finished one


class HashingWriter:
    """A file that counts the bytes written through it and computes their SHA-256."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write the data and hash it."""
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.hash.update(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Pass buffered data to the operating system."""
        self.file.flush()


def write_durably(path: Path, write: Callable[[HashingWriter], object]) -> tuple[str, int]:
    """Fill a temporary file, make it durable and rename it to `path`; on failure it is deleted.

    Returns:
        The SHA-256 and the length of the file.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            write(writer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return writer.hash.hexdigest(), writer.bytes


def set_aside(path: Path) -> None:
    """Rename what lies at `path` if it is not a file, for example a folder, and say so on stderr."""
    if path.is_file() or not os.path.lexists(path):
        return
    number = 0
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    path.rename(aside)
    print(
        f"WARNING: {printable(str(path))}: is not a file, so it was renamed to {printable(aside.name)}", file=sys.stderr
    )


def fsync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, read in pieces (hashlib.file_digest came with Python 3.11)."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def manifest_path(path: Path) -> Path:
    """Return the path of a checkpoint's manifest."""
    return path.with_name(f"{path.name}.json")


def writable_folder(path: str | Path, flag: str) -> Path:
    """Return the folder that a flag names, made if need be; raise UserError where it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # its name is one that no process of another machine takes
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be written ({error.strerror}), choose another") from error
    return path
