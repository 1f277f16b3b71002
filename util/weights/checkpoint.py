"""The checkpoints of a run: written completely or not at all, hashed, verified on load, deleted by a policy.

A checkpoint is a file `checkpoint-N.pth` and beside it a manifest `checkpoint-N.pth.json` with its SHA-256. The file
is durable before the manifest is written, and the manifest is deleted before the file: a manifest never describes a
file that is not complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
import weakref
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from util.runtime.errors import RunError, UserError, explain, loaders_death
from util.runtime.files import TEMPORARY, manifest_path, sha256_of, write_durably
from util.runtime.reading import Unreadable, as_count, read_mapping
from util.weights.reader import read_checkpoint
from util.weights.run_state import check_run_state

BEST = "checkpoint-best.pth"
LOCK = ".lock"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Manifest:
    """The facts about a checkpoint that a run knows without opening it."""

    sha256: str
    bytes: int
    epoch: int  # the last finished one, counted from 0
    step: int  # updates of the whole run
    metric: float | None  # the monitored value, higher is better
    time: float  # seconds since 1970


class CheckpointStore:
    """The checkpoints of one run, in its output folder.

    Args:
        keep_last: number of the newest checkpoints to keep.
        keep_every: keep the checkpoint after every so many epochs for ever; None: keep none for ever.
        keep_best: keep the one with the highest metric as `checkpoint-best.pth`.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None, keep_best: bool):
        self.folder, self.keep_last, self.keep_every, self.keep_best = folder, keep_last, keep_every, keep_best
        self._lock: TextIO | None = None
        self._writer = futures.ThreadPoolExecutor(max_workers=1)  # one at a time: the newest must be written last
        self._writing: futures.Future | None = None
        self._copy: dict[str, Any] = {}  # the state that is written in the background; the next save reuses its memory

    def lock(self) -> None:
        """Keep other runs out of the folder until this process ends, for whatever reason; see `lock_folder`."""
        if self._lock is None:
            self._lock = lock_folder(self.folder)

    def unlock(self) -> None:
        """Wait for a save in the background, then let other runs into the folder."""
        if self._writing is not None:
            futures.wait([self._writing])
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_in_background(self, state: dict[str, Any], **save_arguments: Any) -> None:
        """Copy the state to memory, return, and `save` the copy beside the training.

        Raises:
            RunError: the save before this one failed.
        """
        self.wait()
        self._copy = copy_to_cpu(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into page-locked memory have only been queued
        self._writing = self._writer.submit(self.save, self._copy, **save_arguments)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            RunError: the save failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def is_writing(self) -> bool:
        """True while a save in the background is under way."""
        return self._writing is not None and not self._writing.done()

    def raise_failure(self) -> None:
        """Raise the RunError of a save in the background that has failed; do not wait for one under way."""
        if not self.is_writing:
            self.wait()

    def save(
        self, state: dict[str, Any], *, epoch: int, step: int, metric: float | None = None, mid_epoch: bool = False
    ) -> Path:
        """Write `checkpoint-{epoch}.pth` durably, then delete what the policy no longer keeps.

        Args:
            epoch: the last finished one, counted from 0; with `mid_epoch` the one under way.

        Raises:
            RunError: the file could not be written, for example because the disk is full; older ones are untouched.
        """
        for partial in self.folder.glob(f"{TEMPORARY}*"):  # left by a run that was killed
            partial.unlink(missing_ok=True)
        name = f"checkpoint-{epoch}-step{step}.pth" if mid_epoch else f"checkpoint-{epoch}.pth"
        path = self.folder / name
        try:
            hashed = write_durably(path, lambda file: torch.save(state, file))
            manifest = Manifest(*hashed, epoch=epoch, step=step, metric=metric, time=time.time())
            write_manifest(path, manifest)
            if self.would_be_best(metric):
                self.link_best(path, manifest)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            if loaders_death(error) is not None:
                raise
            cause = explain(error) or f"free some space ({error})"
            raise RunError(f"{path} could not be saved, older checkpoints are untouched: {cause}") from error
        self.delete_old(newest=path)
        return path

    @property
    def best_metric(self) -> float | None:
        """Metric of `checkpoint-best.pth`, None if there is no such file."""
        best = read_manifest(self.folder / BEST)
        return None if best is None else best.metric

    def would_be_best(self, metric: float | None) -> bool:
        """True if the best checkpoint is kept and no checkpoint so far had as high a metric."""
        return self.keep_best and metric is not None and (self.best_metric is None or metric > self.best_metric)

    def holds(self, step: int) -> bool:
        """True if there is a complete checkpoint after `step` updates."""
        return any(manifest.step == step for _, manifest in self.list())

    def link_best(self, path: Path, manifest: Manifest) -> None:
        """Name the checkpoint `checkpoint-best.pth` too, by a hard link if the file system has them, else by a copy."""
        temporary = self.folder / f"{TEMPORARY}{BEST}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        manifest_path(self.folder / BEST).unlink(missing_ok=True)  # it describes the old best
        os.replace(temporary, self.folder / BEST)
        write_manifest(self.folder / BEST, manifest)

    def list(self, with_best: bool = False) -> list[tuple[Path, Manifest]]:
        """Return the complete checkpoints, oldest first; `checkpoint-best.pth` if asked for, or if it alone is left."""
        return complete_checkpoints(self.folder, with_best)

    def delete_old(self, newest: Path) -> None:
        """Delete the checkpoints that the policy does not keep; the newest, which has just been written, is kept."""
        checkpoints = self.list()
        keep = {path for path, _ in checkpoints[-self.keep_last :]} | {newest}
        if self.keep_every is not None:
            keep |= {p for p, m in checkpoints if (m.epoch + 1) % self.keep_every == 0 and "-step" not in p.name}
        for path, _ in checkpoints:
            if path not in keep:
                manifest_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def load_latest(self) -> tuple[dict[str, Any], Path] | None:
        """Return the newest intact checkpoint and its path, or None if the folder has no checkpoint at all.

        A damaged one is named on stderr and the one before is taken. Files without a manifest, which is written last,
        are tried last; one whose name says that it is newer is named too.

        Raises:
            UserError: there are checkpoints, and every one is damaged.
        """
        complete = [path for path, _ in reversed(self.list())]
        others = [path for path in reversed(checkpoints_in(self.folder)) if path not in complete]
        if complete and others and order_by_name(others[0]) > order_by_name(complete[0]):
            print(
                f"WARNING: {others[0]} has no manifest, it may be incomplete: resuming from {complete[0].name};"
                f" --resume {others[0]} would take it",
                file=sys.stderr,
            )
        for path in complete + others:
            try:
                state = load_checkpoint(path, flag="--auto_resume")
            except UserError as error:
                print(f"WARNING: {error}; trying the checkpoint before it", file=sys.stderr)
                continue
            if path in others:
                print(f"WARNING: {path} has no manifest: its hash could not be verified", file=sys.stderr)
            return state, path
        if complete or others:
            raise UserError(
                f"--auto_resume: none of the {len(complete + others)} checkpoints in {self.folder} is intact"
            )
        return None


_held_locks: weakref.WeakSet[TextIO] = weakref.WeakSet()
# data loader workers may outlive the process that forked them, and would hold its locks
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held_locks])


