"""The log of a run: JSON lines, TensorBoard, messages, a live progress line; and the record of what made the run."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from util.runtime.distributed import is_main, world_size
from util.runtime.errors import one_line, printable
from util.runtime.files import ROOT, set_aside, write_durably
from util.runtime.reading import Unreadable, as_count, as_number, parse_json

LOG_FILE = "log.jsonl"
COMMIT_FILE = "COMMIT"
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy")
ERASE_TO_END_OF_LINE = "\x1b[K"
TAG_GROUPS = {  # of TensorBoard; all other numbers are those of evaluations
    "loss": ("loss", "mim", "bc", "main", "auxiliary"),
    "update": ("lr", "grad_norm", "skipped_updates"),
    "speed": ("images_per_second", "data_wait", "memory_bytes", "bad_images"),
}


@functools.cache
def warn_once(message: str) -> None:
    """Print `WARNING: message` as one line on stderr of rank 0; the same message comes once in a process."""
    if is_main():
        print(f"WARNING: {one_line(message)}", file=sys.stderr, flush=True)


class RunLog:
    """The log of one run: `output_dir/log.jsonl`, TensorBoard in `log_dir`, messages on stdout.

    Each line of the file holds the `seconds` that the run has taken so far, as if it had never been interrupted.
    TensorBoard is a convenience: if its files can no longer be written, a message says so and the run continues.

    Args:
        output_dir: created if it is missing.
        log_dir: TensorBoard's folder; None writes no TensorBoard.
        enabled: False on all ranks but the first: every method then does nothing.
        resume_step: the step at which this run continues (0 for a fresh start, which keeps no line). Lines of later
            steps, left by a run that died after its last checkpoint, are removed from the file and hidden in
            TensorBoard, so that no update appears twice. Damaged lines are left out with a warning. None keeps all.
    """

    def __init__(
        self,
        output_dir: str | Path,
        log_dir: str | Path | None,
        enabled: bool,
        resume_step: int | None = None,
    ) -> None:
        self._enabled = enabled
        self._file = None
        self._begin = time.monotonic()
        self._tensorboard = None
        self._live = False  # the cursor stands in a progress line
        if not enabled:
            return
        path = Path(output_dir) / LOG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        set_aside(path)
        if resume_step is not None and path.exists():
            self._begin -= _drop_lines_after(path, resume_step or -1)
        self._file = path.open("a", encoding="utf-8")
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

            purge_step = None if resume_step is None else resume_step + 1
            _silence_tensorboard_thread()
            self._tensorboard = SummaryWriter(str(log_dir), purge_step=purge_step)

    @property
    def seconds(self) -> float:
        """The seconds that the run has taken so far, including those before an interruption."""
        return time.monotonic() - self._begin

    def scalars(self, step: int, values: Mapping[str, float], **extra: Any) -> None:
        """Log `values` at `step`; `extra` (such as the epoch) goes into the JSON line only."""
        if not self._enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step, **extra, "seconds": round(self.seconds, 1), **numbers}
        self._file.write(json.dumps({key: _json_value(value) for key, value in line.items()}) + "\n")
        self._file.flush()  # the last lines before a crash are those that explain it
        for name, value in values.items():
            self._show(lambda board, name=name, value=value: board.add_scalar(tag_of(name), value, step))

    def image(self, step: int, tag: str, array: np.ndarray) -> None:
        """Show a picture, uint8 [height, width, channels], in TensorBoard."""
        self._show(lambda board: board.add_image(tag, array, step, dataformats="HWC"))

    def _show(self, add: Callable[[Any], None]) -> None:
        """Write to TensorBoard if it is on; an error of its files turns it off."""
        if self._tensorboard is None:
            return
        try:
            add(self._tensorboard)
        except OSError as error:
            self._tensorboard = None
            self.text_of_any_rank(f"WARNING: TensorBoard's files can no longer be written: {one_line(str(error))}")

    def text(self, message: str) -> None:
        """Print a message, above the progress line if there is one."""
        if self._enabled:
            start = "\r" + ERASE_TO_END_OF_LINE if self._live else ""
            print(start + printable(message, keep="\n\t"), flush=True)
            self._live = False

    def text_of_any_rank(self, message: str) -> None:
        """Print a message; ranks without a log print it on stderr."""
        if self._enabled:
            self.text(message)
        else:
            print(printable(message, keep="\n\t"), file=sys.stderr, flush=True)

    def progress(self, **fields: Any) -> None:
        """Show the progress line; the fields are those of `format_progress`.

        A terminal shows one line that rewrites itself; a file or pipe gets ordinary lines.
        """
        if not self._enabled:
            return
        if sys.stdout.isatty():
            # a line that wraps could not be rewritten: \r goes back to the start of its last row only
            width = shutil.get_terminal_size().columns - 1
            line = format_progress(**fields, width=width)[:width]
            print("\r" + line + ERASE_TO_END_OF_LINE, end="", flush=True)
            self._live = True
        else:
            print(format_progress(**fields), flush=True)

    def close(self) -> None:
        """Leave the progress line standing and close the files."""
        if self._live:
            print(flush=True)
            self._live = False
        self._show(lambda board: board.close())
        if self._file is not None:
            self._file.close()


def tag_of(name: str) -> str:
    """Return the tag of a number in TensorBoard, which shows one group of curves per prefix."""
    return f"{next((group for group, names in TAG_GROUPS.items() if name in names), 'monitor')}/{name}"


def format_progress(
    *,
    epoch: int,
    epochs: int,
    step: int,
    total_steps: int,
    losses: Mapping[str, float],
    lr: float,
    images_per_second: float,
    data_wait: float,
    memory_bytes: int,
    seconds_left: float,
    width: int = 79,
) -> str:
    """Format the progress line: what matters most comes first, and what does not fit into `width` columns is left out.

    Args:
        epoch: the current epoch, counted from 1.
        step: steps done, of `total_steps` in the whole run.
        losses: by name, in the order to be shown.
        data_wait: share of the time spent waiting for data, 0 to 1.
        memory_bytes: see `peak_memory_bytes`.
        seconds_left: NaN or infinite where it is not known yet.
    """
    names = sorted(losses, key=lambda name: name != "loss")  # the sum first, the others in their order
    loss, *other_losses = [f"{name} {losses[name]:.4f}" for name in names] or [""]
    parts = [
        f"epoch {epoch}/{epochs}",
        f"left {format_duration(seconds_left)}",
        f"{images_per_second:.{0 if images_per_second >= 100 else 1}f} images/s",
        loss,
        f"data wait {data_wait:.0%}",
        f"step {step}/{total_steps}",
        *other_losses,
        f"lr {lr:.2e}",
        f"memory {memory_bytes / 2**30:.1f} GiB",
    ]
    line = parts[0]
    for part in filter(None, parts[1:]):
        if len(line) + 2 + len(part) > width:
            break
        line += "  " + part
    return line


def format_duration(seconds: float) -> str:
    """Format a time as 1:02:03, or as 3d04h from a day on; "?" if it is not finite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minute:02d}:{second:02d}"
    days, hour = divmod(hours, 24)
    return f"{days}d{hour:02d}h"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: tensors on a GPU, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # only macOS counts in bytes


