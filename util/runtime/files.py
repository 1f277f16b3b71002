"""Files that are whole or not there: written beside, made durable, renamed; their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from util.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of what was installed
TEMPORARY = ".unfinished-"  # prefix; no reader ever takes such a file for a checkpoint


class HashingWriter:
    """A file that knows the SHA-256 and the length of what went through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write and hash."""
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.hash.update(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand all to the operating system."""
        self.file.flush()


def write_durably(path: Path, write: Callable[[HashingWriter], None]) -> tuple[str, int]:
    """Fill a temporary file, fsync, rename, fsync the folder; SHA-256 and length. No litter on failure."""
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


def fsync_folder(folder: Path) -> None:
    """Make renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: BinaryIO) -> str:
    """Of the whole file, in pieces (hashlib.file_digest came with Python 3.11)."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint lies."""
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
