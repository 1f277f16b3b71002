"""Checkpoints that survive: written whole or not at all, hashed, verified on load, kept by a policy.

A checkpoint is a file `checkpoint-N.pth` and beside it a manifest `checkpoint-N.pth.json` with its SHA-256. The file
is durable before the manifest is written, and the manifest goes before the file when one is deleted: a manifest
never speaks of a file that is not there in full.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import weakref
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from util.runtime.errors import RunError, UserError, explain, loaders_death
from util.runtime.files import TEMPORARY, manifest_path, sha256_of, write_durably
from util.runtime.reading import Unreadable, as_count, read_mapping

BEST = "checkpoint-best.pth"
LOCK = ".lock"

# paths, which the `args` of other programs' files may hold, under their names in Python before 3.13 and in it
PATHS = [type("PosixPath", (PurePosixPath,), {"__module__": module}) for module in ("pathlib", "pathlib._local")]


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening it."""

    sha256: str
    bytes: int
    epoch: int  # finished, counted from 0
    step: int  # updates of the whole run
    metric: float | None  # the monitored value, higher is better
    time: float  # seconds since 1970


class CheckpointStore:
    """The checkpoints of one run, in its output folder.

    Args:
        keep_last: how many of the newest stay.
        keep_every: those after each so many epochs stay for ever; None: none do.
        keep_best: keep the one with the highest metric as `checkpoint-best.pth`.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None, keep_best: bool):
        self.folder, self.keep_last, self.keep_every, self.keep_best = folder, keep_last, keep_every, keep_best
        self._lock: TextIO | None = None
        self._writer = futures.ThreadPoolExecutor(max_workers=1)  # one at a time: the newest must end last
        self._writing: futures.Future | None = None
        self._copy: dict[str, Any] = {}  # what is written in the background; its memory serves the next save too

    def lock(self) -> None:
        """Keep other runs out of the folder until this process ends, however it ends; see `lock_folder`."""
        self._lock = lock_folder(self.folder)

    def unlock(self) -> None:
        """Let other runs in, once nothing is written here any more."""
        if self._writing is not None:
            futures.wait([self._writing])
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_in_background(self, state: dict[str, Any], **about: Any) -> None:
        """`save` beside the training: from a copy of the state in memory, made before this returns.

        Raises:
            RunError: the save before this one failed.
        """
        self.wait()
        self._copy = copy_to_cpu(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into page-locked memory are only queued
        self._writing = self._writer.submit(self.save, self._copy, **about)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            RunError: it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def is_writing(self) -> bool:
        """Whether a save in the background is still under way."""
        return self._writing is not None and not self._writing.done()

    def raise_failure(self) -> None:
        """RunError if a save in the background has failed meanwhile; does not wait."""
        if not self.is_writing:
            self.wait()

    def save(
        self, state: dict[str, Any], *, epoch: int, step: int, metric: float | None = None, mid_epoch: bool = False
    ) -> Path:
        """Write `checkpoint-{epoch}.pth` durably, then delete what the policy no longer keeps.

        Args:
            epoch: the last finished one, counted from 0 (with `mid_epoch`: the one that is under way).

        Raises:
            RunError: it could not be written, as on a full disk; older checkpoints are untouched.
        """
        for litter in self.folder.glob(f"{TEMPORARY}*"):  # of a run that was killed
            litter.unlink(missing_ok=True)
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
        """The metric of `checkpoint-best.pth`, None where there is none."""
        best = read_manifest(self.folder / BEST)
        return None if best is None else best.metric

    def would_be_best(self, metric: float | None) -> bool:
        """Whether the best is kept and no checkpoint so far had as high a metric."""
        return self.keep_best and metric is not None and (self.best_metric is None or metric > self.best_metric)

    def holds(self, step: int) -> bool:
        """Whether there is a complete checkpoint after so many updates."""
        return any(manifest.step == step for _, manifest in self.list())

    def link_best(self, path: Path, manifest: Manifest) -> None:
        """Give the checkpoint its second name, without a second copy where the file system can."""
        temporary = self.folder / f"{TEMPORARY}{BEST}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        manifest_path(self.folder / BEST).unlink(missing_ok=True)  # it speaks of the old best
        os.replace(temporary, self.folder / BEST)
        write_manifest(self.folder / BEST, manifest)

    def list(self, with_best: bool = False) -> list[tuple[Path, Manifest]]:
        """Complete checkpoints, oldest first; the best one's second name if asked for, or if it alone is left."""
        return complete_checkpoints(self.folder, with_best)

    def delete_old(self, newest: Path) -> None:
        """Apply the policy; the newest, which has just been written, always stays."""
        checkpoints = self.list()
        kept = {path for path, _ in checkpoints[-self.keep_last :]} | {newest}
        if self.keep_every is not None:
            kept |= {p for p, m in checkpoints if (m.epoch + 1) % self.keep_every == 0 and "-step" not in p.name}
        for path, _ in checkpoints:
            if path not in kept:
                manifest_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def load_latest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that is intact, or None where there is none at all.

        A damaged one is named on stderr and the one before is taken. Files without a manifest, which is written last,
        come last; one whose name says that it is newer is named too.

        Raises:
            UserError: there are checkpoints, and every one is damaged.
        """
        complete = [path for path, _ in reversed(self.list())]
        others = [path for path in reversed(checkpoints_in(self.folder)) if path not in complete]
        if complete and others and place_by_name(others[0]) > place_by_name(complete[0]):
            print(
                f"WARNING: {others[0]} has no manifest, so that it may be incomplete: going on from {complete[0].name};"
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
    """Keep other runs out of --output_dir as long as the returned file is open.

    Raises:
        UserError: another process holds it.
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
    """A copy in memory of all tensors in nested dicts and lists, which later updates do not change.

    Args:
        memory: an earlier copy of such a state, which is overwritten: fresh memory takes several times as long.
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
    """From now on the checkpoint counts."""
    write_durably(manifest_path(path), lambda file: file.write(json.dumps(asdict(manifest), indent=1).encode()))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest beside a checkpoint, None where there is none or it cannot be read."""
    try:
        manifest = Manifest(**read_mapping(manifest_path(path)))
    except (OSError, Unreadable, TypeError):
        return None
    counts = (manifest.bytes, manifest.epoch, manifest.step)
    right = isinstance(manifest.sha256, str) and None not in map(as_count, counts)
    numbers = (manifest.time, 0.0 if manifest.metric is None else manifest.metric)
    return manifest if right and all(isinstance(number, int | float) for number in numbers) else None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """Read a checkpoint of any program onto the CPU: .pth (no code in it is run) or .safetensors.

    Raises:
        UserError: no such file, damaged (by its manifest's hash where there is one), or not a checkpoint.
    """
    check_file(path, flag)
    verify_hash(path, flag)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace, *PATHS]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{flag} {path}: is no intact safetensors file ({error})") from error
    except Exception as error:  # torch and pickle raise nearly anything for a file that is none of theirs
        reason = "it holds code, and none of it was run" if "Unsupported global" in str(error) else type(error).__name__
        raise UserError(f"{flag} {path}: cannot be read as a checkpoint ({reason}); is it another file?") from error
    if not isinstance(state, dict):
        raise UserError(f"{flag} {path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def check_file(path: Path, flag: str) -> None:
    """UserError where there is no such file, with the newest checkpoint of a folder that is given in its place."""
    if path.is_dir():
        found = checkpoints_in(path)
        raise UserError(f"{flag} {path}: is a folder, give a checkpoint" + (f": {found[-1]}" if found else " in it"))
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete or not, the oldest by name first; the best one, a second name of one of them, where it is left alone."""
    named = [path for path in folder.glob("checkpoint-*.pth") if path.name != BEST]
    alone = [folder / BEST] if not named and (folder / BEST).exists() else []
    return sorted(named, key=place_by_name) or alone


def complete_checkpoints(folder: Path, with_best: bool = False) -> list[tuple[Path, Manifest]]:
    """See `CheckpointStore.list`."""
    paths = checkpoints_in(folder)
    if with_best and (folder / BEST).exists() and folder / BEST not in paths:
        paths.append(folder / BEST)
    found = [(path, read_manifest(path)) for path in paths]
    return sorted(((p, m) for p, m in found if m is not None), key=lambda item: (item[1].step, item[1].time))


def place_by_name(path: Path) -> tuple[int, int, int]:
    """For sorting: checkpoint-N.pth, after epoch N, is newer than checkpoint-N-stepM.pth, in epoch N."""
    found = re.fullmatch(r"checkpoint-(\d+)(?:-step(\d+))?\.pth", path.name)
    if found is None:
        return (-1, 0, 0)
    epoch, step = found.groups()
    return (int(epoch), 0 if step else 1, int(step or 0))


def verify_hash(path: Path, flag: str) -> None:
    """UserError where the manifest beside the file speaks of other bytes."""
    manifest = read_manifest(path)
    if manifest is None:
        return
    size = path.stat().st_size
    if size != manifest.bytes:
        raise UserError(f"{flag} {path}: is damaged, {size} bytes where {manifest.bytes} were written")
    with open(path, "rb") as file:
        found = sha256_of(file)
    if found != manifest.sha256:
        raise UserError(f"{flag} {path}: is damaged, its SHA-256 is not the one that was written")
