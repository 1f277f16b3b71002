"""Settings that several mains share: typed frozen dataclasses with MAE's flag names.

Whatever can be judged without touching a disk or a device is checked in `__post_init__`; a wrong value is a
UserError that names the flag, the value and the fix. Derived values are properties and never written back.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from models_architectures import ARCHITECTURES
from util.config.checks import check, check_image_size, check_limits, check_loader_timeout
from util.runtime.distributed import world_size
from util.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config")


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. PixelConfig, which is always beside it, has the size of the images."""

    model: str = "vit_base_patch16"
    patch_size: int | None = None
    """pixels; default: as the model's name says"""
    num_heads: int | None = None
    """attention heads of the encoder; default: as the model's name says (ViT-S: 6; MoCo v3's weights need 12)"""

    def __post_init__(self) -> None:
        check(self.patch_size is None or self.patch_size >= 1, "patch_size", self.patch_size, "must be 1 or more")
        heads, width = self.architecture["num_heads"], self.architecture["embed_dim"]
        check(heads >= 1 and width % heads == 0, "num_heads", heads, f"must divide the model's width, {width}")
        for side in self.resolved_input_size:
            fix = f"must be a multiple of the patch, {self.resolved_patch_size} pixels"
            check(side % self.resolved_patch_size == 0, "input_size", self.resolved_input_size, fix)

    @property
    def architecture_name(self) -> str:
        """The model's name without the prefix of its pre-training (lut_, mae_)."""
        return self.model.removeprefix("lut_").removeprefix("mae_")

    @property
    def architecture(self) -> dict[str, Any]:
        """The model's entry in models_architectures.ARCHITECTURES, with the heads of --num_heads."""
        architecture = ARCHITECTURES[self.architecture_name]
        return architecture if self.num_heads is None else architecture | {"num_heads": self.num_heads}

    @property
    def resolved_patch_size(self) -> int:
        """The side of a patch in pixels."""
        return self.patch_size or self.architecture["patch_size"]

    @property
    def resolved_input_size(self) -> tuple[int, int]:
        """The height and width in pixels."""
        size = self.input_size or (self.architecture["img_size"],)
        return (size[0], size[-1])


@dataclass(frozen=True)
class PixelConfig:
    """How images are read, wherever they come from."""

    input_size: tuple[int, ...] = ()
    """pixels, one number or height and width; default: the model's own (224 at patch 16)"""
    in_chans: int = 3
    """channels: 1 (grey), 3 (RGB) or 4 (RGBA); images are converted to it"""
    mean: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: ImageNet's (in_chans 3), else 0.5"""
    std: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: ImageNet's (in_chans 3), else 0.25"""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it, as MAE, or turn the pixels as it says"""
    on_bad_image: Literal["error", "skip"] = "error"
    """an unreadable image stops the run, or the next readable one takes its place and it is counted"""
    num_workers: int | None = None
    """data loader workers per rank, 0: none; default: 10, or the processors there are"""
    pin_mem: bool = True
    """page-locked memory for copies to a GPU; no effect on CPU"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before a hung or dead data loader worker ends the run"""

    def __post_init__(self) -> None:
        check(self.in_chans in (1, 3, 4), "in_chans", self.in_chans, "images have 1, 3 or 4 channels")
        check_image_size(self.input_size, least=8)
        for flag, values in (("mean", self.mean), ("std", self.std)):
            fits = not values or len(values) == self.in_chans
            check(fits, flag, values, f"give one number per channel (--in_chans {self.in_chans})")
            check(all(map(math.isfinite, values)), flag, values, "must be finite")
        check(all(s > 0 for s in self.std), "std", self.std, "must be above 0")
        workers = self.num_workers
        check(workers is None or workers >= 0, "num_workers", workers, "must be 0 or more")
        check_loader_timeout(self.loader_timeout)

    @property
    def resolved_mean(self) -> tuple[float, ...]:
        """The mean per channel, with the default filled in."""
        return self.mean or ((0.485, 0.456, 0.406) if self.in_chans == 3 else (0.5,) * self.in_chans)

    @property
    def resolved_std(self) -> tuple[float, ...]:
        """The standard deviation per channel, with the default filled in."""
        return self.std or ((0.229, 0.224, 0.225) if self.in_chans == 3 else (0.25,) * self.in_chans)

    @property
    def resolved_num_workers(self) -> int:
        """The number of this rank's data loader workers, with the default filled in."""
        return min(10, processors()) if self.num_workers is None else self.num_workers

    def pins(self, device: torch.device) -> bool:
        """Return whether batches for this device are in page-locked memory."""
        return self.pin_mem and device.type == "cuda"


