"""One run from its first to its last epoch: folder, checkpoints, resume, processes. The same for every main."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from util.config.groups import as_dict
from util.config.same_run import NAMES, check_same_run
from util.data.samples import BatchOrder
from util.data.sources import ImageSource, fingerprint
from util.runtime.amp import name_of
from util.runtime.compile_cache import use_compile_cache
from util.runtime.distributed import (
    Processes,
    barrier,
    check_in_sync,
    from_all_ranks,
    is_main,
    main_says,
    rank,
    world_size,
)
from util.runtime.errors import Requeue, UserError
from util.runtime.logs import RunLog, format_duration, write_run_info
from util.runtime.sharding import is_sharded
from util.runtime.stop import how_to_continue
from util.train.cost import count_parameters
from util.train.trainer import Trainer, TrainState, train_one_epoch
from util.weights.checkpoint import CheckpointStore, checkpoints_in, load_checkpoint

# `look(epochs, last)` after each epoch, on all ranks: the value by which the best checkpoint is chosen, or None
Look = Callable[[int, bool], float | None]


def open_store(config: Any) -> CheckpointStore:
    """The checkpoints in --output_dir; the folder is made if need be.

    Raises:
        UserError: it cannot be written, or another run writes there.
    """
    path = writable_folder(config.output_dir, "output_dir")
    if config.log_dir:
        writable_folder(config.log_dir, "log_dir")
    store = CheckpointStore(path, config.keep_last, config.keep_every, "best" in config.save_periods)
    if is_main():
        store.lock()
    return store


def writable_folder(path: str | Path, flag: str) -> Path:
    """The folder that a flag names, made if need be; UserError where it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # of a name that no process of another machine takes
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be written ({error.strerror}), choose another") from error
    return path


def restore_state(
    state: TrainState, config: Any, source: ImageSource, resumed: dict[str, Any] | None
) -> dict[str, Any]:
    """Give the state what a checkpoint holds, if there is one; the settings that it must share with the run.

    Raises:
        UserError: they differ.
    """
    binding = config.resume_settings(len(source)) | {NAMES: fingerprint(source)}
    if isinstance(source, IterableDataset):  # its parts are dealt to them
        binding["num_workers"] = config.resolved_num_workers
    if resumed is not None:
        check_same_run(binding, resumed, config.elastic)
        state.load_state_dict(resumed)
    return binding


def checkpoint_to_resume(config: Any, store: CheckpointStore) -> dict[str, Any] | None:
    """The checkpoint that --resume or --auto_resume asks for; a folder with checkpoints is never begun anew.

    Raises:
        UserError: there is none that is intact, none was asked for, --resume goes back behind those in the folder, or
            the processes do not find the same one.
    """
    state = find_checkpoint(config, store)
    updates = dict.fromkeys(from_all_ranks(None if state is None else state.get("updates", 0)))
    if len(updates) > 1:
        found = " and ".join("nothing" if each is None else f"a checkpoint after update {each}" for each in updates)
        where = f"--resume {config.resume}" if config.resume else f"--output_dir {config.output_dir}"
        raise UserError(f"{where}: the processes find {found}; it must be one and the same for all nodes")
    return state


def find_checkpoint(config: Any, store: CheckpointStore) -> dict[str, Any] | None:
    """See `checkpoint_to_resume`; of this process alone."""
    if config.resume:
        state = load_checkpoint(Path(config.resume), flag="--resume")
        # they would count as the newest of this run
        later = [path.name for path, about in store.list(with_best=True) if about.step > state.get("updates", 0)]
        if later:
            raise UserError(
                f"--resume {config.resume}: --output_dir {config.output_dir} holds what was trained after it"
                f" ({', '.join(later)}); delete these, or choose another folder"
            )
        return state
    found = store.load_latest()
    if found is None:
        return None
    if not config.auto_resume:
        raise UserError(
            f"--output_dir {config.output_dir}: holds {found[1].name} of an earlier run;"
            " add --auto_resume to go on with it, or choose another folder"
        )
    return found[0]