def write_run_info(output_dir: str | Path, config: Mapping[str, Any], **facts: Any) -> None:
    """Write what made this run: `config.yaml`, and `run.json` with source, versions and command line.

    Args:
        config: nested dicts; values that YAML has no type for (such as paths) are written as strings.
        facts: further entries of `run.json`, as the stage and the updates per epoch.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(config, default=str))  # tuples to lists, paths to strings
    texts = {
        "config.yaml": yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        "run.json": json.dumps(run_info() | facts, indent=2) + "\n",
    }
    for name, text in texts.items():
        set_aside(output_dir / name)
        write_durably(output_dir / name, lambda file, text=text: file.write(text.encode("utf-8", "surrogatepass")))


def run_info() -> dict[str, Any]:
    """Return what a result depends on: source, versions, command line, time, machine."""
    commit, dirty = git_state(ROOT)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        **{package: _version(package) for package in VERSIONS_OF},
        "command": shlex.join([sys.executable, *sys.argv]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processes": world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware that computes on this device."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def processor_name() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _json_value(value: Any) -> Any:
    """Round floats to nine significant digits, what fp32 has, and spell those that JSON lacks: "nan", "inf", "-inf"."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def _drop_lines_after(path: Path, step: int) -> float:
    """Rewrite a log without the lines of later steps and without damaged ones, such as one that a crash cut short.

    Returns the seconds that the run had taken by the last line that remains. A warning counts the damaged lines.
    """
    partial, seconds, damaged = path.with_name(path.name + ".partial"), 0.0, 0
    with path.open("rb") as old, partial.open("wb") as new:
        for text in old:
            line = _log_line(text)
            damaged += line is None
            if line is not None and line["step"] <= step:
                new.write(text)
                seconds = line.get("seconds", 0.0)
    os.replace(partial, path)  # atomic: a crash leaves the old file or the new one
    if damaged:
        lines = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
        print(f"WARNING: {printable(str(path))}: {lines} left out", file=sys.stderr)
    seconds = as_number(seconds)
    return seconds if seconds is not None and math.isfinite(seconds) else 0.0


def _log_line(text: bytes) -> dict[str, Any] | None:
    """Parse a line of a log; None if it is cut short, not JSON in UTF-8, not an object or without a step."""
    try:
        line = parse_json(text) if text.endswith(b"\n") else None
    except Unreadable:
        return None
    return line if isinstance(line, dict) and as_count(line.get("step")) is not None else None


def _silence_tensorboard_thread() -> None:
    """Print no traceback of the thread that writes TensorBoard's files: the next call raises its error again."""
    previous = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard"):
            previous(error)

    threading.excepthook = hook


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit and whether tracked files differ from it; None, None outside a checkout.

    The copy of the code that a queued job runs from records both in a file COMMIT.
    """
    if (root / COMMIT_FILE).is_file():
        commit, _, changed = (root / COMMIT_FILE).read_text(encoding="utf-8").strip().partition(" ")
        return (None, None) if commit == "unknown" else (commit, bool(changed))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # A copy of this code inside some other project's checkout must not report that project's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def aligned(rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Lay out rows of cells in columns; the first `labels` columns are flush left, the others flush right."""
    rows = [[printable(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < labels else str.rjust for i in range(len(widths))]
    lines = [[side(cell, n) for side, cell, n in zip(sides, cells, widths, strict=True)] for cells in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