def lock_folder(folder: Path) -> TextIO:
    """Keep other runs out of --output_dir while the returned file is open.

    Raises:
        UserError: another process holds the lock.
    """
    path = folder / LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = " ".join(file.read().split()) or "an unknown process"
        file.close()
        raise UserError(f"--output_dir {folder}: another run writes there ({holder}), choose another") from None
    except OSError as error:  # some network file systems have no locks
        print(f"WARNING: {path} cannot be locked ({error.strerror}): let no other run write there", file=sys.stderr)
    _held_locks.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def copy_to_cpu(state: Any, memory: Any = None) -> Any:
    """Copy all tensors in nested dicts and lists to the CPU, so that later updates do not change them.

    Args:
        memory: an earlier copy of such a state, which is overwritten: to allocate takes several times as long.
    """
    if isinstance(state, torch.Tensor):
        if not (isinstance(memory, torch.Tensor) and (memory.shape, memory.dtype) == (state.shape, state.dtype)):
            memory = torch.empty_like(state, device="cpu", requires_grad=False, pin_memory=state.is_cuda)
        return memory.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        earlier = memory if isinstance(memory, dict) else {}
        return {name: copy_to_cpu(value, earlier.get(name)) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copy_to_cpu(value) for value in state)
    return state


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint, which makes it count as complete."""
    write_durably(manifest_path(path), lambda file: file.write(json.dumps(asdict(manifest), indent=1).encode()))


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest beside a checkpoint; None if there is none or it cannot be read."""
    try:
        manifest = Manifest(**read_mapping(manifest_path(path)))
    except (OSError, Unreadable, TypeError):
        return None
    counts = (manifest.bytes, manifest.epoch, manifest.step)
    right = isinstance(manifest.sha256, str) and None not in map(as_count, counts)
    numbers = (manifest.time, 0.0 if manifest.metric is None else manifest.metric)
    return manifest if right and all(isinstance(number, int | float) for number in numbers) else None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """Read a checkpoint of any program onto the CPU, .pth or .safetensors; no code in it is run.

    The tensors of a .safetensors file are returned under `state_dict`.

    Raises:
        UserError: there is no such file; it is damaged, by its manifest's hash if it has one; it is no checkpoint, or
            holds something else than it announces.
    """
    check_file(path, flag)
    verify_hash(path, flag)
    state = read_checkpoint(path, f"{flag} {path}")
    check_run_state(state, f"{flag} {path}")
    return state