def resumes(config: Any) -> bool:
    """Whether a checkpoint will take the place of the weights that a run starts from; they may be gone by then."""
    return bool(config.resume) or (config.auto_resume and bool(checkpoints_in(Path(config.output_dir))))


def fit_to_processes(config: Any) -> Any:
    """With --elastic: the settings with as many passes of as many images as keep the images of the saved run's update.

    Raises:
        UserError: they cannot be shared out among these processes.
    """
    if not config.elastic:
        return config
    store = CheckpointStore(Path(config.output_dir), config.keep_last, config.keep_every, keep_best=False)
    saved = load_checkpoint(Path(config.resume)) if config.resume else (store.load_latest() or ({},))[0]
    total = saved.get("binding_settings", {}).get("effective batch")
    if total is None or total == config.effective_batch:
        return config
    batch_size, accum_iter = share_batch(total, world_size(), config.batch_size, "--elastic")
    return dataclasses.replace(config, batch_size=batch_size, accum_iter=accum_iter)


def share_batch(images: int, processes: int, most: int, flag: str) -> tuple[int, int]:
    """batch_size (at most `most`) and accum_iter, so that all processes together see so many images per update.

    Raises:
        UserError: naming `flag`, they cannot be shared out.
    """
    if images % processes:
        raise UserError(f"{flag}: the {images} images of an update cannot be shared by {processes} processes")
    share = images // processes
    batch_size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return batch_size, share // batch_size


def check_batch(config: Any, order: BatchOrder) -> None:
    """UserError where an epoch would not hold a single update."""
    if order.updates_per_epoch == 0:
        raise UserError(
            f"--batch_size {config.batch_size}: x --accum_iter {config.accum_iter} x {order.world_size} processes ="
            f" {config.effective_batch} images per update, but the data set has {order.num_samples}; make it smaller"
        )


def transform_blocks(model: nn.Module, config: Any) -> None:
    """In place, what --checkpoint_activations and --compile ask for; names and weights stay."""
    blocks = [block for name in ("blocks", "decoder_blocks") for block in getattr(model, name, ())]
    # shapes are static: an epoch has no short last batch, evaluation and monitor run uncompiled
    if config.checkpoint_activations:
        for block in blocks:
            # compiled inside of the checkpoint: around it nothing would be
            forward = torch.compile(block.forward, dynamic=False) if config.compile == "block" else block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)
    elif config.compile == "block":
        for block in blocks:
            block.compile(dynamic=False)
    if config.compile == "whole":
        if config.checkpoint_activations:
            torch._dynamo.config.optimize_ddp = False  # older versions of torch cannot cut it at DDP's buckets
        model.compile(dynamic=False)


def parallel(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """The model as the engine calls it: gradients averaged over the processes."""
    if not torch.distributed.is_initialized() or is_sharded(model):
        return model
    # running statistics are the same on every rank already: BatchNorm is synchronised
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.14
    devices = [device] if device.type == "cuda" else None
    static = config.accum_iter == 1  # the same parameters take part each time; no_sync() does not go with it
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, static_graph=static, **{flag: False})


