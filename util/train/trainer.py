"""What every kind of training shares: the optimiser step, an epoch of updates, a log line.

A kind of training is a `Trainer` with an `update` of its own: see the three engines.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from util.config.groups import as_dict
from util.data.samples import Batch
from util.data.sources import ImageSource
from util.optim.metrics import NON_FINITE, Meter
from util.optim.nonfinite import FILE as NONFINITE_FILE
from util.optim.nonfinite import NonFiniteWatch, describe_report, write_report
from util.optim.optimizer import set_learning_rate
from util.optim.schedules import learning_rate
from util.runtime.distributed import any_rank, barrier, check_in_sync, is_main, sum_over_ranks
from util.runtime.errors import RunError
from util.runtime.logs import RunLog, peak_memory_bytes
from util.runtime.sharding import cut_moments, cut_weights, gathered, unsharded
from util.runtime.stop import StopRequest
from util.weights.checkpoint import CheckpointStore

MOST_SKIPPED_IN_A_ROW = 10
EMA_PREFIX = "ema."  # of the names in a checkpoint's `model_ema`, as LUT's release writes them


class NonFiniteError(RunError):
    """The loss became NaN or infinite. All ranks raise it together."""


@dataclass
class TrainState:
    """Everything that training changes, and so everything that a checkpoint must hold.

    There is no generator state: every random draw is a function of (seed, epoch, sample) or of (seed, update, rank).
    """

    model: nn.Module
    model_ema: nn.Module | None  # EMA of the model: the momentum encoder, or the average of a classifier's weights
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    updates: int = 0  # optimiser steps of the whole run so far
    best_metric: float | None = None  # the highest metric of all evaluations; known to rank 0
    skeleton: nn.Module | None = None  # with --parallel fsdp: the model on the meta device, see `gathered`

    def state_dict(self) -> dict[str, Any]:
        """Return MAE's layout: `model`, `model_ema` with keys prefixed `ema.`, `optimizer`, `scaler`.

        A collective: all ranks call it, and sharded tensors are gathered on rank 0.
        """
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "best_metric": self.best_metric,
        }
        if self.model_ema is not None:
            state["model_ema"] = {EMA_PREFIX + name: x for name, x in self.model_ema.state_dict().items()}
        return state if self.skeleton is None else unsharded(state, keep=is_main())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Missing and unexpected names raise an error."""
        self.model.load_state_dict(cut_weights(state["model"], self.model))
        self.optimizer.load_state_dict(cut_moments(state["optimizer"], self.optimizer))
        if bool(state["scaler"]) == self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        elif is_main():  # --amp auto on another kind of device
            now, before = ("fp16", "another precision") if self.scaler.is_enabled() else ("another precision", "fp16")
            print(f"WARNING: --amp: the run used {before} until now and uses {now} from here on", file=sys.stderr)
        self.updates = state["updates"]
        self.best_metric = state.get("best_metric")
        if self.model_ema is not None:
            averages = {name.removeprefix(EMA_PREFIX): x for name, x in state["model_ema"].items()}
            self.model_ema.load_state_dict(cut_weights(averages, self.model_ema))

    def record_metric(self, metric: float | None) -> None:
        """Keep the highest metric, by which the best checkpoint is chosen."""
        if metric is not None:
            self.best_metric = metric if self.best_metric is None else max(self.best_metric, metric)

    def unsharded(self, module: nn.Module, device: torch.device, keep: bool = True) -> nn.Module | None:
        """Return the model or its EMA with whole weights, for any method and for one rank alone; see `gathered`."""
        return gathered(module, self.skeleton, device, keep)


