"""The files of torch.compile, in the run's own folder.

By default they lie in a folder that all runs of a user share. A compiler that is killed while it writes there leaves an
empty library, by which every later run with --compile would fail.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

FOLDER = ".compile-cache"
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
OPEN = "open"  # this file lies in the folder while a process uses it
INDUCTOR, TRITON = "inductor", "triton"


def use_compile_cache(output_dir: str | Path, rank: int) -> None:
    """Let torch.compile cache in `output_dir`/.compile-cache, unless the user's environment names other folders.

    Each rank has a folder of its own. If the process that used it was killed, its files are deleted first. Call this
    before anything is compiled. A folder that cannot be written, or that another run uses, is left alone: this run is
    refused when it locks --output_dir.
    """
    if any(named_by_user(variable) for variable in VARIABLES):
        return
    folder = Path(output_dir).resolve() / FOLDER / f"rank-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        was_killed = (folder / OPEN).exists()
        marker = open(folder / OPEN, "a")  # noqa: SIM115 (it stays open, and so locked, until this process ends)
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    if was_killed:
        for part in (INDUCTOR, TRITON):
            shutil.rmtree(folder / part, ignore_errors=True)
    atexit.register(end_of_use, marker)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / INDUCTOR)
    os.environ["TRITON_CACHE_DIR"] = str(folder / TRITON)


def named_by_user(variable: str) -> bool:
    """True if the variable names a folder other than torch's default, which torch itself sets while it is imported."""
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    return not os.environ.get(variable, default).startswith(default)


def end_of_use(marker: TextIO) -> None:
    """Remove the file that says that the folder is in use: this process was not killed."""
    Path(marker.name).unlink(missing_ok=True)
    marker.close()
