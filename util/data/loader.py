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
from util.runtime.errors import LOADERS_DEATH, kill_loaders


class Loader(DataLoader):
    """A DataLoader that never waits for a batch for longer than `loader_timeout` seconds (0: for ever).

    DataLoader's own `timeout` ends once a loader process has announced a batch; one that hangs before it has handed
    over the batch's memory would be waited for without end. An alarm sees that too; only the main thread can have one.
    One that dies then leaves errors of sockets or pickle, which name no loader: they are raised as one that does.

    Loader processes outlive SIGTERM, which launchers and schedulers send to a whole group: the run still needs them for
    the update under way, and ends them itself.

    Raises:
        RuntimeError: while iterating, a loader process died or hung; see `util.runtime.errors.loaders_death`.
    """

    def __init__(self, dataset, *, loader_timeout: float = 600.0, **settings: Any):
        if settings.get("num_workers") and sys.platform == "linux":
            # others get copies of the names and cannot map cached images; from 3.14 on they are Python's default
            settings["multiprocessing_context"] = "fork"
        super().__init__(dataset, worker_init_fn=ignore_sigterm, **settings)
        self.loader_timeout = loader_timeout

    def __iter__(self) -> Iterator:
        if isinstance(self.dataset, PretrainStream):  # its reader's order follows from what this draws
            self.generator = torch.Generator().manual_seed(self.dataset.seed * 1_000_003 + self.dataset.epoch)
        return self._watched() if self.num_workers else super().__iter__()

    def _watched(self) -> Iterator:
        # a forked process blocks what is blocked here: before torch's handler is there, and before ours follows it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            with self._watch():  # processes that live on are asked here whether they are ready
                batches = super().__iter__()
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
            if not broke_off(error):
                raise
            raise RuntimeError(f"{LOADERS_DEATH}: a batch broke off ({type(error).__name__} {error})") from error
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


def ignore_sigterm(worker: int) -> None:
    """In a loader process that was not forked, after torch has set its handler, by which the signal is deadly."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def broke_off(error: Exception) -> bool:
    """Whether it is what is left of a batch whose loader process ended while handing it over."""
    of_the_data_set = "DataLoader worker process" in str(error)  # torch's words around what a loader raised
    of_the_way = isinstance(error, EOFError | OSError | pickle.UnpicklingError) or "ancdata" in str(error)
    return of_the_way and not of_the_data_set


def as_it_is(batch: DrawnBatch) -> DrawnBatch:
    """For a data set that makes whole batches."""
    return batch


def training_loader(dataset, order: BatchOrder, num_workers: int, pin_memory: bool, timeout: float) -> DataLoader:
    """Batches in the order of `order`; set `order.epoch` before each pass."""
    stream = isinstance(dataset, IterableDataset)
    return Loader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 and not stream,  # a stream's epoch reaches new workers only
        loader_timeout=timeout,
        collate_fn=as_it_is if isinstance(dataset, DrawnDataset) else None,
        **(dict(batch_size=order.batch_size, drop_last=True) if stream else dict(batch_sampler=order)),
    )
