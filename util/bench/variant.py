"""A variant of the benchmark of the update: a form (MAE or LUT), our code or the plain one, and its settings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from util.bench.config import Form, Kind, StepConfig, titled
from util.bench.limits import Numbers
from util.runtime.amp import autocast_dtype
from util.runtime.distributed import choose_device

# Flags that change the work of an update. Losses are compared between variants that share all of them. Other flags must
# not change the losses, and the plain variant ignores them, except for amp and device.
WORK = (
    *("model", "method", "depth", "decoder_depth", "patch_size", "input_size", "in_chans", "mean", "std"),
    *("mask_ratio", "mask_unit", "norm_pix_loss", "views", "alpha", "w_mim", "head_depth", "predictor_depth"),
    *("head_mlp_dim", "head_norm_layer", "head_act_layer", "steered_tokens", "context_token", "supervision"),
    *("distance", "infonce_temperature", "context_mask_ratio", "crop", "shared_crop", "hflip", "photometric"),
    *("batch_size", "accum_iter", "lr", "blr", "min_lr", "epochs", "warmup_epochs", "betas", "weight_decay"),
    *("layer_decay", "clip_grad", "momentum", "momentum_end", "seed", "init_from", "init_weights"),
)
PLAIN_KNOWS = (*WORK, "amp", "device")


@dataclass(frozen=True)
class Variant:
    """A row of the table of `bench.py step`."""

    name: str
    form: Form
    kind: Kind
    config: StepConfig

    @property
    def work(self) -> tuple:
        """Return the form and the flags of WORK; variants with equal work must have equal losses."""
        return (self.form, *(getattr(self.config, name) for name in WORK))

    @property
    def images(self) -> int:
        """Return the number of images of an update."""
        return self.config.effective_batch

    @property
    def device(self) -> torch.device:
        """Return the device on which it runs."""
        return choose_device(self.config.device)

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of autocast; None means fp32."""
        return autocast_dtype(self.config.amp, self.device)

    @property
    def numbers(self) -> Numbers:
        """Return the number format of its matrix products."""
        if self.dtype is None:
            in_tf32 = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
            return "tf32" if in_tf32 else "fp32"
        return "bf16" if self.dtype is torch.bfloat16 else "fp16"


def step_variants(settings: dict[str, StepConfig]) -> list[Variant]:
    """Return the variants form by form, ours before plain.

    The plain variant occurs once for all values of the flags that it ignores.
    """
    variants: dict[str, Variant] = {}
    first = next(iter(settings.values()))
    for form, kind, (title, config) in itertools.product(first.forms, first.variants, settings.items()):
        name = f"{form} {titled(kind, title, PLAIN_KNOWS if kind == 'plain' else None)}"
        variants.setdefault(name, Variant(name, form, kind, config.in_form(form)))
    return list(variants.values())