def check_file(path: Path, flag: str) -> None:
    """Raise UserError if there is no such file; for a folder the message names its newest checkpoint."""
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{flag} {path}: there is no such file ({error.strerror})") from error
    if stat.S_ISDIR(kind):
        names = checkpoints_in(path)
        raise UserError(f"{flag} {path}: is a folder, give a checkpoint" + (f": {names[-1]}" if names else " in it"))
    if not stat.S_ISREG(kind):
        raise UserError(f"{flag} {path}: is no regular file but a pipe or device, give a checkpoint")


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all checkpoints, complete or not, in the order of their names; the best one only if it alone is left."""
    named = [path for path in folder.glob("checkpoint-*.pth") if path.name != BEST]
    best = [folder / BEST] if (folder / BEST).exists() else []
    return sorted(named, key=order_by_name) or best


def run_folder_of(path: Path) -> Path | None:
    """Return the folder of a run that `path`, behind its symbolic links, lies in or is; None if it lies in none."""
    path = path.resolve()
    for folder in (path, *path.parents):
        if (folder / RUN_FILE).is_file() or next(folder.glob("checkpoint-*.pth.json"), None):
            return folder
    return None


def complete_checkpoints(folder: Path, with_best: bool = False) -> list[tuple[Path, Manifest]]:
    """Return the checkpoints that have a manifest, oldest first; see `CheckpointStore.list`."""
    paths = checkpoints_in(folder)
    if with_best and (folder / BEST).exists() and folder / BEST not in paths:
        paths.append(folder / BEST)
    manifests = [(path, read_manifest(path)) for path in paths]
    return sorted(((p, m) for p, m in manifests if m is not None), key=lambda item: (item[1].step, item[1].time))


def order_by_name(path: Path) -> tuple[int, int, int]:
    """Return a key for sorting: checkpoint-N.pth, after epoch N, is newer than checkpoint-N-stepM.pth, within it."""
    match = re.fullmatch(r"checkpoint-(\d{1,12})(?:-step(\d{1,15}))?\.pth", path.name)
    if match is None:
        return (-1, 0, 0)
    epoch, step = match.groups()
    return (int(epoch), 0 if step else 1, int(step or 0))


def verify_hash(path: Path, flag: str) -> None:
    """Raise UserError if the manifest beside the file gives another size or hash."""
    manifest = read_manifest(path)
    if manifest is None:
        return
    size = path.stat().st_size
    if size != manifest.bytes:
        raise UserError(f"{flag} {path}: is damaged, {size} bytes where {manifest.bytes} were written")
    with open(path, "rb") as file:
        digest = sha256_of(file)
    if digest != manifest.sha256:
        raise UserError(f"{flag} {path}: is damaged, its SHA-256 is not the one that was written")