def open_log(config: Any, trainer: Trainer, processes: Processes, images: int) -> RunLog:
    """The log of this run, its settings written and said."""
    state = trainer.state
    log = RunLog(config.output_dir, config.log_dir or config.output_dir, is_main(), resume_step=state.updates)
    if is_main():
        write_run_info(config.output_dir, as_dict(config))
    log.text(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    log.text(
        f"{images} images, {trainer.updates_per_epoch} updates of {config.effective_batch} per epoch;"
        f" {count_parameters(state.model) / 1e6:.1f} M parameters on {processes.world_size} x"
        f" {processes.device.type}, {name_of(trainer.dtype)}; peak lr {config.peak_lr:.3g}"
    )
    if state.updates:
        log.text(f"resumed after update {state.updates}")
    return log


def train(
    trainer: Trainer,
    loader: DataLoader,
    order: BatchOrder,
    source: ImageSource,
    store: CheckpointStore,
    log: RunLog,
    look: Look,
    binding: dict[str, Any],
) -> None:
    """All epochs from where the state stands, with a look and a checkpoint between them.

    `binding`: what a run that resumes from these checkpoints must share with this one.

    Raises:
        Requeue: on all ranks together, after a checkpoint: a signal or --max_minutes asked for an early stop.
    """
    config, state = trainer.config, trainer.state
    if config.compile != "none":
        use_compile_cache(config.output_dir, rank())
    trainer.stop.listen()
    trainer.before_update = store.raise_failure

    def settle() -> None:
        """Nobody ends before the last checkpoint is there: the next command may read it, and a launcher kills what is
        left of a group half a minute after its first process has ended."""
        store.wait()
        barrier()

    trainer.before_end = settle
    state.record_metric(store.best_metric)
    first_epoch, order.start_update = divmod(state.updates, order.updates_per_epoch)
    stream = loader.dataset if isinstance(loader.dataset, IterableDataset) else None
    over = trainer.finished  # killed between its last checkpoint and its result, or called again
    try:
        for epoch in range(first_epoch, first_epoch if over else trainer.epochs):
            order.epoch = epoch
            if stream is not None:
                stream.epoch = epoch
                stream.start_batch = order.start_update * config.accum_iter
            updates = order.updates_per_epoch - order.start_update
            train_one_epoch(trainer, loader, None if stream else source, updates, epoch, log)
            if state.updates < order.updates_per_epoch * (epoch + 1) and not trainer.finished:
                store.wait()
                if state.updates and main_says(not store.holds(state.updates), trainer.device):
                    save(trainer, store, None, binding)
                settle()
                when = f"and saved after update {state.updates}" if state.updates else "before the first update"
                raise Requeue(f"stopped by {trainer.stop.reason} {when}; {how_to_continue()}")
            order.start_update = 0

            last = trainer.finished
            try:
                metric = look(epoch + 1, last)
            except UserError:  # an unreadable validation image is no reason to lose the epoch
                if world_size() == 1:  # others may not have met it, and would not join in a save
                    save(trainer, store, None, binding)
                    store.wait()
                raise
            state.record_metric(metric)
            if (
                last
                or (epoch + 1) % config.save_freq == 0
                or (config.keep_every and (epoch + 1) % config.keep_every == 0)
                or main_says(store.would_be_best(metric), trainer.device)
            ):
                save(trainer, store, metric, binding)
            if last:
                break
        if over:
            state.record_metric(look(-(-state.updates // order.updates_per_epoch), True))
        settle()
    finally:
        store.unlock()
    log.text(f"done: {state.updates} updates in {format_duration(log.seconds)}, see {config.output_dir}")


def save(trainer: Trainer, store: CheckpointStore, metric: float | None, binding: dict[str, Any]) -> None:
    """A checkpoint of this moment, written by one rank once all of them hold the same weights."""
    state = trainer.state
    check_in_sync(state.model, "model")
    if state.model_ema is not None:
        check_in_sync(state.model_ema, "model that follows it")
    saved = state.state_dict()  # on all ranks: what is sharded is gathered
    if is_main():
        epoch, rest = divmod(state.updates, trainer.updates_per_epoch)
        about = {"epoch": epoch - 1, "config": as_dict(trainer.config), "binding_settings": binding}
        name_after = epoch if rest else epoch - 1  # the epoch under way, or the last one finished
        write = store.save_in_background if trainer.config.save_in_background else store.save
        write(saved | about, epoch=name_after, step=state.updates, metric=metric, mid_epoch=rest > 0)
    barrier()
