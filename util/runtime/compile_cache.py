"""The files of torch.compile, in the run's own folder.

By default they lie in a folder that all runs of a user share. A compiler that is killed while it writes there leaves an
empty library, by which every later run with --compile would fail.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
from pathlib import Path
from typing import TextIO

FOLDER = ".compile-cache"
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
OPEN = "open"  # this file lies in the folder while a process uses it
INDUCTOR, TRITON = "inductor", "triton"


def use_compile_cache(output_dir: str | Path, rank: int) -> None:
    """Let torch.compile cache in `output_dir`/.compile-cache, unless the user's environment names other folders.

    Each rank has a folder of its own. If the process that used it was killed, its files are deleted first. Call this
    once the run holds the lock on its folder, and before the first compiled call.
    """
    if any(variable in os.environ for variable in VARIABLES):
        return
    folder = Path(output_dir).resolve() / FOLDER / f"rank-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    was_killed = (folder / OPEN).exists()
    marker = open(folder / OPEN, "a")  # noqa: SIM115 (it stays open, and so locked, until this process ends)
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another run is at work here, and this one is about to be refused
        return
    if was_killed:
        for part in (INDUCTOR, TRITON):
            shutil.rmtree(folder / part, ignore_errors=True)
    atexit.register(end_of_use, marker)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / INDUCTOR)
    os.environ["TRITON_CACHE_DIR"] = str(folder / TRITON)


def end_of_use(marker: TextIO) -> None:
    """Remove the file that says that the folder is in use: this process was not killed."""
    Path(marker.name).unlink(missing_ok=True)
    marker.close()
