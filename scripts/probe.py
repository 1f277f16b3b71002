"""What frozen features know: kNN and linear probes of a checkpoint against a random network.

    python scripts/probe.py RUN/checkpoint-59.pth
    python scripts/probe.py mae_pretrain_vit_base.pth --model mae_vit_base_patch16 --data_path IMAGENET --sweep

The data set is the one of the run, or --data_path / --dataset. Rows: a random encoder of the same shape, the
student, the momentum encoder. Columns: kNN, logistic regression on standardised features with few and with all labels,
and with --sweep linear heads of all pairs of learning rate and weight decay, trained at once; in % of the validation
images. Features are computed once for each row, without augmentation: a probe by MAE's protocol is main_linprobe.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from models_encoder import Encoder, patchify
from models_vit import Pool
from util.analysis.probe import (
    extract_features,
    few_labels,
    hold_out,
    knn_accuracy,
    linear_sweep,
    logistic_probe_accuracy,
)
from util.config.command_line import parse_config
from util.config.groups import config_from_dict
from util.config.pretrain import PretrainConfig
from util.config.probe import ProbeConfig
from util.data.datasets import find_validation, open_images
from util.data.device_views import Normalise
from util.data.labelled import drawn, labelled_loader
from util.data.sources import ImageSource, same_classes
from util.results.results import append_result, hardware_info
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, run_main
from util.runtime.progress import with_progress
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import PATCH_KERNEL, load_weights, weights_in

ROWS = {"random": "random", "student": "student", "momentum": "momentum encoder"}


def main() -> None:
    """Print the table."""
    config = parse_config(ProbeConfig, sys.argv[1:], Path(__file__).name)
    begin = time.monotonic()
    device = choose_device(config.device)
    checkpoint = load_checkpoint(Path(config.checkpoint), "checkpoint")
    run = settings_of(checkpoint, config)
    train = open_images(run.data_path, run.dataset, "train")
    val = find_validation(run.data_path, run.dataset, run.val_path)
    if not same_classes(train, val):
        where = f"--data_path {run.data_path}" if run.data_path else f"--dataset {run.dataset}"
        raise UserError(f"{where}: a probe needs train/ and val/ with the same class folders")
    check_labels(config, train)
    normalise = Normalise(run.resolved_mean, run.resolved_std, device)
    most = config.most_images
    size, workers, timeout = run.resolved_input_size, config.num_workers, config.loader_timeout
    loaders = [
        labelled_loader(source, most, size, run.in_chans, workers, timeout, exif=run.exif) for source in (train, val)
    ]

    seen = [f"{min(len(s), most)} of {len(s)}" if len(s) > most else f"{len(s)}" for s in (train, val)]
    print(f"{Path(config.checkpoint).name}: {run.model}, {seen[0]} training and {seen[1]} validation images")
    if max(len(train), len(val)) > most:
        print(f"--most_images {most}: the others are not looked at; numbers of the whole set differ")
    results: dict[str, float] = {}
    for name, encoder, said in encoders(run, checkpoint, config):
        print(f"{name}: {said}", file=sys.stderr)
        encoder = encoder.to(device).eval()

        def encode(pixels: Tensor, encoder: Encoder = encoder) -> Tensor:
            return features(encoder, normalise(pixels.to(device)), config.pool)

        splits = [extract_features(encode, with_progress(loader, f"features, {name}")) for loader in loaders]
        row = scores(config, *splits[0], *splits[1])
        if not results:
            print(f"{'encoder':<18}" + "".join(f"{title:>28}" for title in row))
        print(f"{name:<18}" + "".join(f"{said:>28}" for _, said in row.values()), flush=True)
        results |= {f"{name}, {title}": value for title, (value, _) in row.items()}
    if not results:
        raise UserError(f"--encoders {' '.join(config.encoders)}: {config.checkpoint} holds no momentum encoder")
    folder = Path(config.output_dir) if config.output_dir else Path(config.checkpoint).resolve().parent
    about = hardware_info(device, None)
    append_result(folder, "probe", asdict(config), results, time.monotonic() - begin, about)


def check_labels(config: ProbeConfig, train: ImageSource) -> None:
    """UserError where the images to learn from have too few of a class, before anything is computed."""
    labels = torch.tensor(train.labels)[drawn(train, config.most_images)]
    try:
        if config.labels_per_class:
            few_labels(labels, config.labels_per_class, seed=0)
        if config.sweep:
            hold_out(labels, seed=0)
    except UserError as error:
        more = f"; or look at more than --most_images {config.most_images}" * (len(labels) < len(train))
        raise UserError(f"{error}{more}") from error


def settings_of(checkpoint: dict[str, Any], config: ProbeConfig) -> PretrainConfig:
    """The run's settings, or those that the flags give for a file of another program; its patches tell themselves."""
    file = weights_in(checkpoint, "student", f"checkpoint {config.checkpoint}")
    saved, kernel = file.config, file.state.get(PATCH_KERNEL)
    flags = ("model", "data_path", "dataset", "val_path", "input_size", "mean", "std", "exif")
    given = {name: value for name in flags if (value := getattr(config, name))}
    if saved is not None and "mask_ratio" in saved:
        run = config_from_dict(PretrainConfig, saved | {"recipe": ""})
        if "data_path" in given or config.dataset == "digits":
            given |= {name: getattr(config, name) for name in ("data_path", "dataset", "val_path")}
        return config_from_dict(PretrainConfig, vars(run) | given)
    if saved is not None and "model" in saved:  # a classifier's
        where = () if "data_path" in given or config.dataset == "digits" else ("data_path", "dataset", "val_path")
        seen = {name: saved[name] for name in (*where, "input_size", "mean", "std", "exif") if saved.get(name)}
        given = {"model": f"lut_{saved['model'].removeprefix('lut_').removeprefix('mae_')}"} | seen | given
    if "model" not in given:
        raise UserError(f"checkpoint {config.checkpoint}: is not one of main_pretrain.py, add --model with its name")
    if kernel is not None:
        given |= {"in_chans": kernel.shape[1], "patch_size": kernel.shape[-1]}
    return config_from_dict(PretrainConfig, given)


