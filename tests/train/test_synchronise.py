"""No operation of an update makes the host wait for the GPU, seen without one: device `meta` stands for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared import meta_updates
from shared.meta_updates import allow_meta
from util.train.trainer import Trainer

# their results, or the shapes of these, depend on the numbers of a tensor
READS_NUMBERS = (
    *("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "bincount", "histc"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave", "histogram"),
)
INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")  # a mask among the indices is a nonzero
COPIES = ("_to_copy", "copy_")


class SynchronisationError(Exception):
    """An operation made the host wait for the device."""


class NoSynchronisation(TorchDispatchMode):
    """Raise at each operation for which CUDA makes the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device.type == "meta"]
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        if on_device and (name in READS_NUMBERS or (name in INDEXES and masks)):
            raise SynchronisationError(name)
        if name in COPIES:
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
            target = source.device if target is None else target
            if source.device.type == "meta" and target.type == "cpu":
                raise SynchronisationError("copy to the host")
        return func(*args, **kwargs)


UPDATES: dict[str, Callable] = {
    "LUT, paper": lambda: meta_updates.pretraining("--clip_grad 1"),
    "LUT, release": lambda: meta_updates.pretraining("--views symmetric"),
    "LUT, InfoNCE in two parts": lambda: meta_updates.pretraining("--distance infonce --accum_iter 2"),
    "MAE": lambda: meta_updates.pretraining("--alpha 0"),
    "SimMIM": lambda: meta_updates.pretraining("--method simmim --alpha 0.25"),
    "cached on the device": lambda: meta_updates.pretraining_from_images_on_the_device("src"),
    "finetune": meta_updates.finetuning,
    "linprobe": meta_updates.linear_probing,
    "segment": meta_updates.segmentation,
}


def update(name: str) -> None:
    trainer, batches = UPDATES[name]()
    with NoSynchronisation():
        trainer.update([trainer.batch_to_device(batch) for batch in batches])
    assert trainer.state.updates == 1


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_makes_the_host_wait_for_nothing(monkeypatch, name):
    allow_meta(monkeypatch)
    update(name)


PLANTED = {
    "_local_scalar_dense": lambda loss: loss.item(),
    "copy to the host of a list": lambda loss: loss.tolist(),
    "_local_scalar_dense of a condition": lambda loss: bool(loss > 0),
    "nonzero": lambda loss: loss.view(1).nonzero(),
    "index": lambda loss: loss.view(1)[loss.view(1) > 0],
    "index_put_": lambda loss: loss.clone().view(1).index_put_((loss.view(1) > 0,), loss),
    "copy to the host": lambda loss: loss.cpu(),
}


@pytest.mark.parametrize("operation", PLANTED)
@pytest.mark.parametrize("name", ["LUT, paper", "finetune", "segment"])
def test_an_operation_that_waits_is_found_where_it_stands(monkeypatch, name, operation):
    allow_meta(monkeypatch)

    def record(trainer, **losses):
        PLANTED[operation](next(iter(losses.values())).detach())

    monkeypatch.setattr(Trainer, "record", record)
    with pytest.raises(SynchronisationError) as error:
        update(name)
    assert str(error.value) == operation.partition(" of ")[0]
    assert "record" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
