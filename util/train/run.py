"""One run, from its settings to its result. All four mains have the same skeleton:

run = start_run(config, open_data)          # whatever can be wrong with the input is found before a model is built
model, state, trainer, evaluation = ...     # what a main is about
train_and_evaluate(run, trainer, dataset, evaluation, origin)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader, Dataset, IterableDataset

from util.config.checks import check
from util.config.groups import as_dict
from util.config.same_run import check_same_run, kind_of
from util.data.loader import training_loader
from util.data.samples import BatchOrder
from util.results.results import append_result, hardware_info, read_results
from util.runtime.amp import autocast_dtype, name_of
from util.runtime.compile_cache import use_compile_cache
from util.runtime.distributed import (
    Processes,
    barrier,
    check_same_on_all_ranks,
    is_main,
    main_says,
    start_processes,
    stop_processes,
    world_size,
)
from util.runtime.errors import Requeue, UserError, one_line
from util.runtime.logs import RunLog, format_duration, write_run_info
from util.runtime.sharding import check_sharding
from util.runtime.stop import how_to_continue
from util.train.cost import count_parameters
from util.train.evaluation import Evaluation
from util.train.resume import checkpoint_to_resume, lock_output, settings_to_share, share_saved_batch, store_of
from util.train.trainer import NonFiniteError, Trainer, train_one_epoch
from util.weights.checkpoint import CheckpointStore
from util.weights.run_state import CLASS_NAMES, check_moments


@dataclass
class Run:
    """A run before its model is built."""

    config: Any  # with --elastic: its batch is shared out among the processes
    processes: Processes
    dtype: torch.dtype | None  # of autocast; None: fp32
    data: Any  # `train` (None with --eval), and what else the evaluation needs
    order: BatchOrder
    store: CheckpointStore | None = None  # None with --dry_run
    checkpoint: dict[str, Any] | None = None  # to resume from; None: the run is fresh
    shared_settings: dict[str, Any] | None = None  # that whoever resumes from this run's checkpoints must share

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.processes.device

    @property
    def stage(self) -> str:
        """Return `pretrain`, `finetune`, `linprobe` or `segment`."""
        return kind_of(type(self.config))

    @property
    def loader_arguments(self) -> dict[str, Any]:
        """The arguments of `training_loader` beside its dataset."""
        config = self.config
        return dict(
            order=self.order,
            num_workers=config.resolved_num_workers,
            pin_memory=config.pins(self.device),
            timeout=config.loader_timeout,
        )


# --------------------------------------------------------------------------------------------------------
# Before the model
# --------------------------------------------------------------------------------------------------------


def start_run(config: Any, open_data: Callable[[Any, Processes], Any]) -> Run:
    """Start the processes, open the data and find the checkpoint to resume from.

    Args:
        open_data: opens the images that the settings name.

    Raises:
        UserError: for all that can be wrong with the input.
    """
    processes = start_processes(config.device, config.dist_backend)
    if config.print_config:
        if is_main():
            print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
        stop_processes()
        raise SystemExit(0)
    dtype = autocast_dtype(config.amp, processes.device)
    check_sharding(config.parallel, dtype, processes.device)
    data = open_data(config, processes)
    config = share_saved_batch(config)
    run = Run(config, processes, dtype, data, batch_order(config, data, processes))
    if config.dry_run:
        return run
    run.store = store_of(config)
    if not config.eval:
        run.shared_settings = settings_to_share(config, data.train)
        check_same_on_all_ranks({name: str(value) for name, value in run.shared_settings.items()})
        run.checkpoint = checkpoint_to_resume(config, run.store)
        if run.checkpoint is not None:
            check_same_run(run.shared_settings, run.checkpoint, config.elastic)
        if config.compile != "none":
            use_compile_cache(config.output_dir, processes.rank)
    return run


def batch_order(config: Any, data: Any, processes: Processes) -> BatchOrder:
    """Return which samples make up which batch.

    Raises:
        UserError: an epoch would not hold a single update, or the run would start after its end.
    """
    images = len(data.val if data.train is None else data.train)
    rank, ranks = processes.rank, processes.world_size
    order = BatchOrder(images, config.batch_size, config.accum_iter, rank, ranks, config.seed)
    if order.updates_per_epoch == 0 and not config.eval:
        raise UserError(
            f"--batch_size {config.batch_size}: x --accum_iter {config.accum_iter} x {ranks} processes ="
            f" {config.effective_batch} images per update, but the data set has {images}; make it smaller"
        )
    first = config.start_epoch * order.updates_per_epoch
    for flag in ("max_steps", "max_updates"):
        end = getattr(config, flag, None)
        check(
            end is None or first < end, "start_epoch", config.start_epoch, f"is update {first}, --{flag} ends at {end}"
        )
    return order


# --------------------------------------------------------------------------------------------------------
# The run of a model that has been built
# --------------------------------------------------------------------------------------------------------


def train_and_evaluate(
    run: Run, trainer: Trainer, dataset: Dataset | None, evaluation: Evaluation, origin: str
) -> None:
    """Resume, train all epochs with their evaluations, and write the result; with --eval evaluate alone.

    Args:
        dataset: yields the samples that `run.order` names; None with --eval.
        origin: a line for the log that says where the weights came from.

    Raises:
        Requeue: on all ranks together, after a checkpoint: a signal or --max_minutes asked for an early stop.
    """
    config, state = run.config, trainer.state
    lock_output(config, run.store)
    if config.eval:
        evaluation.evaluate_alone(run.stage, origin)
        return
    state.updates = config.start_epoch * run.order.updates_per_epoch
    fresh = run.checkpoint is None
    if not fresh:
        restore_state(state, run.checkpoint)
        run.checkpoint = None  # as large as the state, and nobody needs it any more
    loader = training_loader(dataset, **run.loader_arguments)
    log = open_log(run, trainer)
    if fresh and origin:
        log.text(origin)
    train(run, trainer, loader, evaluation, log)
    if is_main() and (trainer.means or not read_results(config.output_dir)):  # not of a finished run, called again
        metrics, hardware = evaluation.result(), hardware_info(run.device, run.dtype)
        append_result(config.output_dir, run.stage, as_dict(config), metrics, log.seconds, hardware)
    log.close()


def restore_state(state: Any, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint into the state of the run; UserError if it does not fit the model or the optimiser."""
    try:
        state.load_state_dict(checkpoint)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = one_line(str(error))[:300]
        raise UserError(f"--resume: the checkpoint does not fit this run's model and optimiser ({reason})") from error
    check_moments(state.optimizer, "--resume")


