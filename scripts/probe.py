"""Probe frozen features: kNN, linear and attentive probes of a checkpoint beside a random network.

    python scripts/probe.py RUN/checkpoint-59.pth
    python scripts/probe.py RUN/checkpoint-59.pth --attentive
    python scripts/probe.py mae_pretrain_vit_base.pth --model mae_vit_base_patch16 --data_path IMAGENET --sweep
    python scripts/probe.py RUN/checkpoint-59.pth --dense --data_path CAMVID

The data set is the run's, or that of --data_path / --dataset. Rows: a random encoder of the same shape, the student,
the momentum encoder. Columns: kNN; logistic regression on standardised features with few and with all labels; with
--sweep linear heads of all pairs of learning rate and weight decay; with --attentive linear heads on the cls token and
on the mean of the patch tokens, and attentive heads, all trained at once. Numbers are in % of the validation images.
--dense probes patch tokens on masks instead, in % mIoU. A linear probe by MAE's protocol is main_linprobe.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from models_encoder import Encoder, patchify
from models_vit import Pool
from util.analysis.dense import CentreMasks, dense_probe, extract_patches
from util.analysis.head_sweep import FrozenTokens, Grid, ViewDataset, sweep_heads
from util.analysis.probe import (
    check_hold_out,
    extract_features,
    few_labels,
    knn_accuracy,
    linear_sweep,
    logistic_probe_accuracy,
)
from util.config.command_line import parse_config
from util.config.groups import config_from_dict
from util.config.pretrain import PretrainConfig
from util.config.probe import ProbeConfig
from util.data.datasets import find_validation, hold_out_labelled, open_images
from util.data.labelled import drawn, labelled_loader
from util.data.loader import Loader
from util.data.masks import MaskedSource, find_classes, find_layout, pair_up
from util.data.sources import ImageSource, same_classes
from util.data.views import Normalise, TwoViews
from util.results.results import append_result, hardware_info
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, run_main
from util.runtime.progress import with_progress
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import load_weights, weights_in
from util.weights.layouts import PATCH_KERNEL, check_shapes
from util.weights.run_state import check_sizes

DENSE_BATCH = 32  # images
NAMES = {"random": "random", "student": "student", "momentum": "momentum encoder"}
TITLES = {  # of the columns; logistic_few: logistic_10_per_class and the like
    "knn": "kNN, k {knn_k}",
    "logistic_few": "logistic, {per_class} labels/class",
    "logistic": "logistic, all labels",
    "linear_sweep": "linear, sweep",
    "linear_cls": "linear on cls",
    "linear_mean": "linear on mean patch",
    "attentive": "attentive",
    "dense_knn": "dense kNN, k {knn_k}",
    "dense_logistic": "dense logistic",
}
Scores = dict[str, tuple[float, str]]  # accuracy in % of each metric, and how it is shown


@dataclass(frozen=True)
class ProbeData:
    """The labelled images of a probe, and the views that an encoder gets of them."""

    train: ImageSource
    val: ImageSource
    run: PretrainConfig
    normalise: Normalise
    device: torch.device


def main() -> None:
    """Print the table."""
    config = parse_config(ProbeConfig, sys.argv[1:], Path(__file__).name)
    begin = time.monotonic()
    device = choose_device(config.device)
    checkpoint = load_checkpoint(Path(config.checkpoint), "checkpoint")
    run = settings_of(checkpoint, config)
    train, val = open_masks(config) if config.dense else open_splits(run)
    per_class = 0 if config.dense else check_labels(config, train)
    data = ProbeData(train, val, run, Normalise(run.resolved_mean, run.resolved_std, device), device)
    print_images(config, data)
    results: dict[str, float] = {}
    for weights, encoder, report in encoders(run, checkpoint, config):
        print(f"{NAMES[weights]}: {report}", file=sys.stderr)
        encoder = encoder.to(device).eval().requires_grad_(False)
        if config.dense:
            row = dense_scores(config, data, encoder, NAMES[weights])
        else:
            row = scores(config, per_class, data, encoder, NAMES[weights])
        if not results:
            titles = [TITLES["logistic_few" if name.endswith("_per_class") else name] for name in row]
            titles = [title.format(knn_k=config.knn_k, per_class=per_class) for title in titles]
            print(f"{'encoder':<18}" + "".join(f"{title:>28}" for title in titles))
        print(f"{NAMES[weights]:<18}" + "".join(f"{text:>28}" for _, text in row.values()), flush=True)
        results |= {f"{weights}/{name}": value for name, (value, _) in row.items()}
    if not results:
        raise UserError(f"--encoders {' '.join(config.encoders)}: {config.checkpoint} holds no momentum encoder")
    if "random" not in config.encoders:
        print("no row of a random encoder; add random to --encoders to see what the architecture alone gives")
    folder = Path(config.output_dir) if config.output_dir else Path(config.checkpoint).resolve().parent
    append_result(folder, "probe", asdict(config), results, time.monotonic() - begin, hardware_info(device, None))


# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


def open_splits(run: PretrainConfig) -> tuple[ImageSource, ImageSource]:
    """Open training and validation images; raise UserError unless both are labelled with the same classes."""
    train = open_images(run.data_path, run.dataset, "train")
    if run.holdout:
        return hold_out_labelled(train, run.holdout, f"--data_path {run.data_path or run.dataset}")
    val = find_validation(run.data_path, run.dataset, run.val_path)
    if not same_classes(train, val):
        data = f"--data_path {run.data_path}" if run.data_path else f"--dataset {run.dataset}"
        raise UserError(f"{data}: a probe needs train/ and val/ with the same class folders")
    return train, val


def open_masks(config: ProbeConfig) -> tuple[MaskedSource, MaskedSource]:
    """Open training and validation images with masks, as main_segment.py does."""
    layout = find_layout(config.data_path)
    classes = find_classes(layout, config.classes, config.first_label, config.ignore_index)
    train, val = (
        pair_up(*layout.folders(split), classes, config.image_suffix, config.mask_suffix, ("--data_path",) * 2)
        for split in ("train", "val")
    )
    return train, val


def check_labels(config: ProbeConfig, train: ImageSource) -> int:
    """Return how many labels of each class the probe with few labels takes: --labels_per_class, or fewer and a message.

    Raises:
        UserError: a class has too few images to hold any out.
    """
    labels = torch.tensor(train.labels)[drawn(train, config.most_images)]
    try:
        for flag in ("sweep", "attentive"):
            if getattr(config, flag):
                check_hold_out(labels, f"--{flag}")
    except UserError as error:
        fix = f"; or raise --most_images {config.most_images}" * (len(labels) < len(train))
        raise UserError(f"{error}{fix}") from error
    smallest = int(labels.unique(return_counts=True)[1].min())
    if config.labels_per_class > smallest:
        flag = f"--labels_per_class {config.labels_per_class}"
        print(f"{flag}: the smallest class has {smallest} training images, so {smallest} of each class are used")
    return min(config.labels_per_class, smallest)


def print_images(config: ProbeConfig, data: ProbeData) -> None:
    """Print how many images of each split are used."""
    most, sizes = config.most_images, (len(data.train), len(data.val))
    used = [f"{min(size, most)} of {size}" if size > most else f"{size}" for size in sizes]
    print(f"{Path(config.checkpoint).name}: {data.run.model}, {used[0]} training and {used[1]} validation images")
    if max(sizes) > most:
        print(f"--most_images {most}: the other images are not used; numbers of all images differ")


# --------------------------------------------------------------------------------------------------------
# Encoders
# --------------------------------------------------------------------------------------------------------


def settings_of(checkpoint: dict[str, Any], config: ProbeConfig) -> PretrainConfig:
    """Return the run's settings, or for a file of another program those of the flags; it tells patches and channels."""
    file = weights_in(checkpoint, "student", f"checkpoint {config.checkpoint}")
    saved, kernel = file.config, file.state.get(PATCH_KERNEL)
    flags = ("model", "num_heads", "data_path", "dataset", "val_path", "holdout", "input_size", "mean", "std", "exif")
    given = {name: value for name in flags if (value := getattr(config, name))}
    other_data = "data_path" in given or config.dataset == "digits"
    if saved is not None and "mask_ratio" in saved:
        run = config_from_dict(PretrainConfig, saved | {"recipe": ""})
        if other_data:
            given |= {name: getattr(config, name) for name in ("data_path", "dataset", "val_path")}
        check_sizes(run, file.state, f"checkpoint {config.checkpoint}")
        return config_from_dict(PretrainConfig, vars(run) | given)
    if saved is not None and "model" in saved:  # a classifier
        data = () if other_data else ("data_path", "dataset", "val_path")
        names = (*data, "num_heads", "input_size", "mean", "std", "exif")
        known = {name: saved[name] for name in names if saved.get(name)}
        given = {"model": f"lut_{saved['model'].removeprefix('lut_').removeprefix('mae_')}"} | known | given
    if "model" not in given:
        raise UserError(f"checkpoint {config.checkpoint}: is not one of main_pretrain.py, add --model with its name")
    if kernel is not None:
        check_shapes(file.state, f"checkpoint {config.checkpoint}")
        given |= {"in_chans": kernel.shape[1], "patch_size": kernel.shape[-1]}
    return config_from_dict(PretrainConfig, given)


