"""When to stop early: a signal or the clock asks, all ranks agree on one update; the run then saves and is requeued."""

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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send before they kill
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether to stop, agreed between the ranks without waiting for each other.

    `agreed` is called once per update on every rank. It starts a small exchange on the CPU (gloo) and looks at the
    result of the one before, which has had a whole update's time: so all ranks see the same answer at the same
    update, one update late, and none waits.

    Args:
        max_minutes: ask to stop after so long; None: never.
    """

    def __init__(self, max_minutes: float | None = None):
        self.reason = ""  # why this rank asks, empty while it does not
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = max_minutes
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def listen(self) -> StopRequest:
        """Take the scheduler's signals as requests; a second one changes nothing."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
            # while Python shuts down it would give the signal its deadly default back
            atexit.register(signal.signal, number, signal.SIG_IGN)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # nothing but a note: the update, save or evaluation under way is finished first
        self.reason = self.reason or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank had asked when all of them called this the last time."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = self.reason or f"--max_minutes {self._limit:g}"
        if self._group is None:
            return bool(self.reason)
        before = self._pending
        asked = torch.tensor(float(bool(self.reason)))
        self._pending = (dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked)
        if before is None:
            return False
        work, answer = before
        work.wait()
        if answer.item() and not self.reason:
            self.reason = "another rank"
        return bool(answer.item())


def end_with_launcher() -> None:
    """Let the kernel end this process when its launcher dies: an orphan must not train on and save.

    Without torchrun or scripts/submit.py, nothing happens.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel end this process when its parent dies, however it dies. Only Linux can."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
