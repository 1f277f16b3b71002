"""Trainers and batches of tiny models on device `meta`, whose tensors have shapes and no numbers: a GPU's stand-in."""

from __future__ import annotations

import contextlib
import copy

import torch
from timm.data import Mixup
from torch.optim import AdamW

from engine_finetune import ClassifierTrainer
from engine_pretrain import build_trainer
from engine_segment import SegmenterTrainer
from models_upernet import UperNet
from models_vit import Classifier, LinearProbe
from shared.flags import TINY, TINY_CLASSIFIER, TINY_SEGMENTER
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.data.cache import CachedImages
from util.data.labelled import LabelledBatch
from util.data.masked_samples import MaskedBatch
from util.data.samples import Batch, DrawnBatch
from util.data.views import Normalise
from util.optim import optimizer as optim
from util.optim.optimizer import build_lars, build_optimizer
from util.train.pretraining import build_state
from util.train.trainer import Trainer, TrainState

GPU = torch.device("meta")


def allow_meta(monkeypatch) -> None:
    """Leave out what knows no meta tensors: fused AdamW and autocast."""
    monkeypatch.setattr(optim, "AdamW", lambda groups, **rest: AdamW(groups, **rest | {"fused": False}))
    monkeypatch.setattr(Trainer, "autocast", lambda trainer: contextlib.nullcontext())


def state_of(model, optimizer, average=None):
    return TrainState(model, average, optimizer, torch.amp.GradScaler("cuda", enabled=False))


def pretraining(flags=""):
    """Return a trainer and the batches of an update."""
    tiny = TINY.replace("--decoder_depth 1", "") if "simmim" in flags else TINY
    config = parse_config(PretrainConfig, f"{tiny} --data_path x {flags}".split(), "main_pretrain.py")
    state, _ = build_state(config, None, GPU)
    trainer = build_trainer(config, state, None, GPU, updates_per_epoch=10)
    views = torch.zeros(8, 2, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(views, torch.rand(8, 16), torch.arange(8), torch.arange(8))
    return trainer, [batch] * config.accum_iter


def pretraining_from_images_on_the_device(crop):
    """Return a trainer with --cache device and the batches of an update."""
    flags = f"{TINY} --data_path x --cache device --augment_on device --crop {crop} --no_photometric"
    config = parse_config(PretrainConfig, flags.split(), "main_pretrain.py")
    state, _ = build_state(config, None, GPU)
    trainer = build_trainer(config, state, None, GPU, updates_per_epoch=10)
    pixels, starts = torch.zeros(8 * 3 * 40 * 50, dtype=torch.uint8), torch.arange(8)
    cached = CachedImages(None, pixels, starts, torch.zeros(8, 2, dtype=torch.int64), in_chans=3, bad={})
    trainer.images = cached.to(GPU)
    drawn = (torch.zeros(8, 2, 5, dtype=torch.int64), torch.rand(8, 16), torch.arange(8), torch.arange(8))
    return trainer, [DrawnBatch(*drawn, torch.empty(8, 0))]


def finetuning():
    """Return a trainer with Mixup and a moving average, and the batches of an update."""
    flags = f"{TINY_CLASSIFIER} --data_path x --mixup 0.8 --cutmix 1.0 --drop_path 0.1"
    config = parse_config(FinetuneConfig, flags.split(), "main_finetune.py")
    model = Classifier(**config.model_arguments(4)).to(GPU)
    state = state_of(model, build_optimizer(model, 1e-3, (0.9, 0.99), 0.05, 0.65), copy.deepcopy(model))
    mix = Mixup(**config.mixup_arguments(4))
    trainer = ClassifierTrainer(config, state, model, GPU, None, 10, mix=mix, ema_decay=0.9)
    return trainer, [LabelledBatch(torch.zeros(8, 3, 32, 32), *[torch.zeros(8, dtype=torch.int64)] * 3)]


def linear_probing():
    """Return a trainer and the batches of an update."""
    config = parse_config(LinprobeConfig, f"{TINY_CLASSIFIER} --data_path x".split(), "main_linprobe.py")
    model = LinearProbe(**config.model_arguments(4)).to(GPU)
    trainer = ClassifierTrainer(config, state_of(model, build_lars(model, 0.1, 0.0)), model, GPU, None, 10)
    return trainer, [LabelledBatch(torch.zeros(8, 3, 32, 32), *[torch.zeros(8, dtype=torch.int64)] * 3)]


def segmentation():
    """Return a trainer and the batches of an update."""
    config = parse_config(SegmentConfig, f"{TINY_SEGMENTER} --data_path x".split(), "main_segment.py")
    model = UperNet(**config.model_arguments(4)).to(GPU)
    state = state_of(model, build_optimizer(model, 1e-3, (0.9, 0.99), 0.05, 0.65))
    normalise = Normalise(config.resolved_mean, config.resolved_std, GPU)
    trainer = SegmenterTrainer(config, state, model, GPU, None, 10, normalise=normalise)
    images, masks = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 32, 32, dtype=torch.uint8)
    return trainer, [MaskedBatch(images, masks, *[torch.arange(4)] * 2)]
