"""Settings of scripts/probe.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from models_vit import Pool
from util.config.checks import check, check_image_size, check_limits, check_loader_timeout


@dataclass(frozen=True)
class ProbeConfig:
    """Probe the frozen encoders of a checkpoint, beside a random encoder of the same shape."""

    checkpoint: Positional[str]
    """a checkpoint of ours, MAE's, LUT's release or timm's; those of other programs need --model and a data set"""
    model: str = ""
    """a model of main_pretrain.py; default: that of the run"""
    num_heads: int | None = None
    """attention heads of a file of another program; default: as --model, or the file, tells"""
    data_path: str = ""
    """labelled images, train and val as for main_pretrain.py; default: those of the run"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py; default: that of the run"""
    val_path: str = ""
    """labelled validation images; default: beside the training images"""
    holdout: float = 0.0
    """share of the training images, of each class alike, that is evaluated in place of validation images; default: that
    of the run"""
    input_size: tuple[int, ...] = ()
    """pixels, one number or height and width; default: that of the run, else the model's own"""
    mean: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: that of the run, else ImageNet's (3 channels) or 0.5"""
    std: tuple[float, ...] = ()
    """per channel, of pixels in [0, 1]; default: that of the run, else ImageNet's (3 channels) or 0.25"""
    exif: Literal["", "ignore", "apply"] = ""
    """EXIF orientation of images: ignore it or turn the pixels as it says; default: as the run, else ignore"""
    pool: Pool = "avg"
    """features of kNN, logistic regression and --sweep: mean of the patch tokens, or the cls token"""
    encoders: tuple[Literal["random", "student", "momentum"], ...] = ("random", "student", "momentum")
    """rows of the table; momentum is left out if the file holds no momentum encoder"""
    knn_k: int = 20
    """number of neighbours that vote"""
    knn_temperature: float = 0.07
    """a vote weighs exp(cosine / temperature)"""
    labels_per_class: int = 10
    """labels of each class for logistic regression with few labels; fewer if the smallest class is smaller; 0: leave
    this probe out"""
    repeats: int = 5
    """number of random subsets over which the probe with few labels is averaged"""
    logistic: bool = True
    """logistic regression with all labels"""
    sweep: bool = False
    """train linear heads by SGD with all pairs of --sweep_lr and --sweep_weight_decay"""
    sweep_lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """learning rates of a step of 256 images"""
    sweep_weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    """weight decays"""
    sweep_epochs: int = 30
    """passes over the features"""
    attentive: bool = False
    """train heads on the cls token, on the mean of the patch tokens and attentive heads on the patch tokens, with all
    pairs of --attentive_lr and --attentive_weight_decay at once; the best of each kind on a fifth of the training
    images is reported"""
    attentive_queries: int = 1
    """learned queries of an attentive head"""
    attentive_projections: bool = True
    """key and value projections in attentive heads, as in AIM and V-JEPA; --no_attentive_projections: queries attend to
    the tokens as they are ("efficient probing")"""
    attentive_lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """peak learning rates of AdamW"""
    attentive_weight_decay: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)
    """weight decays of AdamW"""
    attentive_epochs: int = 20
    """passes over the training images"""
    attentive_batch_size: int = 256
    """images per update"""
    attentive_augment: bool = False
    """random crops and flips of the training images, encoded again in every epoch"""
    dense: bool = False
    """only kNN and logistic regression of patch tokens on masks, in % mIoU; --data_path is a folder with images/ and
    masks/ as for main_segment.py"""
    dense_patches: int = 20_000
    """most training patches that --dense fits, drawn at random"""
    classes: str = ""
    """--dense: file with the names of the classes; default: in the folder of --data_path"""
    first_label: int | None = None
    """--dense: number of the first class in the masks; default: 0, in ADE20K's layout 1"""
    ignore_index: tuple[int, ...] = ()
    """--dense: numbers in masks that are no class; default: as the class file says, else 255, in ADE20K's layout 0"""
    image_suffix: str = ""
    """--dense: end of an image's name beyond its mask's, without the extension: _leftImg8bit"""
    mask_suffix: str = ""
    """--dense: end of a mask's name beyond its image's: _gtFine_labelTrainIds"""
    token_memory: float = 4.0
    """GiB for tokens of --attentive; tokens that do not fit are encoded again in every epoch"""
    attentive_seed: int = 0
    """seed of --attentive: held-out images, first weights, order of the batches"""
    most_images: int = 50_000
    """most images of each split that are used"""
    num_workers: int = 0
    """data loader workers"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before a hung or dead worker ends the program; 0: for ever"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    output_dir: str = ""
    """folder of results.jsonl; default: beside the checkpoint"""

    def __post_init__(self) -> None:
        check(bool(self.encoders), "encoders", "", "give at least one")
        for flag in (
            "repeats",
            "most_images",
            "knn_k",
            "sweep_epochs",
            "attentive_queries",
            "attentive_epochs",
            "dense_patches",
        ):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")
        check_limits(self)
        check_loader_timeout(self.loader_timeout)
        check_image_size(self.input_size)
        check(0 <= self.holdout < 1, "holdout", self.holdout, "must lie in [0, 1)")
        check(self.labels_per_class >= 0, "labels_per_class", self.labels_per_class, "must be 0 or more")
        check(self.knn_temperature > 0, "knn_temperature", self.knn_temperature, "must be above 0")
        check(self.attentive_batch_size >= 2, "attentive_batch_size", self.attentive_batch_size, "must be 2 or more")
        check(not (self.dense and (self.sweep or self.attentive)), "dense", "", "leave out --sweep and --attentive")
        check(not self.dense or bool(self.data_path), "dense", "", "add --data_path with the images and masks")
        check(self.token_memory >= 0, "token_memory", self.token_memory, "must be 0 or more")
        check(0 <= self.attentive_seed < 2**32, "attentive_seed", self.attentive_seed, "must lie in 0..2^32 - 1")
        for name in ("sweep", "attentive"):
            lrs, decays = getattr(self, f"{name}_lr"), getattr(self, f"{name}_weight_decay")
            check(bool(lrs), f"{name}_lr", "", "give at least one")
            check(all(0 < lr < math.inf for lr in lrs), f"{name}_lr", lrs, "must be above 0")
            check(bool(decays), f"{name}_weight_decay", "", "give at least one")
            check(all(0 <= d < math.inf for d in decays), f"{name}_weight_decay", decays, "must be 0 or more")
