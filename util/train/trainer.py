"""What every kind of training shares: its state, the optimiser step, an epoch of updates, a line of log.

A kind of training is a `Trainer` with an `update` of its own: see the three engines.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util.data.samples import Batch
from util.data.sources import ImageSource
from util.optim.metrics import NON_FINITE, Meter
from util.optim.nonfinite import FILE as NONFINITE_FILE
from util.optim.nonfinite import NonFiniteWatch, write_report
from util.optim.optimizer import set_learning_rate
from util.optim.schedules import learning_rate
from util.runtime.distributed import any_rank, is_main, sum_over_ranks
from util.runtime.errors import RunError
from util.runtime.logs import RunLog, peak_memory_bytes
from util.runtime.sharding import cut_moments, cut_weights, gathered, whole
from util.runtime.stop import StopRequest

MOST_SKIPPED_IN_A_ROW = 10
EMA_PREFIX = "ema."  # of the names in a checkpoint's `model_ema`, as LUT's release writes them


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint must hold.

    There is no generator state: whatever is drawn is a function of (seed, epoch, sample) or of (seed, update, rank).
    """

    model: nn.Module
    model_ema: nn.Module | None  # follows the model: the momentum encoder, or an average of the classifier
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    updates: int = 0  # optimiser steps of the whole run so far
    best_metric: float | None = None  # the highest that an evaluation or monitor has found, where rank 0 knows it
    skeleton: nn.Module | None = None  # with --parallel fsdp: the model without numbers, see util/runtime/sharding.py

    def state_dict(self) -> dict[str, Any]:
        """MAE's layout: `model`, `model_ema` with keys prefixed `ema.`, `optimizer`, `scaler`.

        On all ranks together: what is sharded is put together, for rank 0 alone.
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
        return state if self.skeleton is None else whole(state, keep=is_main())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, strict: what is missing or superfluous is an error."""
        self.model.load_state_dict(cut_weights(state["model"], self.model))
        self.optimizer.load_state_dict(cut_moments(state["optimizer"], self.optimizer))
        if bool(state["scaler"]) == self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        elif is_main():  # --amp auto on another kind of device
            here, there = ("fp16", "another precision") if self.scaler.is_enabled() else ("another precision", "fp16")
            print(f"WARNING: --amp: {there} until now, {here} from here on", file=sys.stderr)
        self.updates = state["updates"]
        self.best_metric = state.get("best_metric")
        if self.model_ema is not None:
            followed = {name.removeprefix(EMA_PREFIX): x for name, x in state["model_ema"].items()}
            self.model_ema.load_state_dict(cut_weights(followed, self.model_ema))

    def record_metric(self, metric: float | None) -> None:
        """Remember the value by which the best checkpoint is chosen, if it is higher than all before."""
        if metric is not None:
            self.best_metric = metric if self.best_metric is None else max(self.best_metric, metric)

    def unsharded(self, module: nn.Module, device: torch.device, keep: bool = True) -> nn.Module | None:
        """The model, or the average of it, for other calls than `forward` and for ranks alone; see `gathered`."""
        return gathered(module, self.skeleton, device, keep)


