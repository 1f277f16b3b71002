"""Check without a GPU that all tensors of an update lie on it: on device `meta`, whose tensors hold no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shared import meta_updates
from shared.meta_updates import GPU, allow_meta
from util.data.device_views import apply_photometry_rows, photometry_row
from util.data.views import TwoViews

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
    allow_meta(monkeypatch)
    with OneDevice():
        yield


def update(trainer, batches):
    """Make one update; every tensor of the models lies on the GPU."""
    for model in filter(None, (trainer.state.model, trainer.state.model_ema)):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    trainer.update([trainer.batch_to_device(batch) for batch in batches])
    assert trainer.state.updates == 1


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
    trainer, batches = meta_updates.pretraining(flags)
    update(trainer, batches)
    images = torch.zeros(2, 3, 32, 32, device=GPU)
    model = trainer.state.model
    assert model.features(images).device.type == "meta"
    if model.reconstructs:  # a picture of the monitor
        assert {x.device.type for x in model.reconstruct(images, torch.rand(2, 16).to(GPU))} == {"meta"}


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_views_of_images_on_the_device(crop):
    update(*meta_updates.pretraining_from_images_on_the_device(crop))


def test_photometry_on_the_device():
    draws = [TwoViews((32, 32)).draw((40, 50), np.random.default_rng(seed)).photometry for seed in range(64)]
    rows = torch.tensor([photometry_row(draw) for draw in draws])
    assert {int(row[8]) for row in rows} == {0, 1, 2}  # each of the branches
    changed = apply_photometry_rows(torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device=GPU), rows)
    assert (changed.device.type, changed.dtype, changed.shape) == ("meta", torch.uint8, (64, 3, 32, 32))


@pytest.mark.parametrize("stage", ["finetuning", "linear_probing", "segmentation"])
def test_downstream(stage):
    update(*getattr(meta_updates, stage)())
