"""The data loader: worker processes that make batches, watched so that one that hangs or dies ends the run."""

from __future__ import annotations

import atexit
import contextlib
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from util.data.samples import BatchOrder, DrawnBatch, DrawnDataset, PretrainStream
from util.data.sources import check_descriptors
from util.runtime.errors import LOADERS_DEATH, kill_loaders


class Loader(DataLoader):
    """A DataLoader that never waits for a batch for longer than `loader_timeout` seconds (0: for ever).

    DataLoader's own `timeout` ends once a worker has announced a batch: a worker that hangs before it has handed over
    the batch's memory would be waited for without end. An alarm ends that wait too; only the main thread can have one.
    A worker that dies at that point leaves errors of sockets or pickle, which do not name it: they are raised as an
    error that does.

    Workers outlive SIGTERM, which launchers and schedulers send to a whole group: the run still needs them for the
    update under way, and ends them itself.

    Raises:
        RuntimeError: while iterating, a worker died or hung; see `util.runtime.errors.loaders_death`.
        OSError: there is no descriptor left.
    """

    def __init__(self, dataset, *, loader_timeout: float = 600.0, **settings: Any):
        if settings.get("num_workers") and sys.platform == "linux":
            # spawned workers, Python's default from 3.14, get copies of the names and cannot map cached images
            settings["multiprocessing_context"] = "fork"
        super().__init__(dataset, worker_init_fn=ignore_sigterm, **settings)
        self.loader_timeout = loader_timeout

    def __iter__(self) -> Iterator:
        if isinstance(self.dataset, PretrainStream):  # its reader's order follows from what this draws
            self.generator = torch.Generator().manual_seed(self.dataset.seed * 1_000_003 + self.dataset.epoch)
        return self._watched() if self.num_workers else super().__iter__()

    def _watched(self) -> Iterator:
        # a forked worker inherits the block, and so is safe until torch's handler is set and ours replaces it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            with self._watch():  # persistent workers are asked here whether they are ready
                batches = super().__iter__()
        except OSError:  # no descriptor or memory is left for all of them: Python would wait for those that started
            kill_loaders()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        atexit.unregister(kill_loaders)
        atexit.register(kill_loaders)  # before torch and Python wait for those that ignore their SIGTERM
        passed_over = self.dataset.start_batch % self.num_workers if isinstance(self.dataset, PretrainStream) else 0
        for _ in range(passed_over):
            with self._watch():
                next(batches)
        while True:
            with self._watch():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        def on_alarm(number: int, frame: FrameType | None) -> None:
            raise RuntimeError(f"{LOADERS_DEATH}: no batch came in {self.loader_timeout:g} seconds")

        timed = self.loader_timeout and threading.current_thread() is threading.main_thread()
        if timed:
            before = signal.signal(signal.SIGALRM, on_alarm)
            signal.setitimer(signal.ITIMER_REAL, self.loader_timeout)
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError):
                check_descriptors(error)
            if not broke_off(error):
                raise
            raise RuntimeError(f"{LOADERS_DEATH}: a batch broke off ({type(error).__name__} {error})") from error
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


def ignore_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a worker that was not forked, once torch has set its handler, which would end it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def broke_off(error: Exception) -> bool:
    """Return True for the errors that a worker leaves which ends while it hands over a batch."""
    from_data_set = "DataLoader worker process" in str(error)  # torch's words around what a worker raised
    from_transfer = isinstance(error, EOFError | OSError | pickle.UnpicklingError) or "ancdata" in str(error)
    return from_transfer and not from_data_set


def unchanged(batch: DrawnBatch) -> DrawnBatch:
    """Return the batch: the collate function of a data set that makes complete batches."""
    return batch


def training_loader(dataset, order: BatchOrder, num_workers: int, pin_memory: bool, timeout: float) -> DataLoader:
    """Return a loader of batches in the order of `order`; set `order.epoch` before each pass."""
    stream = isinstance(dataset, IterableDataset)
    return Loader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 and not stream,  # a stream's epoch reaches new workers only
        loader_timeout=timeout,
        collate_fn=unchanged if isinstance(dataset, DrawnDataset) else None,
        **(dict(batch_size=order.batch_size, drop_last=True) if stream else dict(batch_sampler=order)),
    )
