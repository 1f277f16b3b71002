"""Settings of fine-tuning and of linear probing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from models_architectures import ARCHITECTURES
from models_position_bias import RelativeBias
from models_vit import Pool
from util.config.checks import check, check_batch_norm, check_choice
from util.config.groups import DataConfig, DownstreamConfig, ModelConfig, OptimConfig, RunConfig
from util.config.same_run import DOWNSTREAM_MAY_CHANGE, resume_settings


@dataclass(frozen=True)
class ClassifierConfig(DownstreamConfig, ModelConfig, DataConfig, OptimConfig, RunConfig):
    """The settings that fine-tuning and linear probing share."""

    # the model
    model: str = "vit_base_patch16"
    """vit_{small,medium,base,large}_patch16, vit_huge_patch14, vit_{nano,tiny,small}_patch4 (32 px) or
    vit_{tiny,small}_patch8 (64 px); `lut_` or `mae_` in front is allowed"""
    nb_classes: int | None = None
    """default: the classes of the data; another number is refused"""
    global_pool: bool = True
    """classify the mean of the patch tokens"""
    cls_token: bool = False
    """classify the cls token instead"""

    # augmentation
    hflip: float = 0.5
    """probability of a horizontal flip"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """share of an image's area that a random resized crop takes"""

    # evaluation
    per_class: bool = False
    """also write the accuracy per class (per_class.json) and the confusion matrix (confusion.png, .npy)"""

    def __post_init__(self) -> None:
        check_choice("model", self.architecture_name, list(ARCHITECTURES))
        for group in (DataConfig, ModelConfig, OptimConfig, DownstreamConfig, RunConfig):
            group.__post_init__(self)
        classes = self.nb_classes
        check(classes is None or classes >= 2, "nb_classes", classes, "must be 2 or more")
        check(0 <= self.hflip <= 1, "hflip", self.hflip, "must lie in [0, 1]")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "give two shares, as 0.08 1")
        check(self.cache != "device", "cache", "device", "is for pre-training, use ram")

    @property
    def resolved_pool(self) -> Pool:
        """The feature that is classified."""
        return "avg" if self.global_pool and not self.cls_token else "token"

    @property
    def augmentation(self) -> dict[str, Any]:
        """The keyword arguments of timm's create_transform."""
        return dict(
            input_size=(self.in_chans, *self.resolved_input_size),
            is_training=True,
            scale=self.crop_scale,
            hflip=self.hflip,
            interpolation="bicubic",
            mean=self.resolved_mean,
            std=self.resolved_std,
        )

    def model_arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of models_vit.Classifier and LinearProbe."""
        return dict(
            architecture=self.architecture,
            img_size=self.resolved_input_size,
            patch_size=self.resolved_patch_size,
            in_chans=self.in_chans,
            num_classes=num_classes,
            pool=self.resolved_pool,
        )

    def resume_settings(self, num_images: int) -> dict[str, Any]:
        """Return the settings that a resumed run must share with its checkpoint, defaults filled in."""
        free = DOWNSTREAM_MAY_CHANGE | {"nb_classes", "global_pool", "cls_token"}
        resolved = {"model": self.architecture_name, "patch_size": self.resolved_patch_size, "pool": self.resolved_pool}
        resolved["warmup_epochs"] = self.resolved_warmup_epochs
        return resume_settings(self, num_images, self.resolved_input_size, may_change=free) | resolved


@dataclass(frozen=True)
class FinetuneConfig(ClassifierConfig):
    """Fine-tune an encoder, or train it from scratch, as a classifier (Table D)."""

    default_warmup: ClassVar[float] = 5.0
    warmup_share: ClassVar[float] = 0.05

    epochs: int = 100
    warmup_epochs: float | None = None
    """epochs of linear warm-up from 0; default: 5, or a twentieth of --epochs where 5 do not fit"""
    blr: float = 5e-4
    """base learning rate, per 256 images"""
    min_lr: float = 1e-6
    """learning rate at the end of the half cosine"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momenta"""
    layer_decay: float = 0.75
    """factor on the learning rate per block from the last to the first; 1: none"""
    drop_path: float = 0.1
    """rate of stochastic depth at the last block"""
    rel_pos_bias: RelativeBias = "none"
    """relative position bias in attention, 0 at first: a table for each block, or one that all blocks share"""
    model_ema: bool = False
    """evaluate, and keep as `model_ema`, the exponential moving average (EMA) of the weights"""
    model_ema_decay: float = 0.9999
    """decay of the EMA, per update"""

    # augmentation
    color_jitter: float | None = None
    """strength of colour jitter; without effect beside --aa"""
    aa: str = "rand-m9-mstd0.5-inc1"
    """timm's AutoAugment or RandAugment policy; none: none"""
    smoothing: float = 0.1
    """label smoothing"""
    reprob: float = 0.25
    """probability of random erasing"""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """what erased regions are filled with"""
    recount: int = 1
    """how many regions are erased at most"""
    resplit: bool = False
    """accepted for MAE's commands; without effect, as there are no augmentation splits"""
    mixup: float = 0.0
    """alpha of Mixup; 0: none"""
    cutmix: float = 0.0
    """alpha of CutMix; 0: none"""
    cutmix_minmax: tuple[float, float] | None = None
    """smallest and largest side of the patch of CutMix, as shares; replaces --cutmix"""
    mixup_prob: float = 1.0
    """probability that a batch is mixed at all"""
    mixup_switch_prob: float = 0.5
    """probability of CutMix where both are on"""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """one mixture per batch, pair of images or image"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("drop_path", "smoothing"):
            check(0 <= getattr(self, flag) < 1, flag, getattr(self, flag), "must lie in [0, 1)")
        for flag in ("reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
            check(0 <= getattr(self, flag) <= 1, flag, getattr(self, flag), "must lie in [0, 1]")
        for flag in ("mixup", "cutmix"):
            value = getattr(self, flag)
            check(value is None or 0 <= value < math.inf, flag, value, "must be 0 or more, and finite")
        jitter = self.color_jitter
        check(jitter is None or 0 <= jitter <= 10, "color_jitter", jitter, "must lie in [0, 10]")
        check(self.recount >= 1, "recount", self.recount, "must be 1 or more")
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            check(0 < low <= high <= 1, "cutmix_minmax", self.cutmix_minmax, "give two shares, as 0.2 0.8")
        check(
            not self.mixes or self.batch_size % 2 == 0, "batch_size", self.batch_size, "must be even for Mixup, CutMix"
        )
        recolours = self.policy is not None or bool(self.color_jitter)
        fix = "colours of RGBA are not augmented: --aa none, without --color_jitter"
        check(not (recolours and self.in_chans == 4), "in_chans", 4, fix)

    @property
    def mixes(self) -> bool:
        """True if images are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def policy(self) -> str | None:
        """The policy of --aa; None: none."""
        return None if self.aa.lower() in ("", "none") else self.aa

    @property
    def augmentation(self) -> dict[str, Any]:
        """The keyword arguments of timm's create_transform."""
        return super().augmentation | dict(
            color_jitter=self.color_jitter or 0.0,
            auto_augment=self.policy,
            re_prob=self.reprob,
            re_mode=self.remode,
            re_count=self.recount,
        )

    def model_arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of models_vit.Classifier."""
        return super().model_arguments(num_classes) | dict(drop_path=self.drop_path, rel_pos_bias=self.rel_pos_bias)

    def mixup_arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of timm's Mixup."""
        return dict(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            cutmix_minmax=self.cutmix_minmax,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode=self.mixup_mode,
            label_smoothing=self.smoothing,
            num_classes=num_classes,
        )