@dataclass
class Trainer:
    """Makes updates from batches that are handed to it; `config` holds the settings of UpdateConfig and RunConfig."""

    config: Any
    state: TrainState
    model: nn.Module  # the state's model, inside DistributedDataParallel where there are several processes
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32
    updates_per_epoch: int
    bad_images: int = 0  # that this process has skipped so far (--on_bad_image skip)
    skipped: int = 0  # updates that were left out so far (--on_nonfinite skip)
    means: dict[str, float] = field(default_factory=dict)  # of the losses, between the last two log lines
    meter: Meter = field(init=False)
    watch: NonFiniteWatch = field(init=False)
    stop: StopRequest = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)
        self.watch = NonFiniteWatch(self.state.model, self.device, not self.state.scaler.is_enabled())
        self.stop = StopRequest(self.config.max_minutes)
        self._side_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._losses: dict[str, Tensor] = {}
        self._buffers_before: list[Tensor] = []
        self._skipped_in_a_row = 0

    # ---- what a kind of training defines -------------------------------------------------------------------

    def update(self, batches: list[Batch]) -> None:
        """Take one optimiser step on the mean loss over `accum_iter` batches of equal size."""
        raise NotImplementedError

    def batch_to_device(self, batch: Batch) -> Batch:
        """Copy one batch to the device; sample numbers stay on the CPU, where they are read."""
        raise NotImplementedError

    # ---- the schedule --------------------------------------------------------------------------------------

    @property
    def total_updates(self) -> int:
        """Optimiser steps of the whole run, which the schedules span."""
        return self.config.epochs * self.updates_per_epoch

    @property
    def epochs(self) -> int:
        """Passes over the data that these updates take; where a stage counts updates, the last one may be cut short."""
        return -(-self.total_updates // self.updates_per_epoch)

    @property
    def last_update(self) -> int:
        """The update that ends the run: the last of all, or an earlier one by --max_steps."""
        return min(self.total_updates, self.config.max_steps or self.total_updates)

    @property
    def finished(self) -> bool:
        """True once the last update is done."""
        return self.state.updates >= self.last_update

    def lr(self, updates: int) -> float:
        """Return the learning rate of the update that follows `updates` others."""
        config, warmup = self.config, self.config.resolved_warmup_epochs * self.updates_per_epoch
        return learning_rate(updates, self.total_updates, warmup, config.peak_lr, config.min_lr)

    # ---- the parts of an update ----------------------------------------------------------------------------

    def to_device(self, batches: list[Batch]) -> list[Batch]:
        """Copy the batches to the device; a GPU copies and augments them beside the update that it still computes."""
        if self._side_stream is None:
            return [self.batch_to_device(batch) for batch in batches]
        with torch.cuda.stream(self._side_stream):
            copies = [self.batch_to_device(batch) for batch in batches]
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._side_stream)
        for tensor in (x for batch in copies for x in batch if x.is_cuda):
            tensor.record_stream(stream)  # its memory is not given away before the update has read it
        return copies

    def begin_update(self) -> None:
        """Set the learning rate; with --on_nonfinite skip keep the buffers, which a bad forward pass would spoil."""
        set_learning_rate(self.state.optimizer, self.lr(self.state.updates))
        self._losses = {}
        if self.config.on_nonfinite == "skip":
            self._buffers_before = [buffer.clone() for buffer in self.state.model.buffers()]

    def record(self, **losses: Tensor) -> None:
        """Add the losses of one part of the update, 0-dim tensors, to those that are logged and watched."""
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0) + loss.detach()

    def step_optimizer(self, batches: list[Batch]) -> bool:
        """Clip the gradient and step; return False where fp16 overflowed or --on_nonfinite skip left the step out."""
        state, config = self.state, self.config
        state.scaler.unscale_(state.optimizer)
        norms = self.watch.gradient_norms()
        norm = norms.norm()
        bad = self.watch.record(state.updates + 1, self._losses, norms, [batch.index for batch in batches])
        if config.on_nonfinite == "skip" and any_rank(bad):
            self.skip_update()
            return False
        self._skipped_in_a_row = 0
        if config.clip_grad is not None:
            torch._foreach_mul_(self.watch.gradients(), (config.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        scale = state.scaler.get_scale()  # waits for the GPU in fp16 only: whether a step was taken must be known
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        taken = state.scaler.get_scale() >= scale
        self.meter.update(**{name: loss / len(batches) for name, loss in self._losses.items()})
        if taken:  # the norm of a step that overflowed is infinite by design
            self.meter.update(grad_norm=norm)
        return taken

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass in mixed precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def gradients_stay_local(self, unless: bool) -> contextlib.AbstractContextManager:
        """Return a context in which ranks exchange no gradients, for all but the last part of an accumulated update."""
        parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if parallel and not unless else contextlib.nullcontext()

    def save(self, store: CheckpointStore, facts: dict[str, Any], metric: float | None) -> None:
        """Write a checkpoint with further `facts` from rank 0, once all ranks are known to hold the same weights."""
        state = self.state
        check_in_sync(state.model, "model")
        if state.model_ema is not None:
            check_in_sync(state.model_ema, "EMA of the model")
        tensors = state.state_dict()  # on all ranks: what is sharded is gathered
        if is_main():
            epoch, rest = divmod(state.updates, self.updates_per_epoch)
            entries = tensors | facts | {"epoch": epoch - 1, "config": as_dict(self.config)}
            epoch_in_name = epoch if rest else epoch - 1  # the epoch under way, or the last one finished
            write = store.save_in_background if self.config.save_in_background else store.save
            write(entries, epoch=epoch_in_name, step=state.updates, metric=metric, mid_epoch=rest > 0)
        barrier()

    # ---- losses that are not finite ------------------------------------------------------------------------

    def skip_update(self) -> None:
        """Leave the update out as if its images had not been.

        Raises:
            NonFiniteError: ten updates in a row were left out.
        """
        self.state.scaler.update()
        self.state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.state.model.buffers(), self._buffers_before, strict=True):
            buffer.copy_(before)
        self.skipped += 1
        self._skipped_in_a_row += 1
        description = self.describe_nonfinite()
        if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"--on_nonfinite skip: {MOST_SKIPPED_IN_A_ROW} updates in a row were not finite, last: {description}"
            )
        if is_main():
            print(f"WARNING: left out {description}", file=sys.stderr)

    def describe_nonfinite(self) -> str:
        """Write a report of the first update since the last log line that was not finite, and return it in one line.

        A collective: all ranks call it.
        """
        report = self.watch.report()
        self.watch.reset()
        if not report:
            return "an update whose loss was not finite"
        scale = self.state.scaler.get_scale() if self.state.scaler.is_enabled() else 1.0
        lr = self.lr(report["update"] - 1)  # the log line may be many updates later
        path = Path(self.config.output_dir) / NONFINITE_FILE
        if is_main():
            write_report(report, path.parent, {"lr": lr, "scale_now": scale})
        return describe_report(report, lr, scale, path)


