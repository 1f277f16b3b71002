"""Settings, batches and trainers of pre-training."""

from __future__ import annotations

import torch

from engine_pretrain import PretrainTrainer
from models_lut import LUT, MomentumEncoder
from shared.flags import TINY
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.data.samples import Batch
from util.optim.optimizer import build_optimizer
from util.runtime.amp import grad_scaler
from util.train.trainer import TrainState


# ---- one update -----------------------------------------------------------------------------------------
def trainer_of(*flags: str) -> PretrainTrainer:
    """Return a trainer without data, and weights from seed 0."""
    config = parse_config(PretrainConfig, [*TINY.split(), *flags], "main_pretrain.py")
    torch.manual_seed(0)
    student = LUT(**config.model_arguments)
    momentum_encoder = MomentumEncoder(student) if config.has_momentum_encoder else None
    optimizer = build_optimizer(student, config.peak_lr, config.betas, config.weight_decay)
    state = TrainState(student, momentum_encoder, optimizer, grad_scaler(None, torch.device("cpu")), updates=5)
    return PretrainTrainer(config, state, student, torch.device("cpu"), None, updates_per_epoch=10)


def random_batch(number: int, patches: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (number, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(
        views,
        torch.rand(number, patches, generator=generator),
        torch.arange(number),
        torch.arange(number),
        torch.empty(number, 0),
    )


def config_of(flags: str) -> PretrainConfig:
    return parse_config(PretrainConfig, [*TINY.split(), *flags.split()], "main_pretrain.py")
