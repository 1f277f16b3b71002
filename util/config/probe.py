"""Settings of scripts/probe.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from models_vit import Pool
from util.config.groups import check, check_image_size


@dataclass(frozen=True)
class ProbeConfig:
    """Probe the frozen encoders of a checkpoint."""

    checkpoint: Positional[str]
    """a checkpoint of ours, MAE's, LUT's release or timm's; one of another program needs --model and a data set"""
    model: str = ""
    """as for main_pretrain.py; default: that of the run"""
    data_path: str = ""
    """labelled images, train and val as for main_pretrain.py; default: those of the run"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py; default: that of the run"""
    val_path: str = ""
    """labelled validation images; default: beside the training images"""
    input_size: tuple[int, ...] = ()
    """pixels, one number or height and width; default: that of the run, else the model's own"""
    mean: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: that of the run, else ImageNet's (3 channels) or 0.5"""
    std: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: that of the run, else ImageNet's (3 channels) or 0.25"""
    exif: Literal["", "ignore", "apply"] = ""
    """EXIF orientation of images: ignore it or turn the pixels as it says; default: as the run, else ignore"""
    pool: Pool = "avg"
    """features: mean of the patch tokens, or the cls token"""
    encoders: tuple[Literal["random", "student", "momentum"], ...] = ("random", "student", "momentum")
    """rows of the table; a momentum encoder that the file does not hold is left out"""
    knn_k: int = 20
    """neighbours that vote"""
    knn_temperature: float = 0.07
    """a vote weighs exp(cosine / temperature)"""
    labels_per_class: int = 10
    """for the probe with few labels; 0: without it"""
    repeats: int = 5
    """random subsets that the probe with few labels is averaged over"""
    logistic: bool = True
    """logistic regression with all labels"""
    sweep: bool = False
    """linear heads by SGD, with all pairs of --sweep_lr and --sweep_weight_decay"""
    sweep_lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """learning rates, per step of 256 images"""
    sweep_weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    """weight decays"""
    sweep_epochs: int = 30
    """passes over the features"""
    most_images: int = 50_000
    """most images of each split"""
    num_workers: int = 0
    """loader processes"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before a hung or dead loader process ends it; 0: for ever"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    output_dir: str = ""
    """results.jsonl; default: beside the checkpoint"""

    def __post_init__(self) -> None:
        check(bool(self.encoders), "encoders", "", "give at least one")
        for flag in ("repeats", "most_images", "knn_k", "sweep_epochs"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")
        timeout = self.loader_timeout
        check(0 <= timeout < math.inf, "loader_timeout", timeout, "must be 0 (never) or more, and finite")
        check_image_size(self.input_size)
        check(self.labels_per_class >= 0, "labels_per_class", self.labels_per_class, "must be 0 or more")
        check(self.knn_temperature > 0, "knn_temperature", self.knn_temperature, "must be above 0")
        check(bool(self.sweep_lr), "sweep_lr", "", "give at least one")
        check(all(lr > 0 for lr in self.sweep_lr), "sweep_lr", self.sweep_lr, "must be above 0")
        check(bool(self.sweep_weight_decay), "sweep_weight_decay", "", "give at least one")
        check(all(d >= 0 for d in self.sweep_weight_decay), "sweep_weight_decay", self.sweep_weight_decay, "0 or more")
