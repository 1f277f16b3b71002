"""Pre-train LUT or MAE.

    python main_pretrain.py --recipe quickstart
    torchrun --nproc_per_node=8 main_pretrain.py --recipe paper_vit_base --data_path IMAGENET --output_dir RUN

`--help` lists all flags, `--dry_run` shows what a command would do. To go on after an interruption, run the same
command with --auto_resume.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import yaml
from torch.utils.data import DataLoader, IterableDataset

from engine_pretrain import PretrainTrainer
from models_lut import MomentumEncoder
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.data.cache import cache_images, readable
from util.data.datasets import find_validation, open_images
from util.data.loader import training_loader
from util.data.samples import BatchOrder, DrawnDataset, PretrainDataset, PretrainStream
from util.data.sources import ImageSource, same_classes
from util.data.views import TwoViews
from util.optim.optimizer import build_optimizer
from util.results.results import append_result, hardware_info, read_results
from util.runtime.amp import autocast_dtype, choose_attention, grad_scaler
from util.runtime.distributed import broadcast_module, is_main, start_processes, stop_processes, synchronise_batch_norm
from util.runtime.errors import UserError, run_main
from util.runtime.logs import RunLog
from util.runtime.sharding import check_sharding, shard
from util.train.cost import Cost, pretrain_cost
from util.train.monitor import Monitor
from util.train.run import (
    check_batch,
    checkpoint_to_resume,
    fit_to_processes,
    open_log,
    open_store,
    parallel,
    restore_state,
    resumes,
    train,
    transform_blocks,
)
from util.train.trainer import TrainState
from util.weights.interop import LoadReport, load_weights


def main() -> None:
    """Settings, data, models, then the epochs."""
    config = parse_config(PretrainConfig, sys.argv[1:], Path(__file__).name)

    # ---- what can be wrong with the input is found before a model is built -----------------------------
    processes = start_processes(config.device, config.dist_backend)
    device, world_size = processes.device, processes.world_size
    dtype = autocast_dtype(config.amp, device)
    check_sharding(config.parallel, dtype, device)
    source = open_images(config.data_path, config.dataset, "train")
    config = fit_to_processes(config)
    order = BatchOrder(len(source), config.batch_size, config.accum_iter, processes.rank, world_size, config.seed)
    check_batch(config, order)
    if config.dry_run:
        show_plan(config, source, order, dtype)
        stop_processes()
        return
    store = open_store(config)
    resumed = checkpoint_to_resume(config, store)

    # ---- data: disk -> views ---------------------------------------------------------------------------
    images = cached(config, source)
    loader = build_loader(config, images, order, device)

    # ---- models: views -> losses -----------------------------------------------------------------------
    state, report = build_state(config, dtype, device)
    state.updates = config.start_epoch * order.updates_per_epoch
    binding = restore_state(state, config, source, resumed)
    del resumed  # as large as the run's state, and nobody's any more
    trainer = build_trainer(config, state, dtype, device, order.updates_per_epoch)
    if config.cache == "device":
        trainer.images = images.to(device)
    del images  # with --cache device the copy of the host, which no loader needs

    # ---- the run ---------------------------------------------------------------------------------------
    log = open_log(config, trainer, processes, len(source))
    if report is not None:
        log.text(f"--init_from {config.init_from}: {report}")
    monitor = make_monitor(config, source, trainer, log)
    found: dict[str, float] = {}

    def look(epochs: int, last: bool) -> float | None:
        if not config.monitor_freq or not (last or epochs % config.monitor_freq == 0):
            return None
        whole_student = state.unsharded(state.model, device, keep=monitor is not None)
        if monitor is not None:
            found.update(monitor.look(whole_student, epochs, state.updates, log))
        return found.get("knn")

    if state.updates == 0:
        look(0, last=True)  # what a random network gives; and that it works, seen before hours have passed
    train(trainer, loader, order, source, store, log, look, binding)
    if is_main() and (trainer.means or not read_results(config.output_dir)):  # not of a finished run, called again
        about = hardware_info(device, dtype)
        append_result(config.output_dir, "pretrain", as_dict(config), trainer.means | found, log.seconds, about)
    log.close()
    stop_processes()


def two_views(config: PretrainConfig) -> TwoViews:
    """What makes the views of an image."""
    return TwoViews(
        config.resolved_input_size,
        config.num_views,
        config.resolved_crop,
        config.shared_crop,
        config.hflip,
        config.photometric,
    )


def cached(config: PretrainConfig, source: ImageSource) -> ImageSource:
    """The images, decoded where --cache asks for it."""
    if config.cache == "none":
        return source
    if isinstance(source, IterableDataset):
        raise UserError(f"--cache {config.cache}: a stream has no images by number, leave it out")
    skip_bad = config.on_bad_image == "skip"
    about = (config.in_chans, config.resolved_num_workers, config.loader_timeout)
    return cache_images(source, *about, skip_bad, two_views(config).fit, config.exif)


def build_loader(config: PretrainConfig, source: ImageSource, order: BatchOrder, device: torch.device) -> DataLoader:
    """Disk to views, in the order of `order`."""
    views, later = two_views(config), config.augment_on == "device"
    skip_bad = config.on_bad_image == "skip"
    about = (views, config.num_patches, config.in_chans, config.seed)
    if isinstance(source, IterableDataset):
        stream = dict(batch_size=config.batch_size, exif=config.exif)
        dataset = PretrainStream(source, *about, order.rank, skip_bad, later, **stream)
    elif config.cache == "device":
        dataset = DrawnDataset(source.sizes.numpy(), readable(source), views, config.num_patches, config.seed)
    else:
        dataset = PretrainDataset(source, *about, skip_bad, later, config.exif)
    return training_loader(dataset, order, config.resolved_num_workers, config.pins(device), config.loader_timeout)


def build_state(
    config: PretrainConfig, dtype: torch.dtype | None, device: torch.device
) -> tuple[TrainState, LoadReport | None]:
    """Both models and the optimiser as a fresh run begins, and what --init_from gave."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    student = config.student_type(**config.model_arguments).to(device)
    starts = config.init_from and not resumes(config)
    report = load_weights(student, Path(config.init_from), config.init_weights) if starts else None
    momentum_encoder = MomentumEncoder(student) if config.has_momentum_encoder else None
    for model in filter(None, (student, momentum_encoder)):
        choose_attention(model, dtype, device)
    student = synchronise_batch_norm(student, device).to(device)
    skeleton = shard(student, momentum_encoder, device) if config.parallel == "fsdp" else None
    optimizer = build_optimizer(student, config.peak_lr, config.betas, config.weight_decay, config.layer_decay)
    return TrainState(student, momentum_encoder, optimizer, grad_scaler(dtype, device), skeleton=skeleton), report


