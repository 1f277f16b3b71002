"""Settings of pre-training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from models_architectures import MODELS
from models_encoder import num_visible_patches
from models_lut import HEAD_ACTIVATIONS, HEAD_NORMS, Steering, Student
from models_simmim import METHODS
from util.config.checks import check, check_choice
from util.config.groups import DataConfig, ModelConfig, OptimConfig, RunConfig
from util.config.same_run import resume_settings
from util.runtime.distributed import world_size


@dataclass(frozen=True)
class PretrainConfig(ModelConfig, DataConfig, OptimConfig, RunConfig):
    """Pre-train LUT, or MAE (--alpha 0), or either with SimMIM in MAE's place. The step: Section 3 of the paper."""

    eval: ClassVar[bool] = False  # there is no --eval: only trainings on labels have it

    # the model
    model: str = "lut_vit_base_patch16"
    """lut_vit_* or mae_vit_* with {small,medium,base,large}_patch16, huge_patch14, {nano,tiny,small}_patch4 (32 px)
    or {tiny,small}_patch8 (64 px)"""
    method: Literal["mae", "simmim"] = "mae"
    """method of masked image modelling, under LUT or (--alpha 0) alone"""
    mask_ratio: float | None = None
    """share of patches hidden from the student; default: 0.75, SimMIM 0.6"""
    mask_unit: int | None = None
    """side in pixels of the squares that are hidden together; default: one patch, SimMIM two (32 at patch 16)"""
    norm_pix_loss: bool = False
    """predict patches normalised by their own mean and variance"""
    decoder_depth: int | None = None
    """blocks of MAE's decoder; default: the model's own (8 at patch 16)"""

    # supervision of the visible tokens
    views: Literal["asymmetric", "symmetric"] = "asymmetric"
    """asymmetric: the paper, student on view u, momentum encoder on view v; symmetric: both on both, as released"""
    alpha: Annotated[float | None, arg(aliases=["--w_bc"])] = None
    """weight of L_BC; 0: MAE, without any momentum encoder. Default: 0 for mae_*, 1 up to ViT-S, else 0.25"""
    w_mim: Annotated[float, arg(aliases=["--w_mae"])] = 1.0
    """weight of L_MIM; 0: L_BC alone, without any decoder"""
    head_depth: Annotated[int, arg(aliases=["--depth_head"])] = 2
    """linear layers of the projector"""
    predictor_depth: Annotated[int, arg(aliases=["--depth_pred"])] = 2
    """linear layers of the predictor"""
    head_mlp_dim: int = 4096
    """hidden width of both heads"""
    head_norm_layer: str = "BN"
    """between the layers of the heads: BN, LN or none"""
    head_act_layer: str = "ReLU"
    """between the layers of the heads: ReLU or GELU"""
    model_ema: bool = True
    """the release's switch; there is a momentum encoder whenever alpha is above 0"""
    momentum: Annotated[float, arg(aliases=["--model_ema_decay"])] = 0.996
    """decay of the momentum encoder at the start"""
    momentum_end: float = 1.0
    """decay at the end of its half cosine"""

    # the switches of Table 4; the paper's choice is first
    steered_tokens: Literal["visible", "all", "none"] = "visible"
    """tokens that L_BC pulls: the visible ones; all: also the mean of the decoded mask tokens; none: as --alpha 0"""
    context_token: Literal["avg", "cls"] = "avg"
    """context token of student and context encoder: mean of the patch tokens, or the cls token"""
    supervision: Literal["context", "token", "both"] = "context"
    """context token against context token; each visible token against the one at its place (--shared_crop); the mean
    of the two"""
    distance: Literal["cosine", "smooth_l1", "infonce"] = "cosine"
    """distance of prediction and target; infonce: negatives are the other images of the update, of all processes"""
    infonce_temperature: float = 0.2
    """divides the cosines of --distance infonce"""
    context_mask_ratio: float = 0.0
    """share of patches hidden from the context encoder"""

    # views
    crop: Literal["src", "rrc"] | None = None
    """simple resized crop (DeiT III) or random resized crop (MAE); default: rrc for mae_*, else src"""
    shared_crop: bool = False
    """both views from the same crop and flip"""
    hflip: float = 0.5
    """probability of a horizontal flip; 0 where left and right differ (digits, letters)"""
    photometric: bool = True
    """colour jitter and one of greyscale, solarise, blur on view v"""
    augment_on: Literal["worker", "device"] = "worker"
    """where colours are changed: image by image in the data loader workers, or a batch at a time on the device"""

    # start and monitors
    init_from: str = ""
    """weights to start from (MAE's, the release's, timm's or ours), fresh optimiser and schedule"""
    init_weights: Literal["student", "momentum"] = "student"
    """which of the two encoders of --init_from"""
    monitor_freq: int = 20
    """epochs between pictures, kNN accuracy and RankMe; 0: never"""
    monitor_images: int = 10_000
    """most images of each split that the monitors read"""

    def __post_init__(self) -> None:
        check_choice("model", self.model, list(MODELS))
        for group in (DataConfig, ModelConfig, OptimConfig, RunConfig):
            group.__post_init__(self)
        depth = self.decoder_depth
        check(depth is None or depth >= 1, "decoder_depth", depth, "must be 1 or more")

        self.check_masks()
        for flag in ("alpha", "w_mim"):
            value = getattr(self, flag)
            check(value is None or 0 <= value < math.inf, flag, value, "must be 0 or more, and finite")
        check(self.resolved_alpha + self.w_mim > 0, "w_mim", self.w_mim, "nothing to learn: alpha is 0 too")
        check(self.model_ema or not self.has_momentum_encoder, "no_model_ema", "", "add --alpha 0 to train MAE alone")
        for flag in ("head_depth", "predictor_depth", "head_mlp_dim"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check_choice("head_norm_layer", self.head_norm_layer, list(HEAD_NORMS))
        check_choice("head_act_layer", self.head_act_layer, list(HEAD_ACTIVATIONS))
        for flag in ("momentum", "momentum_end", "hflip"):
            check(0 <= getattr(self, flag) <= 1, flag, getattr(self, flag), "must lie in [0, 1]")
        recolours = self.photometric and self.has_momentum_encoder
        fix = "colours of RGBA are not augmented: --no_photometric"
        check(not (recolours and self.in_chans == 4), "in_chans", 4, fix)
        fix = "must be device with --cache device"
        check(self.cache != "device" or self.augment_on == "device", "augment_on", self.augment_on, fix)
        check(self.monitor_freq >= 0, "monitor_freq", self.monitor_freq, "must be 0 or more")
        check(self.monitor_images >= 1, "monitor_images", self.monitor_images, "must be 1 or more (see --monitor_freq)")
        self.check_method()
        self.check_steering()
        self.check_heads()

    def check_heads(self) -> None:
        """Raise UserError unless the heads' BatchNorm gets enough images; heads of one layer have none."""
        normed = self.has_momentum_encoder and self.head_norm_layer == "BN"
        enough = self.batch_size * world_size() >= 2 or self.head_depth + self.predictor_depth == 2
        fix = "BatchNorm of the heads needs two images, over all processes, or --head_norm_layer LN"
        check(enough or not normed, "batch_size", self.batch_size, fix)

    def check_masks(self) -> None:
        """Raise UserError unless masks leave patches to see and patches to predict, in both encoders."""
        unit, patch = self.mask_unit_pixels, self.resolved_patch_size
        check(unit >= 1 and unit % patch == 0, "mask_unit", unit, f"must be a multiple of the patch, {patch} pixels")
        fits = all(side % unit == 0 for side in self.resolved_input_size)
        height, width = self.resolved_input_size
        check(fits, "mask_unit", unit, f"must divide the image, {height} x {width} pixels; one patch has {patch}")

        ratio, squares = self.resolved_mask_ratio, self.num_patches * patch**2 // unit**2
        check(0 < ratio < 1, "mask_ratio", ratio, "must lie between 0 and 1, as 0.75")
        visible = num_visible_patches(squares, ratio)
        unit_name = "patches" if unit == patch else f"squares of {unit} pixels"
        check(1 <= visible < squares, "mask_ratio", ratio, f"leaves {visible} of {squares} {unit_name} visible")
        enough = self.views == "asymmetric" or 2 * visible <= squares
        check(enough, "mask_ratio", ratio, "--views symmetric hides different patches in each view: at least 0.5")

        ratio = self.context_mask_ratio
        check(0 <= ratio < 1, "context_mask_ratio", ratio, "must lie in [0, 1)")
        visible = num_visible_patches(self.num_patches, ratio)
        check(visible >= 1, "context_mask_ratio", ratio, f"leaves none of {self.num_patches} patches visible")

    def check_method(self) -> None:
        """Raise UserError for flags that SimMIM has no use for."""
        if self.method == "mae":
            return
        check(self.decoder_depth is None, "decoder_depth", self.decoder_depth, "SimMIM's decoder is one linear layer")
        fix = f"names another method than --method {self.method}: take lut_{self.architecture_name}, and --alpha 0"
        check(not self.model.startswith("mae_"), "model", self.model, fix)

    def check_steering(self) -> None:
        """Raise UserError for switches of L_BC that would have no effect, or contradict each other."""
        for field in dataclasses.fields(Steering):
            value = getattr(self, field.name)
            off = "--alpha 0" if self.alpha is not None else f"--model {self.model}"
            off = "--steered_tokens none" if self.steered_tokens == "none" else off
            used = self.has_momentum_encoder or value in (field.default, "none")
            check(used, field.name, value, f"is part of L_BC, which {off} leaves out; give {field.default}")
        if self.steered_tokens == "all":
            check(self.w_mim > 0, "steered_tokens", "all", "--w_mim 0 has no decoder, whose tokens could be steered")
            fix = "mask tokens are pulled to the context token, which --supervision token leaves out; take both"
            check(self.supervision != "token", "steered_tokens", "all", fix)
        if self.supervision != "context":
            flag, value = "supervision", self.supervision
            check(self.shared_crop, flag, value, "tokens of the same place are compared: add --shared_crop")
            fix = "--context_mask_ratio hides tokens that the student's are compared with: leave it at 0"
            check(self.context_mask_ratio == 0, flag, value, fix)
            fix = "--distance infonce would compare each token with all others: take cosine or smooth_l1"
            check(self.distance != "infonce", flag, value, fix)
        if self.supervision == "token":
            fix = "--supervision token uses no context token: take both, or leave it out"
            check(self.context_token == "avg", "context_token", self.context_token, fix)
        temperature = self.infonce_temperature
        check(0 < temperature < math.inf, "infonce_temperature", temperature, "must be above 0, and finite")
        if self.distance == "infonce":
            fix = "--distance infonce needs two images at least"
            check(self.effective_batch >= 2, "batch_size", self.batch_size, fix)
        else:
            unused = temperature == Steering.infonce_temperature
            check(unused, "infonce_temperature", temperature, f"--distance {self.distance} has none; take infonce")

    @property
    def num_patches(self) -> int:
        """The number L of patches in an image."""
        height, width = self.resolved_input_size
        return (height // self.resolved_patch_size) * (width // self.resolved_patch_size)

    @property
    def resolved_mask_ratio(self) -> float:
        """The value of --mask_ratio, or its default: MAE's or SimMIM's."""
        if self.mask_ratio is not None:
            return self.mask_ratio
        return 0.75 if self.method == "mae" else 0.6

    @property
    def mask_unit_pixels(self) -> int:
        """The value of --mask_unit in pixels, or its default."""
        if self.mask_unit is not None:
            return self.mask_unit
        return self.resolved_patch_size if self.method == "mae" else 2 * self.resolved_patch_size

    @property
    def resolved_alpha(self) -> float:
        """The alpha of Eq. 3, or its default: 1.0 for ViT-S, 0.25 for ViT-B and L (Section 5.1)."""
        if self.steered_tokens == "none":
            return 0.0
        if self.alpha is not None:
            return self.alpha
        if self.model.startswith("mae_"):
            return 0.0
        return 1.0 if self.architecture["embed_dim"] <= 384 else 0.25

    @property
    def resolved_crop(self) -> Literal["src", "rrc"]:
        """The value of --crop, or its default: MAE's own or LUT's (Table 4f)."""
        return self.crop or ("rrc" if self.model.startswith("mae_") else "src")

    @property
    def has_momentum_encoder(self) -> bool:
        """True if L_BC is trained; MAE builds no heads and no momentum encoder."""
        return self.resolved_alpha > 0

    @property
    def num_views(self) -> int:
        """Number of views that the loader makes of each image; MAE needs only one."""
        return 2 if self.has_momentum_encoder else 1

    @property
    def student_type(self) -> type[Student]:
        """The class of the student."""
        return METHODS[self.method]

    @property
    def model_arguments(self) -> dict:
        """The keyword arguments of `student_type`."""
        heads = dict(hidden_dim=self.head_mlp_dim, norm=self.head_norm_layer, activation=self.head_act_layer)
        shape = dict(self.architecture)
        if self.method == "mae":
            shape["decoder_depth"] = self.decoder_depth or shape["decoder_depth"]
        else:
            shape = {name: value for name, value in shape.items() if not name.startswith("decoder")}
        steering = {field.name: getattr(self, field.name) for field in dataclasses.fields(Steering)}
        return shape | dict(
            img_size=self.resolved_input_size,
            patch_size=self.resolved_patch_size,
            in_chans=self.in_chans,
            mask_ratio=self.resolved_mask_ratio,
            mask_unit_patches=self.mask_unit_pixels // self.resolved_patch_size,
            norm_pix_loss=self.norm_pix_loss,
            reconstructs=self.w_mim > 0,
            steering=Steering(**steering) if self.has_momentum_encoder else Steering(),
            heads=heads if self.has_momentum_encoder else None,
            head_depth=self.head_depth,
            predictor_depth=self.predictor_depth,
        )

    def resume_settings(self, num_images: int) -> dict[str, Any]:
        """Return the settings that a resumed run must share with its checkpoint, defaults filled in."""
        own = {"monitor_freq", "monitor_images", "init_from", "init_weights"}
        resolved = {
            "alpha": self.resolved_alpha,
            "warmup_epochs": self.resolved_warmup_epochs,
            "crop": self.resolved_crop,
            "patch_size": self.resolved_patch_size,
            "mask_ratio": self.resolved_mask_ratio,
            "mask_unit": self.mask_unit_pixels,
            "steered_tokens": self.steered_tokens if self.has_momentum_encoder else "none",
        }
        return resume_settings(self, num_images, self.resolved_input_size, may_change=own | set(resolved)) | resolved