@dataclass(frozen=True)
class DataConfig(PixelConfig):
    """The images, with or without labels."""

    data_path: str = ""
    """folder with train/ (and val/) of class folders, flat folder of images at any depth, or .tar of either"""
    dataset: str = ""
    """cub200, flowers102, inat2018, ... as published, under --data_path (util/data/published.py); any name of timm's
    create_dataset (hfds/.., hfids/.., tfds/.., wds/.., torch/..); or `digits`: 1,797 handwritten digits that come
    with scikit-learn"""
    val_path: str = ""
    """labelled images for the evaluation (pre-training: by kNN); default: val/ or val.tar beside the training images,
    if it exists"""
    holdout: float = 0.0
    """share of the training images, of each class alike, that is not trained on but evaluated instead of the validation
    images: to choose settings by"""
    cache: Literal["none", "ram", "device"] = "none"
    """decode the training images once and keep them as uint8, in memory shared by a machine's processes or (for
    pre-training) on the device"""

    def __post_init__(self) -> None:
        PixelConfig.__post_init__(self)
        check(0 <= self.holdout < 1, "holdout", self.holdout, "must lie in [0, 1)")
        fix = "evaluates training images, leave out --val_path"
        check(not (self.holdout and self.val_path), "holdout", self.holdout, fix)


@dataclass(frozen=True)
class UpdateConfig:
    """One update: batch and AdamW."""

    warmup_note: ClassVar[str] = ""  # a line for the log on a warm-up in epochs, see OptimConfig

    batch_size: int = 64
    """images per process and forward pass"""
    accum_iter: int = 1
    """forward passes per update: the effective batch is batch_size x accum_iter x processes"""
    min_lr: float = 0.0
    """learning rate at the end of the schedule"""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momenta"""
    layer_decay: float = 1.0
    """factor on the learning rate per block from the last to the first; 1: none"""
    clip_grad: float | None = None
    """largest norm of the gradient; default: no clipping"""

    def __post_init__(self) -> None:
        for flag in ("batch_size", "accum_iter"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        for flag in ("min_lr", "weight_decay"):
            value = getattr(self, flag)
            check(0 <= value < math.inf, flag, value, "must be 0 or more, and finite")
        check(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "both must lie in [0, 1)")
        check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "must lie in (0, 1]")
        check(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "must be above 0")

    @property
    def effective_batch(self) -> int:
        """The number of images per update, over all processes."""
        return self.batch_size * self.accum_iter * world_size()


@dataclass(frozen=True)
class OptimConfig(UpdateConfig):
    """Batch, schedule in epochs, and AdamW."""

    default_warmup: ClassVar[float] = 40.0  # epochs
    warmup_share: ClassVar[float] = 0.1  # of the epochs, where the default does not fit

    epochs: int = 400
    warmup_epochs: float | None = None
    """epochs of linear warm-up from 0; default: 40, or a tenth of --epochs where 40 do not fit"""
    lr: float | None = None
    """peak learning rate; default: blr x effective batch / 256"""
    blr: float = 1.5e-4
    """base learning rate, per 256 images"""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)
        check(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        warmup = self.warmup_epochs
        fits = warmup is None or 0 <= warmup <= self.epochs
        check(fits, "warmup_epochs", warmup, f"must lie in 0..--epochs {self.epochs}")
        for flag in ("blr", "lr"):
            value = getattr(self, flag)
            check(value is None or 0 <= value < math.inf, flag, value, "must be 0 or more, and finite")

    @property
    def resolved_warmup_epochs(self) -> float:
        """The value of --warmup_epochs, or its default, which shrinks with the epochs if it does not fit."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return self.default_warmup if self.default_warmup <= self.epochs else self.warmup_share * self.epochs

    @property
    def warmup_note(self) -> str:
        """A line for the log where the default warm-up did not fit; else empty."""
        warmup, default = self.resolved_warmup_epochs, self.default_warmup
        if self.warmup_epochs is not None or warmup == default:
            return ""
        return f"--warmup_epochs: {warmup:g}, since the default of {default:g} does not fit --epochs {self.epochs}"

    @property
    def resolved_blr(self) -> float:
        """The value of --blr, or its default."""
        return self.blr

    @property
    def peak_lr(self) -> float:
        """The value of --lr, or the linear rule lr = blr x batch / 256."""
        return self.resolved_blr * self.effective_batch / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class DownstreamConfig:
    """Training on labels: the encoder to start from, and the evaluation."""

    finetune: str = ""
    """pre-trained weights (MAE's, the release's, timm's or ours); default: none, from scratch"""
    weights: Literal["student", "momentum"] = "student"
    """which of the two encoders of --finetune"""
    eval: bool = False
    """evaluate --finetune or --resume and stop; model, size and normalisation are those of its run, if it is ours"""
    eval_freq: int = 1
    """epochs between two evaluations; the end always has one"""
    dist_eval: bool = True
    """each process evaluates its share of the images, each image once; else rank 0 all of them"""

    def __post_init__(self) -> None:
        check(self.eval_freq >= 1, "eval_freq", self.eval_freq, "must be 1 or more")
        check(not (self.eval and self.resume and self.finetune), "eval", "", "give one of --resume and --finetune")
        check(not self.eval or bool(self.resume or self.finetune), "eval", "", "add --finetune or --resume with a file")