def open_log(run: Run, trainer: Trainer) -> RunLog:
    """Open the log of this run, write and print its settings."""
    config, state = run.config, trainer.state
    log = RunLog(config.output_dir, config.log_dir or config.output_dir, is_main(), resume_step=state.updates)
    if is_main():
        write_run_info(
            config.output_dir,
            as_dict(config),
            stage=run.stage,
            recipe=config.recipe,
            updates_per_epoch=trainer.updates_per_epoch,
            total_updates=trainer.last_update,
        )
    log.text(f"settings: {config.output_dir}/config.yaml (the same command with --print_config prints them)")
    log.text(
        f"{len(run.data.train)} images, {trainer.updates_per_epoch} updates of {config.effective_batch} per epoch;"
        f" {count_parameters(state.model) / 1e6:.1f} M parameters on {run.processes.world_size} x"
        f" {run.device.type}, {name_of(run.dtype)}; peak lr {config.peak_lr:.3g}"
    )
    if config.warmup_note:
        log.text(config.warmup_note)
    if state.updates:
        log.text(f"resumed after update {state.updates}")
    return log


def train(run: Run, trainer: Trainer, loader: DataLoader, evaluation: Evaluation, log: RunLog) -> None:
    """Train all epochs from the state's update on, with an evaluation and a checkpoint between them."""
    state, order, store = trainer.state, run.order, run.store
    if state.updates == 0 and evaluation.at_start:
        evaluation.evaluate_epoch(
            0, log
        )  # a random network's numbers; and proof that it works before hours have passed
    trainer.stop.listen()
    state.record_metric(store.best_metric)
    first_epoch, order.start_update = divmod(state.updates, order.updates_per_epoch)
    trained_before = trainer.finished  # killed between its last checkpoint and its result, or called again
    try:
        for epoch in range(first_epoch, first_epoch if trained_before else trainer.epochs):
            enter_epoch(loader, order, epoch)
            updates = order.updates_per_epoch - order.start_update
            train_one_epoch(trainer, loader, updates, epoch, store, log, run.data.train)
            if state.updates < order.updates_per_epoch * (epoch + 1) and not trainer.finished:
                save_and_stop(run, trainer)
            order.start_update = 0
            evaluate_and_save(run, trainer, evaluation, epoch + 1, log)
            if trainer.finished:
                break
        if trained_before and evaluation.every:
            state.record_metric(evaluation.evaluate_epoch(-(-state.updates // order.updates_per_epoch), log))
        wait_for_saves(store)
    except NonFiniteError:  # raised on all ranks
        wait_for_saves(store)
        raise
    finally:
        store.unlock()
    log.text(f"done: {state.updates} updates in {format_duration(log.seconds)}, see {run.config.output_dir}")


def enter_epoch(loader: DataLoader, order: BatchOrder, epoch: int) -> None:
    """Tell the order, or the stream that has none, which epoch comes and where in it the run resumes."""
    order.epoch = epoch
    if isinstance(loader.dataset, IterableDataset):
        loader.dataset.epoch = epoch
        loader.dataset.start_batch = order.start_update * order.accum_iter


def evaluate_and_save(run: Run, trainer: Trainer, evaluation: Evaluation, epochs: int, log: RunLog) -> None:
    """Evaluate and save after so many finished epochs, each where it is due."""
    config, state, store, last = run.config, trainer.state, run.store, trainer.finished
    metric = None
    try:
        if evaluation.every and (last or epochs % evaluation.every == 0):
            metric = evaluation.evaluate_epoch(epochs, log, last)
    except UserError:  # an unreadable validation image is no reason to lose the epoch
        if world_size() == 1:  # other ranks may not have met it, and would not join in a save
            save(run, trainer, metric=None)
            store.wait()
        raise
    state.record_metric(metric)
    due = epochs % config.save_freq == 0 or (config.keep_every and epochs % config.keep_every == 0)
    if last or due or main_says(store.would_be_best(metric), trainer.device):
        save(run, trainer, metric)


# --------------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------------


def save(run: Run, trainer: Trainer, metric: float | None) -> None:
    """Write a checkpoint with what a run that resumes from it must share, and the names of the classes."""
    class_names = None if run.stage == "pretrain" else run.data.class_names
    facts = {"binding_settings": run.shared_settings}
    facts |= {} if class_names is None else {CLASS_NAMES: list(class_names)}
    trainer.save(run.store, facts, metric)


def save_and_stop(run: Run, trainer: Trainer) -> None:
    """Save in the middle of an epoch, because a stop was asked for.

    Raises:
        Requeue: always, on all ranks together.
    """
    state, store = trainer.state, run.store
    store.wait()
    if state.updates and main_says(not store.holds(state.updates), trainer.device):
        save(run, trainer, metric=None)
    wait_for_saves(store)
    when = f"and saved after update {state.updates}" if state.updates else "before the first update"
    raise Requeue(f"stopped by {trainer.stop.reason} {when}; {how_to_continue()}")


def wait_for_saves(store: CheckpointStore) -> None:
    """Wait on all ranks for the last checkpoint.

    The next command may read it, and a launcher kills what is left of a group half a minute after its first process has
    ended.
    """
    store.wait()
    barrier()