@dataclass
class Trainer:
    """What an update needs beside its batches; `config` holds the settings of OptimConfig and RunConfig."""

    config: Any
    state: TrainState
    model: nn.Module  # the state's model, inside DistributedDataParallel where there are several processes
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32
    updates_per_epoch: int
    bad_images: int = 0  # skipped so far by this process (--on_bad_image skip)
    meter: Meter = field(init=False)
    watch: NonFiniteWatch = field(init=False)
    stop: StopRequest = field(init=False)
    means: dict[str, float] = field(default_factory=dict)  # of the losses, between the last two log lines
    skipped: int = 0  # updates left out so far (--on_nonfinite skip)
    before_update: Callable[[], None] = lambda: None  # raises what went wrong beside the training
    before_end: Callable[[], None] = lambda: None  # waits on all ranks for what one of them still does beside it

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)
        self.watch = NonFiniteWatch(self.state.model, self.device, not self.state.scaler.is_enabled())
        self.stop = StopRequest(self.config.max_minutes)
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._losses: dict[str, Tensor] = {}
        self._statistics: list[Tensor] = []
        self._skipped_in_a_row = 0

    def update(self, batches: list[Batch]) -> None:
        """One optimiser step on the mean loss over `accum_iter` batches of equal size."""
        raise NotImplementedError

    def to_device(self, batches: list[Batch]) -> list[Batch]:
        """The batches on the device; on a GPU copied and augmented beside the update that it still computes."""
        if self._side is None:
            return [self.batch_to_device(batch) for batch in batches]
        with torch.cuda.stream(self._side):
            brought = [self.batch_to_device(batch) for batch in batches]
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._side)
        for tensor in (x for batch in brought for x in batch if x.is_cuda):
            tensor.record_stream(now)  # its memory is not given away before the update has read it
        return brought

    def batch_to_device(self, batch: Batch) -> Batch:
        """One batch; sample numbers stay on the CPU, where they are read."""
        raise NotImplementedError

    def begin_update(self) -> None:
        """Set the learning rate; with --on_nonfinite skip keep what a bad forward pass would spoil."""
        set_learning_rate(self.state.optimizer, self.lr(self.state.updates))
        self._losses = {}
        if self.config.on_nonfinite == "skip":
            self._statistics = [buffer.clone() for buffer in self.state.model.buffers()]

    def record(self, **losses: Tensor) -> None:
        """Add the losses of one part of the update, 0-dim, to what is logged and watched."""
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0) + loss.detach()

    @property
    def total_updates(self) -> int:
        """Optimiser steps of the whole run, which the schedules span."""
        return self.config.epochs * self.updates_per_epoch

    @property
    def epochs(self) -> int:
        """Passes over the data that they take; the last one may be cut short."""
        return -(-self.total_updates // self.updates_per_epoch)

    @property
    def last_update(self) -> int:
        """Where the run ends: after all of them, or before by --max_steps."""
        return min(self.total_updates, self.config.max_steps or self.total_updates)

    @property
    def finished(self) -> bool:
        """Whether the state stands there."""
        return self.state.updates >= self.last_update

    def lr(self, updates: int) -> float:
        """Learning rate of the update after so many."""
        config, warmup = self.config, self.config.warmup_epochs * self.updates_per_epoch
        return learning_rate(updates, self.total_updates, warmup, config.peak_lr, config.min_lr)

    def step_optimizer(self, batches: list[Batch]) -> bool:
        """Clip and step; False where the step was left out: fp16 overflowed, or --on_nonfinite skip."""
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
        scale = state.scaler.get_scale()  # waits for the GPU in fp16 only: which steps are taken must be known
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        taken = state.scaler.get_scale() >= scale
        self.meter.update(**{name: loss / len(batches) for name, loss in self._losses.items()})
        if taken:  # of a step that overflowed the norm is infinite by design
            self.meter.update(grad_norm=norm)
        return taken

    def skip_update(self) -> None:
        """Leave the update out as if its images had not been; too many in a row end the run.

        Raises:
            RunError: on all ranks together.
        """
        self.state.scaler.update()
        self.state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.state.model.buffers(), self._statistics, strict=True):
            buffer.copy_(before)
        self.skipped += 1
        self._skipped_in_a_row += 1
        said = self.describe_nonfinite()
        if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            self.before_end()
            raise RunError(
                f"--on_nonfinite skip: {MOST_SKIPPED_IN_A_ROW} updates in a row were not finite, last: {said}"
            )
        if is_main():
            print(f"WARNING: left out {said}", file=sys.stderr)

    def describe_nonfinite(self) -> str:
        """Write down the first update since the last look that was not finite, and say it; on all ranks together."""
        report = self.watch.report()
        self.watch.reset()
        if not report:
            return "an update whose loss was not finite"
        scale = self.state.scaler.get_scale() if self.state.scaler.is_enabled() else 1.0
        lr = self.lr(report["update"] - 1)  # the log line may be many updates later
        more = {"lr": lr, "scale_now": scale}
        losses = [rank["losses"] for rank in report["ranks"]]
        at_fault = [any(isinstance(value, str) for value in found.values()) for found in losses]
        culprit = at_fault.index(True) if any(at_fault) else 0  # a loss may be finite and its gradient not
        parts = ", ".join(f"{name} {value}" for name, value in losses[culprit].items())
        worst = [name for name, norm in report["gradient_norms"].items() if isinstance(norm, str)]
        where = f"; gradients not finite in {', '.join(worst[:4])}{', ...' * (len(worst) > 4)}" if worst else ""
        path = Path(self.config.output_dir) / NONFINITE_FILE
        if is_main():
            write_report(report, path.parent, more)
        return (
            f"update {report['update']} ({parts} on rank {culprit}; lr {lr:.3g}, loss scale now {scale:g}{where});"
            f" its samples and gradient norms are in {path}"
        )

    def autocast(self) -> torch.autocast:
        """Mixed precision of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def gradients_stay_local(self, unless: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients in the last part of an accumulated update only."""
        parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if parallel and not unless else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------------