@dataclass(frozen=True)
class RunConfig:
    """Device, output, checkpoints, and when to stop."""

    recipe: str = ""
    """settings to start from: a name in recipes/ or a YAML file; flags override it"""
    output_dir: str = "./output_dir"
    """checkpoints, log.jsonl, config.yaml and pictures"""
    log_dir: str | None = None
    """TensorBoard; default: output_dir"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 with loss scaling on a GPU, else fp32"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """what each of several processes holds: all weights, or a part of every weight, gradient and moment (fsdp, for
    ViT-H and larger)"""
    compile: Literal["none", "block", "whole"] = "none"
    """torch.compile of each transformer block (starts in seconds) or of the whole model"""
    checkpoint_activations: bool = False
    """compute each block's activations again in the backward pass: less memory, a third more time"""
    seed: int = 0
    """weights, data order, augmentation and masks follow from it"""
    resume: str = ""
    """checkpoint to continue from, exactly where it stopped"""
    auto_resume: bool = False
    """continue from the newest good checkpoint in output_dir; start afresh only if there is none"""
    start_epoch: int = 0
    """first epoch of a fresh run (a resumed one knows its own)"""
    save_periods: tuple[str, ...] = ("last", "best")
    """checkpoints to keep beside the newest (--keep_last; `last` adds nothing): best (by kNN, top-1 or mIoU),
    every_N_epochs"""
    save_freq: int = 1
    """epochs between two saves"""
    keep_last: int = 2
    """how many of the newest checkpoints stay"""
    print_freq: int = 20
    """updates between two log lines"""
    max_steps: int | None = None
    """end the run after this many updates in all; the schedule stays that of the whole run"""
    max_minutes: float | None = None
    """save and stop with exit status 75 after so many minutes of training (filling --cache not counted)"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss that is NaN or infinite stops the run, or its update is left out and counted (checks each update)"""
    elastic: bool = False
    """let a resumed run have another number of processes: --accum_iter and --batch_size are adapted, so that each
    update keeps its images"""
    save_in_background: bool = True
    """write checkpoints while training continues, from a copy in memory (on rank 0, as large as the file)"""
    dist_backend: str = "auto"
    """auto: nccl on GPUs, gloo on CPU"""
    dry_run: bool = False
    """print the resolved settings, cost and one batch, train nothing"""
    print_config: bool = False
    """print all settings as YAML, and end"""

    def __post_init__(self) -> None:
        check_limits(self)
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie in 0..2^32 - 1")
        for flag in ("save_freq", "keep_last", "print_freq"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        start, epochs = self.start_epoch, getattr(self, "epochs", math.inf)
        check(start >= 0, "start_epoch", start, "must be 0 or more")
        check(start < epochs, "start_epoch", start, f"must lie in 0..{epochs - 1}, below --epochs")
        minutes = self.max_minutes
        check(minutes is None or 1e-4 <= minutes <= 1e7, "max_minutes", minutes, "must lie in 0.0001..10000000")
        check(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "must be 1 or more")
        for period in self.save_periods:
            known = period in ("last", "best") or re.fullmatch(r"every_0*[1-9]\d*_epochs", period)
            check(bool(known), "save_periods", period, "each one of last, best, every_N_epochs")
        several = sum(period.startswith("every_") for period in self.save_periods) > 1
        check(not several, "save_periods", self.save_periods, "give every_N_epochs once")
        check(not (self.resume and self.auto_resume), "resume", self.resume, "leave out --auto_resume beside it")

    @property
    def keep_every(self) -> int | None:
        """The number N of every_N_epochs, None if it is not given."""
        every = [p for p in self.save_periods if p.startswith("every_")]
        return int(every[0].split("_")[1]) if every else None


def as_dict(config: Any) -> dict[str, Any]:
    """Return the settings as plain types, for YAML and checkpoints."""
    plain = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def config_from_dict(config_type: type[Config], plain: dict[str, Any]) -> Config:
    """Make a config from the plain settings that a checkpoint holds; the inverse of `as_dict`.

    Raises:
        UserError: it has settings that are unknown here.
    """
    unknown = sorted(set(map(str, plain)) - {field.name for field in dataclasses.fields(config_type)})
    if unknown:
        raise UserError(
            f"the file's run has settings unknown here ({', '.join(unknown[:6])}), is it of another version?"
        )
    return config_type(**{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})