# --------------------------------------------------------------------------------------------------------
# An epoch
# --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Measure the time since the last log line, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        self.begin, self.waited, self.updates = time.perf_counter(), 0.0, 0

    def wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch] | None:
        """Return the next batches, None at the end; the time until they come counts as waiting."""
        begin = time.perf_counter()
        group = next(batches, None)
        self.waited += time.perf_counter() - begin
        return group

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return max(time.perf_counter() - self.begin, 1e-9)


def in_groups(loader: Iterable[Batch], size: int, number: int) -> Iterator[list[Batch]]:
    """Yield `number` lists of `size` batches; a stream never ends."""
    batches = iter(loader)
    for _ in range(number):
        yield [next(batches) for _ in range(size)]


def train_one_epoch(
    trainer: Trainer,
    loader: Iterable[Batch],
    updates: int,
    epoch: int,
    store: CheckpointStore,
    log: RunLog,
    source: ImageSource | IterableDataset,
) -> None:
    """Train for `updates` optimiser steps, up to --max_steps or a request to stop; log every --print_freq of them.

    Raises:
        NonFiniteError: a loss was NaN or infinite since the last log line.
        RunError: the last save in the background failed.
    """
    config, state = trainer.config, trainer.state
    trainer.model.train()
    groups, stopwatch = in_groups(loader, config.accum_iter, updates), Stopwatch()
    while not trainer.finished and not trainer.stop.agreed():
        batches = stopwatch.wait_for(groups)
        if batches is None:
            break
        store.raise_failure()
        trainer.bad_images += report_bad_images(batches, source, log)
        trainer.update(trainer.to_device(batches))
        stopwatch.updates += 1
        if state.updates % config.print_freq == 0:
            log_interval(trainer, stopwatch, epoch, log)
    if stopwatch.updates:
        log_interval(trainer, stopwatch, epoch, log)


def log_interval(trainer: Trainer, stopwatch: Stopwatch, epoch: int, log: RunLog) -> None:
    """Log the means since the last log line. This is the only place of the loop that waits for the device."""
    config, updates = trainer.config, trainer.state.updates
    means = trainer.meter.drain(reduce=True)
    broken = means.pop(NON_FINITE)
    trainer.means = means
    speed = stopwatch.updates * config.effective_batch / stopwatch.seconds
    data_wait = stopwatch.waited / stopwatch.seconds
    lr = max(group["lr"] for group in trainer.state.optimizer.param_groups)
    memory = peak_memory_bytes(trainer.device)
    values = means | {"lr": lr, "images_per_second": speed, "data_wait": data_wait, "memory_bytes": memory}
    if config.on_bad_image == "skip":
        bad_images = int(sum_over_ranks(torch.tensor(trainer.bad_images, device=trainer.device)))
        values |= {"bad_images": bad_images} if bad_images else {}
    if trainer.skipped:
        values["skipped_updates"] = trainer.skipped
    log.scalars(updates, values, epoch=epoch)
    log.progress(
        epoch=epoch + 1,
        epochs=trainer.epochs,
        step=updates,
        total_steps=trainer.last_update,
        losses=means,
        lr=lr,
        images_per_second=speed,
        data_wait=data_wait,
        memory_bytes=memory,
        seconds_left=(trainer.last_update - updates) * stopwatch.seconds / stopwatch.updates,
    )
    if broken:
        raise NonFiniteError(
            f"the loss is no longer finite: {trainer.describe_nonfinite()}. Nothing was saved since: resume from the"
            " last checkpoint with --on_nonfinite skip, or begin a new run from its weights with a lower learning rate,"
            " --clip_grad 1 or --amp fp32"
        )
    trainer.watch.reset()
    stopwatch.restart()


def report_bad_images(batches: list[Batch], source: ImageSource | IterableDataset, log: RunLog) -> int:
    """Name and count the images that this rank skipped (--on_bad_image skip).

    Sample numbers are on the CPU, so this waits for nothing. Samples of a stream have no names.
    """
    skipped = 0
    for batch in batches:
        if isinstance(source, IterableDataset):
            in_batch = int((batch.read_index - batch.index).sum())
            if in_batch:
                log.text_of_any_rank(f"left out {in_batch} unreadable samples of the stream")
            skipped += in_batch
            continue
        for place in (batch.index != batch.read_index).nonzero().flatten().tolist():
            bad, replacement = (source.name(int(indices[place])) for indices in (batch.index, batch.read_index))
            log.text_of_any_rank(f"skipped a bad image: {bad}; took {replacement} in its place")
            skipped += 1
    return skipped