@dataclass(frozen=True)
class LinprobeConfig(ClassifierConfig):
    """Train a linear layer on a frozen encoder by MAE's protocol: LARS, batch 16384, no weight decay."""

    batch_size: int = 512
    """images per process and forward pass"""
    default_warmup: ClassVar[float] = 10.0
    warmup_share: ClassVar[float] = 0.1

    epochs: int = 90
    warmup_epochs: float | None = None
    """epochs of linear warm-up from 0; default: 10, or a tenth of --epochs where 10 do not fit"""
    blr: float | None = None
    """base learning rate, per 256 images; default: 0.1, with --pool attentive 1e-3"""
    weight_decay: float = 0.0
    pool: Literal["token", "avg", "attentive"] | None = None
    """the feature that is probed: the cls token (the default), the mean of the patch tokens, or the patch tokens by the
    cross-attention of learned queries (trained by AdamW in place of LARS)"""
    global_pool: bool = False
    """the same as --pool avg"""
    attentive_queries: int = 1
    """learned queries of --pool attentive"""
    attentive_projections: bool = True
    """key and value projections in --pool attentive; without: "efficient probing\""""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.parallel == "ddp", "parallel", self.parallel, "one layer is trained, use ddp")
        check_batch_norm(self)
        check(
            self.pool is None or not (self.global_pool or self.cls_token), "pool", self.pool, "leave out --global_pool"
        )
        queries, used = self.attentive_queries, self.attentive or self.attentive_queries == 1
        check(queries >= 1, "attentive_queries", queries, "must be 1 or more")
        check(used, "attentive_queries", queries, "add --pool attentive")
        check(self.attentive or self.attentive_projections, "no_attentive_projections", "", "add --pool attentive")
        for flag in () if self.attentive else ("betas", "layer_decay"):
            check(getattr(self, flag) == getattr(OptimConfig, flag), flag, getattr(self, flag), "LARS has none")
        check(self.layer_decay == 1, "layer_decay", self.layer_decay, "the encoder is frozen")

    @property
    def attentive(self) -> bool:
        """True for an attentive head in place of a linear layer."""
        return self.pool == "attentive"

    @property
    def resolved_pool(self) -> str:
        """--pool, the default filled in."""
        return self.pool or super().resolved_pool

    @property
    def resolved_blr(self) -> float:
        """--blr, the default of LARS or AdamW filled in."""
        return self.blr if self.blr is not None else 1e-3 if self.attentive else 0.1

    def model_arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of LinearProbe, or with --pool attentive of AttentiveProbe."""
        arguments = super().model_arguments(num_classes)
        if not self.attentive:
            return arguments
        own = dict(pool="avg", num_queries=self.attentive_queries, projections=self.attentive_projections)
        return arguments | own

    @property
    def augmentation(self) -> dict[str, Any]:
        """The keyword arguments of timm's create_transform: crop and flip only."""
        return super().augmentation | dict(color_jitter=0.0)
