"""Settings of semantic segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from models_architectures import ARCHITECTURES
from models_position_bias import RelativeBias
from util.config.checks import check, check_batch_norm, check_choice
from util.config.groups import DownstreamConfig, ModelConfig, PixelConfig, RunConfig, UpdateConfig
from util.config.same_run import DOWNSTREAM_MAY_CHANGE, resume_settings


@dataclass(frozen=True)
class SegmentConfig(DownstreamConfig, ModelConfig, PixelConfig, UpdateConfig, RunConfig):
    """Train a ViT with UperNet to name every pixel, from a pre-trained encoder or from scratch (Table E)."""

    # the model
    model: str = "vit_base_patch16"
    """vit_{small,medium,base,large}_patch16, vit_huge_patch14, vit_{nano,tiny,small}_patch4 or
    vit_{tiny,small}_patch8, with any --patch_size; `lut_` or `mae_` in front is allowed"""
    head_width: int = 512
    """channels of the decode head"""
    auxiliary_width: int | None = None
    """channels of the auxiliary head; default: half of --head_width"""
    auxiliary_weight: float = 0.4
    """weight of the auxiliary head's loss"""
    drop_path: float = 0.1
    """rate of stochastic depth at the last block"""
    dropout: float = 0.1
    """probability that a channel is dropped before the classifiers"""
    rel_pos_bias: RelativeBias = "none"
    """relative position bias in attention, 0 at first: a table for each block, or one that all blocks share"""
    layer_scale: float = 0.0
    """initial factor, learned per channel, on what each attention layer and MLP adds (LayerScale); 0: none"""

    # images and masks
    data_path: str = ""
    """folder with images/ and masks/ (or annotations/), both with a folder for each split (train, val; or training,
    validation, as ADE20K), and classes.json (or ADE20K's objectInfo150 file, or --classes)"""
    train_images: str = ""
    """folder of training images, at any depth; with the next three, in place of what lies in --data_path"""
    train_masks: str = ""
    """folder of their masks: PNG (or BMP, TIFF) files of one channel, whose pixels are numbers of classes"""
    val_images: str = ""
    """folder of validation images"""
    val_masks: str = ""
    """folder of their masks"""
    holdout: float = 0.0
    """share of the training images that is not trained on but evaluated instead of the validation images: to choose
    settings by"""
    image_suffix: str = ""
    """ending of an image's name that its mask's does not have, without the extension: _leftImg8bit"""
    mask_suffix: str = ""
    """ending of a mask's name that its image's does not have: _gtFine_labelTrainIds"""
    classes: str = ""
    """names of the classes in the order of their numbers: a text file of one per line, ADE20K's objectInfo150.txt or
    .csv, or JSON, a list or {"class_names": [...], "ignore_index": N}"""
    first_label: int | None = None
    """number of the first class in the masks; default: 0, in ADE20K's layout 1"""
    ignore_index: tuple[int, ...] = ()
    """numbers in the masks that are no class; default: as the class file says, else 255; in ADE20K's layout 0"""
    check_data: bool = True
    """check the size of every image and every mask before a fresh run, not only when they are read"""
    input_size: tuple[int, ...] = (512,)
    """pixels of the crops, one number or height and width"""

    # augmentation
    scale_range: tuple[float, float] = (0.5, 2.0)
    """an image is resized until its shorter side is the crop's, times a factor from this range"""
    most_of_a_class: float = 0.75
    """a crop is drawn again, ten times at most, where one class has a larger share of it"""
    hflip: float = 0.5
    """probability of a horizontal flip; 0 where left and right differ"""
    photometric: bool = True
    """change brightness, contrast, saturation and hue, each with probability 1/2"""

    # schedule
    batch_size: int = 16
    """images per process and forward pass"""
    max_updates: int = 160_000
    """optimiser steps of the whole run"""
    warmup_updates: int = 1500
    """updates of linear warm-up from 0"""
    lr: float = 1e-4
    """peak learning rate, whatever the batch"""
    power: float = 1.0
    """power of the polynomial decay to --min_lr"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momenta"""
    layer_decay: float = 0.65
    """factor on the learning rate per block from the last to the first; 1: none"""

    # evaluation
    eval_mode: Literal["slide", "whole"] = "slide"
    """windows of --input_size over an image whose shorter side has that size, averaged where they overlap; or the
    whole of it at once"""
    eval_stride: tuple[int, ...] = ()
    """pixels between two windows, one number or down and across; default: two thirds of the window"""
    per_class: bool = False
    """also write IoU and accuracy per class (per_class.json) and the confusion matrix (confusion.png, .npy)"""
    pictures: int = 4
    """validation images that are drawn with truth and prediction at each evaluation; 0: none"""

    def __post_init__(self) -> None:
        check_choice("model", self.architecture_name, list(ARCHITECTURES))
        for group in (PixelConfig, ModelConfig, UpdateConfig, DownstreamConfig, RunConfig):
            group.__post_init__(self)
        self.check_data_flags()
        for flag in ("drop_path", "dropout"):
            check(0 <= getattr(self, flag) < 1, flag, getattr(self, flag), "must lie in [0, 1)")
        for flag in ("auxiliary_weight", "layer_scale", "lr", "power"):
            check(0 <= getattr(self, flag) < math.inf, flag, getattr(self, flag), "must be 0 or more, and finite")
        for flag in ("head_width", "max_updates"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        width = self.auxiliary_width
        check(width is None or width >= 1, "auxiliary_width", width, "must be 1 or more")
        warmup, most = self.warmup_updates, self.max_updates
        check(0 <= warmup <= most, "warmup_updates", warmup, f"must lie in 0..--max_updates {most}")
        check(0 <= self.hflip <= 1, "hflip", self.hflip, "must lie in [0, 1]")
        check(0 < self.most_of_a_class <= 1, "most_of_a_class", self.most_of_a_class, "must lie in (0, 1]")
        low, high = self.scale_range
        check(0 < low <= high < math.inf, "scale_range", self.scale_range, "give two factors, as 0.5 2")
        fix = "colours of RGBA are not changed: add --no_photometric"
        check(not (self.photometric and self.in_chans == 4), "in_chans", 4, fix)
        self.check_evaluation()
        check_batch_norm(self)

    def check_data_flags(self) -> None:
        """Raise UserError unless there is --data_path, or folders of images with folders of masks."""
        for split in ("train", "val"):
            images, masks = getattr(self, f"{split}_images"), getattr(self, f"{split}_masks")
            check(not images or bool(masks), f"{split}_images", images, f"add --{split}_masks")
            check(not masks or bool(images), f"{split}_masks", masks, f"add --{split}_images")
        check(0 <= self.holdout < 1, "holdout", self.holdout, "must lie in [0, 1)")
        fix = "evaluates training images, leave out --val_images"
        check(not (self.holdout and self.val_images), "holdout", self.holdout, fix)
        given = bool((self.val_images or self.holdout) and (self.train_images or self.eval))
        fix = "give a folder with images/ and masks/, or --train_images, --train_masks, --val_images and --val_masks"
        check(bool(self.data_path) or given, "data_path", self.data_path, fix)
        first = self.first_label
        check(first is None or first >= 0, "first_label", first, "must be 0 or more")
        check(all(n >= 0 for n in self.ignore_index), "ignore_index", self.ignore_index, "must be 0 or more")

    def check_evaluation(self) -> None:
        """Raise UserError unless the windows cover the image."""
        stride = self.eval_stride
        check(len(stride) <= 2, "eval_stride", stride, "give one number, or down and across")
        sides = zip(self.window_stride, self.resolved_input_size, strict=True)
        fix = f"must lie in 1..{min(self.resolved_input_size)}, or windows leave gaps"
        check(all(1 <= step <= side for step, side in sides), "eval_stride", stride, fix)
        check(self.pictures >= 0, "pictures", self.pictures, "must be 0 or more")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.lr

    @property
    def dataset(self) -> str:
        """Images and masks always come from files."""
        return ""

    @property
    def window_stride(self) -> tuple[int, int]:
        """The pixels between two windows down and across, with the default filled in."""
        if self.eval_stride:
            return (self.eval_stride[0], self.eval_stride[-1])
        height, width = self.resolved_input_size
        return (2 * height // 3, 2 * width // 3)

    def model_arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of models_upernet.UperNet."""
        return dict(
            architecture=self.architecture,
            img_size=self.resolved_input_size,
            patch_size=self.resolved_patch_size,
            in_chans=self.in_chans,
            num_classes=num_classes,
            head_width=self.head_width,
            auxiliary_width=self.auxiliary_width,
            rel_pos_bias=self.rel_pos_bias,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            dropout=self.dropout,
        )

    def resume_settings(self, num_images: int) -> dict[str, Any]:
        """Return the settings that a resumed run must share with its checkpoint, defaults filled in."""
        folders = {"train_images", "train_masks", "val_images", "val_masks", "image_suffix", "mask_suffix", "classes"}
        free = folders | DOWNSTREAM_MAY_CHANGE | {"check_data", "pictures", "eval_mode", "eval_stride"}
        resolved = {"model": self.architecture_name, "patch_size": self.resolved_patch_size}
        return resume_settings(self, num_images, self.resolved_input_size, may_change=free) | resolved
