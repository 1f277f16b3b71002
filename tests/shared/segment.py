"""Settings, batches and trainers of segmentation, and spoilt masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from engine_segment import SegmenterTrainer
from models_upernet import UperNet
from shared.flags import TINY_SEGMENTER
from util.config.command_line import parse_config
from util.config.segment import SegmentConfig
from util.data.masked_samples import MaskedBatch
from util.data.masks import IGNORED
from util.data.views import Normalise
from util.optim.optimizer import build_optimizer
from util.runtime.amp import grad_scaler
from util.train.trainer import TrainState


def config_of(*flags: object) -> SegmentConfig:
    return parse_config(SegmentConfig, [*TINY_SEGMENTER.split(), *" ".join(map(str, flags)).split()], "main.py")


DAMAGES = {
    "other size": "is 20 x 10 pixels, its image",
    "out of range": "holds the number 7, but",
    "sixteen bits": "holds the number 7000, but",
    "colours": "is a picture (RGB), not a mask",
    "no image": "cannot be read (no image, or of an unknown format)",
    "cut": "cannot be read (",
}


def damage(path: Path, kind: str) -> None:
    """Spoil a mask."""
    mask = np.asarray(Image.open(path)).copy()
    if kind == "other size":
        mask = mask[:10, :20]
    elif kind == "out of range":
        mask[3, 4] = 7
    elif kind == "sixteen bits":
        mask = mask.astype(np.uint16)
        mask[3, 4] = 7000
    elif kind == "colours":
        mask = mask[..., None].repeat(3, 2)
    Image.fromarray(mask).save(path)
    if kind == "no image":
        path.write_text("no image")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- one update --------------------------------------------------------------------------------------------
def trainer_of(*flags: str) -> SegmenterTrainer:
    config = config_of("--data_path anywhere --drop_path 0 --dropout 0 --lr 1e-3 --max_updates 20", *flags)
    torch.manual_seed(0)
    model = UperNet(**config.model_arguments(5))
    for module in model.modules():  # statistics of a part of the batch would be others
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    optimizer = build_optimizer(model, config.peak_lr, config.betas, config.weight_decay, config.layer_decay)
    state = TrainState(model, None, optimizer, grad_scaler(None, torch.device("cpu")), updates=5)
    normalise = Normalise(config.resolved_mean, config.resolved_std, torch.device("cpu"))
    return SegmenterTrainer(config, state, model.eval(), torch.device("cpu"), None, 10, normalise=normalise)


def random_batch(number: int) -> MaskedBatch:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 5, (number, 32, 32), generator=generator, dtype=torch.uint8)
    for i in range(number):
        masks[i, : 3 * i] = IGNORED  # of each image another share
    images = torch.randint(0, 256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return MaskedBatch(images, masks, torch.arange(number), torch.arange(number))