def encoders(
    run: PretrainConfig, checkpoint: dict[str, Any], config: ProbeConfig
) -> Iterator[tuple[str, Encoder, str]]:
    """Yield each row's weights, encoder and origin; the random encoder is the initial one of a run."""
    torch.manual_seed(run.seed)
    random = run.student_type(**run.model_arguments)
    if "random" in config.encoders:
        yield "random", random, f"weights of seed {run.seed}"
    available = ["student"] + ["momentum"] * isinstance(checkpoint.get("model_ema"), dict)  # MAE has none
    for weights in available:
        if weights in config.encoders:
            encoder, path = Encoder(**random.shape), Path(config.checkpoint)
            file = weights_in(checkpoint, weights, f"checkpoint {path}")
            report = load_weights(encoder, path, flag="checkpoint", file=file, num_heads=config.num_heads)
            yield weights, encoder, f"{config.checkpoint}: {report}"


def tokens(encoder: Encoder, data: ProbeData, pixels: Tensor) -> Tensor:
    """Return the tokens [B, 1 + L, D] of uint8 pixels [B, C, H, W] after the encoder's last norm."""
    return encoder.encode(patchify(data.normalise(pixels.to(data.device)), encoder.patch_size))


def features(encoder: Encoder, data: ProbeData, pool: Pool, pixels: Tensor) -> Tensor:
    """Return the features [B, D] of uint8 pixels [B, C, H, W]."""
    images = data.normalise(pixels.to(data.device))
    return encoder.features(images) if pool == "avg" else encoder.encode(patchify(images, encoder.patch_size))[:, 0]


