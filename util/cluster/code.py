"""Copy the code for a job, so that later edits do not reach it while it waits in the queue."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

from util.runtime.files import ROOT


def unused_folder(job_dir: Path) -> Path:
    """Return JOB_DIR/code, or code-2, ...: a queued job may still need the copy of an earlier submission."""
    return next(path for n in itertools.count(1) if not (path := job_dir / (f"code-{n}" if n > 1 else "code")).exists())


def copy_code(target: Path) -> None:
    """Copy the code, so that later changes do not reach a queued job; the file COMMIT names its commit."""
    from util.runtime.logs import git_state

    for source in code_files():
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    commit, dirty = git_state(ROOT)
    (target / "COMMIT").write_text(f"{commit}{' with changes' if dirty else ''}\n" if commit else "unknown\n")


def code_files() -> list[Path]:
    """Return all Python files and recipes, without those that git ignores, such as the copies of earlier jobs."""
    patterns = ("*.py", "scripts/*.py", "util/*/*.py", "recipes/*.yaml")
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z", "--"]
    command += [f":(glob){pattern}" for pattern in patterns]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.SubprocessError):
        files = []
    files = files or [
        path for pattern in patterns for path in ROOT.glob(pattern) if not path.parent.name.startswith(".")
    ]
    return [path for path in dict.fromkeys(files) if path.is_file()]  # git lists deleted files too
