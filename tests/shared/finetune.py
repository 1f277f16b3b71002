"""Settings, batches and trainers of fine-tuning."""

from __future__ import annotations

import torch

from engine_finetune import ClassifierTrainer
from models_vit import Classifier
from shared.flags import TINY_CLASSIFIER
from util.config.classifier import FinetuneConfig
from util.config.command_line import parse_config
from util.data.labelled import LabelledBatch
from util.optim.optimizer import build_optimizer
from util.runtime.amp import grad_scaler
from util.train.trainer import TrainState


def config_of(*flags: str, kind=FinetuneConfig):
    return parse_config(kind, [*TINY_CLASSIFIER.split(), *" ".join(flags).split()], "main.py")


# ---- one update --------------------------------------------------------------------------------------------
def trainer_of(*flags: str, **more) -> ClassifierTrainer:
    config = config_of("--drop_path 0 --lr 1e-3", *flags)
    torch.manual_seed(0)
    model = Classifier(**config.model_arguments(5))
    optimizer = build_optimizer(model, config.peak_lr, config.betas, config.weight_decay, config.layer_decay)
    state = TrainState(model, more.pop("average", None), optimizer, grad_scaler(None, torch.device("cpu")), updates=5)
    return ClassifierTrainer(config, state, model, torch.device("cpu"), None, 10, **more)


def random_batch(number: int) -> LabelledBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 32, 32, generator=generator)
    return LabelledBatch(images, torch.arange(number) % 5, torch.arange(number), torch.arange(number))