# --------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------


def scores(config: ProbeConfig, per_class: int, data: ProbeData, encoder: Encoder, name: str) -> Scores:
    """Return the accuracies of all probes of one encoder, which is called `name` in the progress."""
    encode = partial(features, encoder, data, config.pool)
    size, in_chans = data.run.resolved_input_size, data.run.in_chans
    splits: list[Tensor] = []
    for source in (data.train, data.val):
        workers, timeout, exif = config.num_workers, config.loader_timeout, data.run.exif
        loader = labelled_loader(source, config.most_images, size, in_chans, workers, timeout, exif=exif)
        splits += extract_features(encode, with_progress(loader, f"features, {name}"))
    train_x, train_y, val_x, val_y = splits
    knn = knn_accuracy(*splits, k=config.knn_k, temperature=config.knn_temperature)
    row: Scores = {"knn": (knn, f"{knn:.1f}")}
    if per_class:
        subsets = [few_labels(train_y, per_class, seed) for seed in range(config.repeats)]
        few = torch.tensor([logistic_probe_accuracy(train_x[i], train_y[i], val_x, val_y, seed=0) for i in subsets])
        spread = few.std(correction=min(1, len(few) - 1))
        row[f"logistic_{per_class}_per_class"] = (few.mean().item(), f"{few.mean():.1f} ± {spread:.1f}")
    if config.logistic:
        accuracy = logistic_probe_accuracy(*splits, seed=0)
        row["logistic"] = (accuracy, f"{accuracy:.1f}")
    if config.sweep:
        hyper = (config.sweep_lr, config.sweep_weight_decay, config.sweep_epochs)
        best = linear_sweep(*splits, *hyper, batch_size=256, seed=0)
        row["linear_sweep"] = (best.accuracy, f"{best.accuracy:.1f} (lr {best.lr:g}, wd {best.weight_decay:g})")
    return row | (attentive_scores(config, data, encoder, name) if config.attentive else {})