# An epoch
# --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Where the time since the last log line went."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        self.begin, self.waited, self.updates = time.perf_counter(), 0.0, 0

    def wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch] | None:
        """The next batches, the time until they are there counted as waiting; None at the end."""
        begin = time.perf_counter()
        found = next(batches, None)
        self.waited += time.perf_counter() - begin
        return found

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return max(time.perf_counter() - self.begin, 1e-9)


def in_groups(loader: Iterable[Batch], size: int, number: int) -> Iterator[list[Batch]]:
    """`number` lists of `size` batches (a stream would go on for ever)."""
    batches = iter(loader)
    for _ in range(number):
        yield [next(batches) for _ in range(size)]


def train_one_epoch(
    trainer: Trainer, loader: Iterable[Batch], source: ImageSource | None, updates: int, epoch: int, log: RunLog
) -> None:
    """Train for `updates` optimiser steps, up to --max_steps or a request to stop; log every --print_freq of them.

    Raises:
        RunError: on all ranks together, a loss was NaN or infinite since the last log line.
    """
    config, state = trainer.config, trainer.state
    trainer.model.train()
    groups, stopwatch = in_groups(loader, config.accum_iter, updates), Stopwatch()
    while not trainer.finished and not trainer.stop.agreed():
        batches = stopwatch.wait_for(groups)
        if batches is None:
            break
        trainer.before_update()
        trainer.bad_images += report_bad_images(batches, source, log)
        trainer.update(trainer.to_device(batches))
        stopwatch.updates += 1
        if state.updates % config.print_freq == 0:
            log_interval(trainer, stopwatch, epoch, log)
    if stopwatch.updates:
        log_interval(trainer, stopwatch, epoch, log)


def log_interval(trainer: Trainer, stopwatch: Stopwatch, epoch: int, log: RunLog) -> None:
    """Means since the last log line; the only place of the loop that waits for the device."""
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
        said = trainer.describe_nonfinite()
        trainer.before_end()
        raise RunError(
            f"the loss is no longer finite: {said}. Nothing was saved since: resume from the"
            " last checkpoint with --on_nonfinite skip, or begin a new run from its weights with a lower learning rate,"
            " --clip_grad 1 or --amp fp32"
        )
    trainer.watch.reset()
    stopwatch.restart()


def report_bad_images(batches: list[Batch], source: ImageSource | None, log: RunLog) -> int:
    """Name and count this rank's skipped images (--on_bad_image skip); indices are on the CPU: it waits for nothing.

    Args:
        source: None for a stream, whose samples have no names.
    """
    found = 0
    for batch in batches:
        if source is None:
            skipped = int((batch.read_index - batch.index).sum())
            if skipped:
                log.text_of_any_rank(f"left out {skipped} unreadable samples of the stream")
            found += skipped
            continue
        for place in (batch.index != batch.read_index).nonzero().flatten().tolist():
            bad, taken = (source.name(int(indices[place])) for indices in (batch.index, batch.read_index))
            log.text_of_any_rank(f"skipped a bad image: {bad}; took {taken} in its place")
            found += 1
    return found