def encoders(
    run: PretrainConfig, checkpoint: dict[str, Any], config: ProbeConfig
) -> Iterator[tuple[str, Encoder, str]]:
    """Name and encoder of each row, and where it came from; the random one is as a run with these settings begins."""
    torch.manual_seed(run.seed)
    random = run.student_type(**run.model_arguments)
    if "random" in config.encoders:
        yield ROWS["random"], random, f"weights of seed {run.seed}"
    there = ["student"] + ["momentum"] * isinstance(checkpoint.get("model_ema"), dict)  # MAE has none
    for weights in there:
        if weights in config.encoders:
            encoder, path = Encoder(**random.shape), Path(config.checkpoint)
            file = weights_in(checkpoint, weights, f"checkpoint {path}")
            report = load_weights(encoder, path, flag="checkpoint", file=file)
            yield ROWS[weights], encoder, f"{config.checkpoint}: {report}"


def features(encoder: Encoder, images: Tensor, pool: Pool) -> Tensor:
    """[B, C, H, W] to [B, D]."""
    return encoder.features(images) if pool == "avg" else encoder.encode(patchify(images, encoder.patch_size))[:, 0]


def scores(
    config: ProbeConfig, train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor
) -> dict[str, tuple[float, str]]:
    """Title of each column -> accuracy in %, and what to show of it."""
    splits = (train_x, train_y, val_x, val_y)
    knn = knn_accuracy(*splits, k=config.knn_k, temperature=config.knn_temperature)
    row = {f"kNN, k {config.knn_k}": (knn, f"{knn:.1f}")}
    if config.labels_per_class:
        subsets = [few_labels(train_y, config.labels_per_class, seed) for seed in range(config.repeats)]
        few = torch.tensor([logistic_probe_accuracy(train_x[i], train_y[i], val_x, val_y, seed=0) for i in subsets])
        title = f"logistic, {config.labels_per_class} labels/class"
        row[title] = (few.mean().item(), f"{few.mean():.1f} ± {few.std(correction=min(1, len(few) - 1)):.1f}")
    if config.logistic:
        full = logistic_probe_accuracy(*splits, seed=0)
        row["logistic, all labels"] = (full, f"{full:.1f}")
    if config.sweep:
        grid = (config.sweep_lr, config.sweep_weight_decay, config.sweep_epochs)
        found = linear_sweep(*splits, *grid, batch_size=256, seed=0)
        row["linear, sweep"] = (found.accuracy, f"{found.accuracy:.1f} (lr {found.lr:g}, wd {found.weight_decay:g})")
    return row


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