def attentive_scores(config: ProbeConfig, data: ProbeData, encoder: Encoder, name: str) -> Scores:
    """Return the accuracies of the best linear and attentive heads on the tokens of one encoder."""
    size, L, D = data.run.resolved_input_size, encoder.num_patches, encoder.embed_dim
    arguments = {"num_workers": config.num_workers, "loader_timeout": config.loader_timeout}
    allowed = config.token_memory * 2**30

    def frozen_tokens(source: ImageSource) -> tuple[FrozenTokens, Tensor]:
        nonlocal allowed
        indices = drawn(source, config.most_images)
        view = TwoViews(size, num_views=1, crop="rrc")
        views = partial(ViewDataset, source, indices, view, data.run.in_chans, config.attentive_seed)
        augmented = config.attentive_augment and source is data.train
        needed = 4 * len(indices) * (1 + L) * D  # bytes of float32
        keep = needed <= allowed and not augmented
        allowed -= needed * keep
        labels = torch.tensor(source.labels)[indices]
        return FrozenTokens(views, partial(tokens, encoder, data), arguments, augmented, keep), labels

    num_heads = encoder.shape["num_heads"] if config.attentive_projections else None
    grid = Grid(
        config.attentive_lr, config.attentive_weight_decay, config.attentive_epochs, config.attentive_batch_size,
        config.attentive_seed, config.attentive_queries, num_heads,
    )  # fmt: skip
    best = sweep_heads(
        *frozen_tokens(data.train), *frozen_tokens(data.val), width=D, grid=grid, device=data.device, title=name
    )
    return {
        kind: (head.accuracy, f"{head.accuracy:.1f} (lr {head.lr:g}, wd {head.weight_decay:g})")
        for kind, head in best.items()
    }


def dense_scores(config: ProbeConfig, data: ProbeData, encoder: Encoder, name: str) -> Scores:
    """Return the mIoU of the dense probes of one encoder."""
    size, in_chans, p = data.run.resolved_input_size, data.run.in_chans, encoder.patch_size
    splits = []
    for source in (data.train, data.val):
        dataset = CentreMasks(source, drawn(source, config.most_images), size, in_chans)
        loader = Loader(
            dataset, batch_size=DENSE_BATCH, num_workers=config.num_workers, loader_timeout=config.loader_timeout
        )
        batches = with_progress(loader, f"patches, {name}")
        splits.append(
            extract_patches(lambda pixels: tokens(encoder, data, pixels)[:, 1:], batches, p, len(source.classes.names))
        )
    row = dense_probe(*splits, config.dense_patches, config.knn_k, config.knn_temperature, seed=0)
    return {key: (score.miou, f"{score.miou:.1f} ({score.accuracy:.1f} of pixels)") for key, score in row.items()}


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
