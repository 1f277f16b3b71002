"""Run the updates of a variant: in this process (Stepper), or in a process of its own (StepperProcess)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from engine_pretrain import PretrainTrainer, build_trainer
from util.bench.baseline import PlainBatch, PlainTrainer
from util.bench.config import StepConfig
from util.bench.counting import count_flops, count_traffic
from util.bench.profile import Profile, profile_updates
from util.bench.timing import PartTimer, compiled_graphs, patched, synchronise
from util.bench.variant import Variant
from util.data.samples import Batch, BatchOrder, DrawnBatch
from util.data.sources import ArraySource, ImageSource
from util.data.views import Normalise
from util.runtime.errors import RunError, UserError
from util.runtime.logs import peak_memory_bytes
from util.runtime.stop import end_with_parent
from util.train.pretraining import build_loader, build_state, cached

DISTINCT_IMAGES = 64  # largest number of different images in a batch; larger batches repeat them
DISTINCT_UPDATES = 2  # number of updates after which the batches repeat
UPDATES_PER_EPOCH = 1000  # of the simulated run, whose schedules set learning rate and momentum


class Stepper:
    """A variant with its models on the device and its batches in the memory of the host."""

    def __init__(self, variant: Variant):
        self.variant, self.device = variant, variant.device
        config = self.config
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        state, _ = build_state(config, variant.dtype, self.device)
        if variant.kind == "plain":
            total = config.epochs * UPDATES_PER_EPOCH
            self.trainer = PlainTrainer(config, state.model, self.device, variant.dtype, total)
        else:
            self.trainer = build_trainer(config, state, variant.dtype, self.device, UPDATES_PER_EPOCH)
            self.trainer.model.train()
        self.images = random_images(self.config)
        if self.config.cache == "device":
            self.trainer.images = self.images.to(self.device)
        self.groups: Iterator[list] = itertools.cycle(self.batches(config.batch_size))

    @property
    def config(self) -> StepConfig:
        """Return the settings that make models and batches; the plain variant uses none of the optimisations."""
        plain = dict(cache="none", augment_on="worker", compile="none", checkpoint_activations=False)
        return dataclasses.replace(
            self.variant.config, num_workers=0, **(plain if self.variant.kind == "plain" else {})
        )

    def batches(self, size: int) -> list[list]:
        """Return the batches of DISTINCT_UPDATES updates, one list per update."""
        config = dataclasses.replace(self.config, batch_size=size)
        batches = host_batches(config, self.images, self.device)
        if self.variant.kind == "plain":
            batches = [normalised_on_host(config, batch, self.device) for batch in batches]
        return [batches[i::DISTINCT_UPDATES] for i in range(DISTINCT_UPDATES)]

    def next_group(self) -> list:
        """Return the batches of the next update on the device, copied as a run copies them."""
        return self.to_device(next(self.groups))

    def to_device(self, group: list) -> list:
        """Copy the batches to the device; the plain trainer copies them itself."""
        if isinstance(self.trainer, PlainTrainer):
            return group
        return self.trainer.to_device(group)

    def updates(self, number: int) -> None:
        """Take this many optimiser steps, then read the losses as a log line does, which waits for the device."""
        for _ in range(number):
            self.trainer.update(self.next_group())
        if isinstance(self.trainer, PretrainTrainer):
            self.trainer.meter.drain()
            self.trainer.watch.reset()
        synchronise(self.device)

    def losses(self, number: int) -> list[float]:
        """Take this many updates and return their losses."""
        losses = []
        for _ in range(number):
            plain_losses = self.trainer.update(self.next_group())
            losses.append((plain_losses or self.trainer.meter.drain())["loss"])
        return losses

    def turn(self) -> float:
        """Take the updates of a turn and return the seconds per update."""
        steps = self.variant.config.steps
        synchronise(self.device)
        begin = time.perf_counter()
        self.updates(steps)
        return (time.perf_counter() - begin) / steps

    def parts(self) -> dict[str, float]:
        """Take one update and return the milliseconds of each part."""
        timer = PartTimer(self.device)
        synchronise(self.device)
        timer.start()
        if isinstance(self.trainer, PlainTrainer):
            self.trainer.update(self.next_group(), timer.mark)
        else:
            with part_marks(self.trainer, timer.mark):
                self.trainer.update(self.next_group())
        return timer.milliseconds()

    def flops_per_image(self) -> float:
        """Count the FLOPs of an update on at most 8 images, because counting takes more memory than an update."""
        batch_size = min(self.variant.config.batch_size, 8)
        group = self.to_device(self.batches(batch_size)[0])
        return count_flops(lambda: self.trainer.update(group)) / (batch_size * len(group))

    def traffic(self) -> int:
        """Count the bytes that the operators of an update read and write."""
        return count_traffic(lambda: self.updates(1))

    def peak_memory(self) -> int:
        """Return the peak bytes: of tensors during an update on a GPU, else of this process so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.updates(1)
        return peak_memory_bytes(self.device)

    def graphs(self) -> int:
        """Return how many graphs torch.compile has compiled so far in this process."""
        return compiled_graphs()

    def profile(self, folder: Path | None, number: int = 3) -> Profile:
        """Profile this many updates, and write the trace to the folder if one is given."""
        trace = folder and folder / f"{self.variant.name.replace(' ', '-')}.json"
        return profile_updates(lambda: self.trainer.update(self.next_group()), self.device, number, trace)


