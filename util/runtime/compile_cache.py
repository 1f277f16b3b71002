"""The files of torch.compile, in the run's own folder.

By default they lie in a folder that all runs of a user share. A compiler that is killed while it writes there leaves an
empty library, by which every later run with --compile would fail.
"""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path

FOLDER = ".compile-cache"
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
OPEN = "open"  # this file lies in the folder while a process uses it


def use_compile_cache(output_dir: str | Path, rank: int) -> None:
    """Let torch.compile cache in `output_dir`/.compile-cache, unless the user's environment names other folders.

    Each rank has a folder of its own. If the process that used it was killed, its files are deleted first. Call this
    once the run holds the lock on its folder, and before the first compiled call.
    """
    if any(variable in os.environ for variable in VARIABLES):
        return
    folder = Path(output_dir).resolve() / FOLDER / f"rank-{rank}"
    if (folder / OPEN).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OPEN).touch()
    atexit.register((folder / OPEN).unlink, missing_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
