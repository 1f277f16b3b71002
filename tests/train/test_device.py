"""Whether all tensors of an update lie on the GPU, seen without one: device `meta`, whose tensors hold no numbers."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

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
from util.data.device_views import Normalise, apply_photometry_rows, photometry_row
from util.data.labelled import LabelledBatch
from util.data.masked_samples import MaskedBatch
from util.data.samples import Batch, DrawnBatch
from util.data.views import TwoViews
from util.optim import optimizer as optim
from util.optim.optimizer import build_lars, build_optimizer
from util.train.pretraining import build_state
from util.train.state import TrainState
from util.train.trainer import Trainer

GPU = torch.device("meta")
MIXES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


class OneDevice(TorchDispatchMode):
    """An operation whose tensors lie on several devices is an error, as on a GPU: `meta` itself is lenient."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor) and x.ndim]
        devices = {x.device.type for x in tensors}
        assert len(devices) < 2 or func.overloadpacket in MIXES, f"{func} of tensors on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(optim, "AdamW", lambda groups, **rest: AdamW(groups, **rest | {"fused": False}))
    monkeypatch.setattr(Trainer, "autocast", lambda trainer: contextlib.nullcontext())
    with OneDevice():
        yield


def update(trainer, batches):
    """One update; every tensor of the models lies on the GPU."""
    for model in filter(None, (trainer.state.model, trainer.state.model_ema)):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    trainer.update([trainer.batch_to_device(batch) for batch in batches])
    assert trainer.state.updates == 1


def state_of(model, optimizer, average=None):
    return TrainState(model, average, optimizer, torch.amp.GradScaler("cuda", enabled=False))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--alpha 0",
        "--views symmetric --clip_grad 1",
        "--distance infonce --accum_iter 2",
        "--supervision both --shared_crop",
        "--context_token cls --context_mask_ratio 0.5",
        "--w_mim 0",
        "--method simmim --alpha 0.25",
    ],
)
def test_pretraining(flags):
    tiny = TINY.replace("--decoder_depth 1", "") if "simmim" in flags else TINY
    config = parse_config(PretrainConfig, f"{tiny} --data_path x {flags}".split(), "main_pretrain.py")
    state, _ = build_state(config, None, GPU)
    trainer = build_trainer(config, state, None, GPU, updates_per_epoch=10)
    views = torch.zeros(8, 2, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(views, torch.rand(8, 16), torch.arange(8), torch.arange(8))
    update(trainer, [batch] * config.accum_iter)
    images = torch.zeros(2, 3, 32, 32, device=GPU)
    assert state.model.features(images).device.type == "meta"
    if state.model.reconstructs:  # a picture of the monitor
        assert {x.device.type for x in state.model.reconstruct(images, torch.rand(2, 16).to(GPU))} == {"meta"}


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_views_of_images_on_the_device(crop):
    flags = f"{TINY} --data_path x --cache device --augment_on device --crop {crop} --no_photometric"
    config = parse_config(PretrainConfig, flags.split(), "main_pretrain.py")
    state, _ = build_state(config, None, GPU)
    trainer = build_trainer(config, state, None, GPU, updates_per_epoch=10)
    pixels, starts = torch.zeros(8 * 3 * 40 * 50, dtype=torch.uint8), torch.arange(8)
    cached = CachedImages(None, pixels, starts, torch.zeros(8, 2, dtype=torch.int64), in_chans=3, bad={})
    trainer.images = cached.to(GPU)
    drawn = (torch.zeros(8, 2, 5, dtype=torch.int64), torch.rand(8, 16), torch.arange(8), torch.arange(8))
    update(trainer, [DrawnBatch(*drawn, torch.empty(8, 0))])


def test_photometry_on_the_device():
    draws = [TwoViews((32, 32)).draw((40, 50), np.random.default_rng(seed)).photometry for seed in range(64)]
    rows = torch.tensor([photometry_row(draw) for draw in draws])
    assert {int(row[8]) for row in rows} == {0, 1, 2}  # each of the branches
    changed = apply_photometry_rows(torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device=GPU), rows)
    assert (changed.device.type, changed.dtype, changed.shape) == ("meta", torch.uint8, (64, 3, 32, 32))


def test_finetuning_with_mixup_and_moving_average():
    flags = f"{TINY_CLASSIFIER} --data_path x --mixup 0.8 --cutmix 1.0 --drop_path 0.1"
    config = parse_config(FinetuneConfig, flags.split(), "main_finetune.py")
    model = Classifier(**config.model_arguments(4)).to(GPU)
    state = state_of(model, build_optimizer(model, 1e-3, (0.9, 0.99), 0.05, 0.65), copy.deepcopy(model))
    mix = Mixup(**config.mixup_arguments(4))
    trainer = ClassifierTrainer(config, state, model, GPU, None, 10, mix=mix, ema_decay=0.9)
    update(trainer, [LabelledBatch(torch.zeros(8, 3, 32, 32), *[torch.zeros(8, dtype=torch.int64)] * 3)])


def test_linear_probing():
    config = parse_config(LinprobeConfig, f"{TINY_CLASSIFIER} --data_path x".split(), "main_linprobe.py")
    model = LinearProbe(**config.model_arguments(4)).to(GPU)
    trainer = ClassifierTrainer(config, state_of(model, build_lars(model, 0.1, 0.0)), model, GPU, None, 10)
    update(trainer, [LabelledBatch(torch.zeros(8, 3, 32, 32), *[torch.zeros(8, dtype=torch.int64)] * 3)])


def test_segmentation():
    config = parse_config(SegmentConfig, f"{TINY_SEGMENTER} --data_path x".split(), "main_segment.py")
    model = UperNet(**config.model_arguments(4)).to(GPU)
    state = state_of(model, build_optimizer(model, 1e-3, (0.9, 0.99), 0.05, 0.65))
    normalise = Normalise(config.resolved_mean, config.resolved_std, GPU)
    trainer = SegmenterTrainer(config, state, model, GPU, None, 10, normalise=normalise)
    images, masks = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 32, 32, dtype=torch.uint8)
    update(trainer, [MaskedBatch(images, masks, *[torch.arange(4)] * 2)])