def build_trainer(
    config: PretrainConfig, state: TrainState, dtype: torch.dtype | None, device: torch.device, updates_per_epoch: int
) -> PretrainTrainer:
    """What updates the state: compiled where asked, gradients averaged over the processes."""
    if state.model_ema is not None:
        broadcast_module(state.model_ema)
        transform_blocks(state.model_ema, config)
    transform_blocks(state.model, config)
    return PretrainTrainer(config, state, parallel(state.model, config, device), device, dtype, updates_per_epoch)


def make_monitor(config: PretrainConfig, source: ImageSource, trainer: PretrainTrainer, log: RunLog) -> Monitor | None:
    """The monitor on rank 0; none for a stream, which cannot be read twice the same."""
    if not config.monitor_freq or not is_main() or isinstance(source, IterableDataset):
        return None
    val = find_validation(config.data_path, config.dataset, config.val_path)
    if val is None and config.val_path:
        log.text(f"no kNN accuracy: --val_path {config.val_path} has no labels of two classes")
    if val is not None and not same_classes(source, val):
        log.text("no kNN accuracy: the classes of the training and the validation images differ")
        val = None
    return Monitor(
        source,
        val,
        config.resolved_input_size,
        config.in_chans,
        config.monitor_images,
        trainer.normalise,
        Path(config.output_dir),
        trainer.device,
        config.resolved_num_workers,
        config.loader_timeout,
        config.on_bad_image == "skip",
        config.exif,
    )


# --------------------------------------------------------------------------------------------------------
# --dry_run
# --------------------------------------------------------------------------------------------------------


def show_plan(config: PretrainConfig, source: ImageSource, order: BatchOrder, dtype: torch.dtype | None) -> None:
    """Print once the settings, what the run costs, and one real batch."""
    if not is_main():
        return
    cost: Cost = pretrain_cost(config.model_arguments, config.views == "symmetric", config.student_type)
    print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    total = order.updates_per_epoch * config.epochs
    flops = cost.flops_per_image * config.effective_batch * total
    memory = cost.memory_bytes(config.batch_size, bytes_per_number=4 if dtype is None else 2)
    print(f"images           {len(source)}")
    print(f"updates          {order.updates_per_epoch} per epoch x {config.epochs} epochs = {total}")
    print(f"effective batch  {config.effective_batch}, peak lr {config.peak_lr:.3g}")
    patch_size, image_size = config.resolved_patch_size, config.resolved_input_size
    print(f"patches          {config.num_patches} of {patch_size} pixels, image {image_size}")
    numbers = (cost.encoder_parameters, cost.student_parameters, cost.momentum_parameters)
    encoder, student, followed = (f"{number / 1e6:.1f} M" for number in numbers)
    print(f"parameters       {encoder} encoder, {student} student, {followed} momentum encoder")
    print(f"GFLOP            {cost.flops_per_image / 1e9:.1f} per image, forward and backward; {flops:.2e} FLOP in all")
    print(f"memory           about {memory / 2**30:.1f} GiB per process, before workspace")
    if isinstance(source, IterableDataset):
        return
    views, skip_bad = two_views(config), config.on_bad_image == "skip"
    dataset = PretrainDataset(
        source, views, config.num_patches, config.in_chans, config.seed, skip_bad, exif=config.exif
    )
    begin = time.perf_counter()
    batch = next(iter(training_loader(dataset, order, 0, False, 0)))
    seconds = time.perf_counter() - begin
    print(f"one batch        {tuple(batch.views.shape)} uint8, made in {seconds:.2f} s by one process")


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
