"""A model as its run begins: sharded, compiled, with its optimiser, its gradients averaged over processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from util.optim.optimizer import build_optimizer
from util.runtime.amp import choose_attention, grad_scaler
from util.runtime.sharding import is_sharded, shard
from util.train.trainer import TrainState


def adamw(model: nn.Module, config: Any) -> Optimizer:
    """Return AdamW with the settings' weight decay and layer decay, for a model that is trained as a whole."""
    return build_optimizer(model, config.peak_lr, config.betas, config.weight_decay, config.layer_decay)


def initial_state(
    model: nn.Module,
    model_ema: nn.Module | None,
    config: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    make_optimizer: Callable[[nn.Module, Any], Optimizer] = adamw,
) -> TrainState:
    """Shard and compile a model where the settings ask for it, and give it its optimiser.

    Args:
        model: on the device already.
        model_ema: a copy that will follow the model, or None.
        dtype: of autocast; None: fp32.
    """
    for each in filter(None, (model, model_ema)):
        choose_attention(each, dtype, device)
    trains = not (config.eval or config.dry_run)
    skeleton = shard(model, model_ema, device) if config.parallel == "fsdp" and trains else None
    optimizer = make_optimizer(model, config)
    for each in filter(None, (model, model_ema)) if not config.dry_run else ():
        transform_blocks(each, config)
    return TrainState(model, model_ema, optimizer, grad_scaler(dtype, device), skeleton=skeleton)


def transform_blocks(model: nn.Module, config: Any) -> None:
    """Apply --checkpoint_activations and --compile to a model in place; names and weights stay as they are."""
    blocks = [block for name in ("blocks", "decoder_blocks") for block in getattr(model, name, ())]
    # shapes are static: an epoch has no short last batch, and evaluations run uncompiled
    if config.checkpoint_activations:
        for block in blocks:
            # the block is compiled inside of the checkpoint: around it nothing would be
            forward = torch.compile(block.forward, dynamic=False) if config.compile == "block" else block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)
    elif config.compile == "block":
        for block in blocks:
            block.compile(dynamic=False)
    if config.compile == "whole":
        if config.checkpoint_activations:
            torch._dynamo.config.optimize_ddp = False  # older versions of torch cannot cut it at DDP's buckets
        model.compile(dynamic=False)


def data_parallel(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """Return the model as the engine calls it: DistributedDataParallel where there are several unsharded processes."""
    if not torch.distributed.is_initialized() or is_sharded(model):
        return model
    # running statistics are the same on every rank already: BatchNorm is synchronised
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # before torch 2.14
    devices = [device] if device.type == "cuda" else None
    static = config.accum_iter == 1  # the same parameters take part each time; no_sync() does not go with it
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, static_graph=static, **{name: False})
