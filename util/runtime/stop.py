"""Early stops: a signal or the clock asks, all ranks agree on one update, save, and say how to continue."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
from types import FrameType

import torch
import torch.distributed as dist

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # sent before a job is killed
SCHEDULERS = ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR")  # set where something queues the command again by itself
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """A request to stop early, on which the ranks agree without waiting for each other.

    Every rank calls `agreed` once per update. It starts a small exchange on the CPU (gloo) and reads the result of the
    exchange before it, which has had the time of a whole update. So all ranks see the same answer at the same update,
    one update late, and none waits.

    Args:
        max_minutes: ask to stop after so many minutes; None: never.
    """

    def __init__(self, max_minutes: float | None = None):
        self.reason = ""  # why this rank asks, empty while it does not
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = max_minutes
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def listen(self) -> StopRequest:
        """Take Ctrl-C and the scheduler's signals as requests to stop.

        More signals of a scheduler change nothing. A second Ctrl-C ends the process at once, without saving.
        """
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, self._on_signal)
            # Python's shutdown would restore the signal's deadly default
            atexit.register(signal.signal, number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # it only records the request: the update, save or evaluation under way is finished first
        self.reason = self.reason or signal.Signals(number).name

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # deadly even in a collective that never returns
        if not self.reason and os.environ.get("RANK", "0") == "0":
            # print() must not be called in a handler: it may have interrupted another one
            os.write(2, b"\nstopping: what is under way is finished, then saved; Ctrl-C again ends without saving\n")
        self.reason = self.reason or "Ctrl-C"

    def agreed(self) -> bool:
        """Return whether any rank had asked to stop when all of them called this the last time."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = self.reason or f"--max_minutes {self._limit:g}"
        if self._group is None:
            return bool(self.reason)
        previous = self._pending
        asked = torch.tensor(float(bool(self.reason)))
        self._pending = (dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked)
        if previous is None:
            return False
        work, answer = previous
        work.wait()
        if answer.item() and not self.reason:
            self.reason = "another rank"
        return bool(answer.item())


def how_to_continue() -> str:
    """Say what continues a run that has stopped early: the scheduler does, or a person runs the same command."""
    if any(variable in os.environ for variable in SCHEDULERS):
        return "to be requeued"
    return "run the same command with --auto_resume to continue"


def end_with_launcher() -> None:
    """Let the kernel end this process when its launcher dies: an orphan must not train on and save.

    Without torchrun or scripts/submit.py, nothing happens.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel end this process when its parent dies, however it dies. Only Linux can do this."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
