"""Rows of a tiny benchmark of the update."""

from __future__ import annotations

import torch

from util.bench.config import StepConfig, vary
from util.bench.variant import Variant, step_variants

FORMS = ("mae", "asymmetric", "symmetric")
TINY_STEP = (
    "--model lut_vit_nano_patch4 --patch_size 8 --depth 2 --decoder_depth 2 --head_mlp_dim 16 --batch_size 6"
    " --device cpu --amp fp32 --num_workers 0 --steps 1 --rounds 2 --warmup_steps 0 --check_steps 3"
)
CPU = torch.device("cpu")


def variants(more: str = "", *axes: str) -> list[Variant]:
    """Return the rows of a tiny `step`."""
    return step_variants(vary(StepConfig, [*TINY_STEP.split(), *more.split()], axes, "bench.py step"))
