"""What pre-training is made of: images, views, student and momentum encoder, and what a run costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from models_lut import MomentumEncoder
from util.config.pretrain import PretrainConfig
from util.data.cache import CachedImages, cache_images, readable
from util.data.datasets import find_validation, hold_out_labelled, open_images
from util.data.loader import training_loader
from util.data.samples import BatchOrder, DrawnDataset, PretrainDataset, PretrainStream
from util.data.sources import ImageSource
from util.data.views import TwoViews
from util.runtime.distributed import Processes, broadcast_module, synchronise_batch_norm
from util.runtime.errors import UserError
from util.train.cost import pretrain_cost
from util.train.resume import resumes
from util.train.state import initial_state
from util.train.trainer import TrainState
from util.weights.interop import load_weights, resampling_note


@dataclass(frozen=True)
class TrainingImages:
    """The images of a pre-training, labelled or not, or a stream of them."""

    train: ImageSource | IterableDataset
    held_out: ImageSource | None = None  # with --holdout: labelled images for the monitor


def open_training_images(config: PretrainConfig, processes: Processes) -> TrainingImages:
    """Open the images that the settings name.

    Raises:
        UserError: there are none, or --holdout asks for labels that they do not have.
    """
    source = open_images(config.data_path, config.dataset, "train")
    if not config.holdout:
        return TrainingImages(source)
    where = f"--dataset {config.dataset}" if config.dataset else f"--data_path {config.data_path}"
    return TrainingImages(*hold_out_labelled(source, config.holdout, where))


def two_views(config: PretrainConfig) -> TwoViews:
    """Return what makes the views of an image."""
    return TwoViews(
        config.resolved_input_size,
        config.num_views,
        config.resolved_crop,
        config.shared_crop,
        config.hflip,
        config.photometric,
    )


def cached(config: PretrainConfig, source: ImageSource) -> ImageSource | CachedImages:
    """Return the images, decoded once and kept where --cache asks for it."""
    if config.cache == "none":
        return source
    if isinstance(source, IterableDataset):
        raise UserError(f"--cache {config.cache}: a stream has no images by number, leave it out")
    workers, timeout = config.resolved_num_workers, config.loader_timeout
    skip_bad = config.on_bad_image == "skip"
    return cache_images(source, config.in_chans, workers, timeout, skip_bad, two_views(config).shrink, config.exif)


def pretrain_dataset(config: PretrainConfig, source: ImageSource, rank: int) -> Dataset:
    """Return the samples, from (epoch, index) to views and masking noise; of a stream in its own order."""
    views, on_device = two_views(config), config.augment_on == "device"
    if config.cache == "device":
        return DrawnDataset(source.sizes.numpy(), readable(source), views, config.num_patches, config.seed)
    arguments: dict[str, Any] = dict(
        views=views,
        num_patches=config.num_patches,
        in_chans=config.in_chans,
        seed=config.seed,
        skip_bad=config.on_bad_image == "skip",
        photometry_later=on_device,
        exif=config.exif,
    )
    if isinstance(source, IterableDataset):
        return PretrainStream(source, rank=rank, batch_size=config.batch_size, **arguments)
    return PretrainDataset(source, **arguments)


def build_loader(config: PretrainConfig, source: ImageSource, order: BatchOrder, device: torch.device) -> DataLoader:
    """Return the loader of a run: disk to views, in the order of `order`."""
    dataset = pretrain_dataset(config, source, order.rank)
    pins = config.pins(device)
    return training_loader(dataset, order, config.resolved_num_workers, pins, config.loader_timeout)


def build_state(config: PretrainConfig, dtype: torch.dtype | None, device: torch.device) -> tuple[TrainState, str]:
    """Return student, momentum encoder and optimiser of a fresh run, and a line that says what --init_from gave.

    The line is empty without --init_from, or where a checkpoint takes its place.
    """
    torch.manual_seed(config.seed)  # the same weights on every rank
    student = config.student_type(**config.model_arguments).to(device)
    origin = ""
    if config.init_from and not resumes(config):
        report = load_weights(student, Path(config.init_from), config.init_weights, num_heads=config.num_heads)
        origin = f"--init_from {config.init_from}: {report}{resampling_note(report)}"
    momentum_encoder = MomentumEncoder(student) if config.has_momentum_encoder else None
    student = synchronise_batch_norm(student, device).to(device)
    if momentum_encoder is not None:
        broadcast_module(momentum_encoder)
    return initial_state(student, momentum_encoder, config, dtype, device), origin


def check_inputs(config: PretrainConfig, data: TrainingImages) -> dict[str, str]:
    """Read what a run would read beside its training images, for --dry_run; return facts for `show_plan`.

    Raises:
        UserError: the weights do not fit the model, or the validation images cannot be read.
    """
    facts = {}
    if config.init_from and not resumes(config):
        with torch.device("meta"):
            student = config.student_type(**config.model_arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copies into tensors without memory do nothing, as is meant here
            report = load_weights(student, Path(config.init_from), config.init_weights, num_heads=config.num_heads)
        facts["weights"] = f"{report}{resampling_note(report)}"
    if config.monitor_freq and data.held_out is None:
        val = find_validation(config.data_path, config.dataset, config.val_path)
        facts["validation"] = "none with labels: no kNN accuracy" if val is None else f"{len(val)} images"
    elif data.held_out is not None:
        facts["validation"] = f"{len(data.held_out)} training images that are held out"
    return facts


def planned_cost(config: PretrainConfig, updates: int, dtype: torch.dtype | None) -> dict[str, str]:
    """Return what --dry_run says of the cost of so many updates, counted on the meta device."""
    symmetric, checkpointed = config.views == "symmetric", config.checkpoint_activations
    cost = pretrain_cost(config.model_arguments, symmetric, config.student_type, checkpointed)
    flops = cost.flops_per_image * config.effective_batch * updates
    memory = cost.memory_bytes(config.batch_size, bytes_per_number=4 if dtype is None else 2)
    counts = (cost.encoder_parameters, cost.student_parameters, cost.momentum_parameters)
    encoder, student, momentum = (f"{number / 1e6:.1f} M" for number in counts)
    patch_size, image_size = config.resolved_patch_size, config.resolved_input_size
    return {
        "patches": f"{config.num_patches} of {patch_size} pixels, image {image_size}",
        "parameters": f"{encoder} encoder, {student} student, {momentum} momentum encoder",
        "GFLOP": f"{cost.flops_per_image / 1e9:.1f} per image, forward and backward; {flops:.2e} FLOP in all",
        "memory": f"about {memory / 2**30:.1f} GiB per process, before workspace",
    }
