"""Checkpoints as pre-training writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from models_lut import LUT, MomentumEncoder
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig

SETTINGS = PretrainConfig(
    model="lut_vit_nano_patch4", patch_size=8, in_chans=1, decoder_depth=1, head_mlp_dim=16, norm_pix_loss=True
)


def shaken(model, seed=0):
    """Random weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def save_lut(path: Path) -> Path:
    """Save a checkpoint as pre-training writes it, of a LUT and its momentum encoder with other weights."""
    student = shaken(LUT(**SETTINGS.model_arguments))
    followed = shaken(MomentumEncoder(student), seed=1)
    ema = {f"ema.{name}": x for name, x in followed.state_dict().items()}
    torch.save({"model": student.state_dict(), "model_ema": ema, "config": as_dict(SETTINGS)}, path)
    return path