class StepperProcess:
    """A Stepper in a process of its own, so that memory and compiled code of one variant do not affect another.

    It has all methods of Stepper; each call waits for its result. Use it as a context.
    """

    def __init__(self, variant: Variant):
        self.variant = variant
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)
        self._pool.submit(_call, variant, "graphs", ())  # starts to build the Stepper beside those of other variants

    def __getattr__(self, method: str) -> Callable:
        def call(*arguments: Any) -> Any:
            try:
                return self._pool.submit(_call, self.variant, method, arguments).result()
            except BrokenProcessPool as error:
                raise RunError(f"{self.variant.name}: its process died, most likely out of memory") from error

        return call

    def __enter__(self) -> StepperProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()


_stepper: Stepper | None = None  # the one of this process, if a StepperProcess started it


def _call(variant: Variant, method: str, arguments: tuple) -> Any:
    """Call a method of this process's Stepper, which the first call builds."""
    global _stepper
    try:
        _stepper = _stepper or Stepper(variant)
        return getattr(_stepper, method)(*arguments)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size {variant.config.batch_size}: {variant.name} does not fit into the GPU's memory beside the"
            " other variants, make it smaller (--find_batch finds the largest batch of a variant alone)"
        ) from error


def random_images(config: StepConfig) -> ImageSource:
    """Return random images for the batches of DISTINCT_UPDATES updates, cached if --cache asks for it."""
    number = config.accum_iter * DISTINCT_UPDATES * min(config.batch_size, DISTINCT_IMAGES)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (number, config.in_chans, *config.resolved_input_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return cached(config, ArraySource(pixels, None, None, "random"))


def host_batches(config: StepConfig, images: ImageSource, device: torch.device) -> list[Batch | DrawnBatch]:
    """Return the images in batches from the data loader, in page-locked memory for a GPU."""
    distinct = min(config.batch_size, DISTINCT_IMAGES)
    order = BatchOrder(len(images), distinct, 1, rank=0, world_size=1, seed=config.seed)
    places = torch.arange(config.batch_size) % distinct
    pinned = (lambda x: x.pin_memory()) if device.type == "cuda" else (lambda x: x)
    return [type(batch)(*(pinned(x[places]) for x in batch)) for batch in build_loader(config, images, order, device)]


def normalised_on_host(config: StepConfig, batch: Batch, device: torch.device) -> PlainBatch:
    """Return the batch as a data loader that normalises would deliver it."""
    normalise = Normalise(config.resolved_mean, config.resolved_std, torch.device("cpu"))
    views = normalise(batch.views).transpose(0, 1).contiguous()  # [2, B, C, H, W]
    return PlainBatch(views.pin_memory() if device.type == "cuda" else views, batch.noise)


@contextlib.contextmanager
def part_marks(trainer: PretrainTrainer, mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` at the end of each part of our updates in the context."""

    def marked(before: str = "", after: str = "") -> Callable[[Callable], Callable]:
        def wrap(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if before:
                    mark(before)
                result = function(*args, **kwargs)
                if after:
                    mark(after)
                return result

            return call

        return wrap

    with contextlib.ExitStack() as stack:
        for name, wrap in {
            "context_targets": marked("data", "target"),
            "model": marked(after="student"),
            "record": marked("backward"),  # the losses are recorded after the backward pass
            "step_optimizer": marked(after="optimiser"),
            "update": marked(after="momentum"),
        }.items():
            stack.enter_context(patched(trainer, name, wrap))
        yield
