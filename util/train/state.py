"""A model as its run begins: what training changes, sharding, compilation, and gradients averaged over processes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from util.optim.optimizer import build_optimizer
from util.runtime.amp import choose_attention, grad_scaler
from util.runtime.distributed import is_main
from util.runtime.sharding import cut_moments, cut_weights, gathered, is_sharded, shard, unsharded

EMA_PREFIX = "ema."  # of the names in a checkpoint's `model_ema`, as LUT's release writes them


@dataclass
class TrainState:
    """Everything that training changes, and so everything that a checkpoint must hold.

    There is no generator state: every random draw is a function of (seed, epoch, sample) or of (seed, update, rank).
    """

    model: nn.Module
    model_ema: nn.Module | None  # EMA of the model: the momentum encoder, or the average of a classifier's weights
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    updates: int = 0  # optimiser steps of the whole run so far
    best_metric: float | None = None  # the highest metric of all evaluations; known to rank 0
    skeleton: nn.Module | None = None  # with --parallel fsdp: the model on the meta device, see `gathered`

    def state_dict(self) -> dict[str, Any]:
        """Return MAE's layout: `model`, `model_ema` with keys prefixed `ema.`, `optimizer`, `scaler`.

        A collective: all ranks call it, and sharded tensors are gathered on rank 0.
        """
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "best_metric": self.best_metric,
        }
        if self.model_ema is not None:
            state["model_ema"] = {EMA_PREFIX + name: x for name, x in self.model_ema.state_dict().items()}
        return state if self.skeleton is None else unsharded(state, keep=is_main())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Missing and unexpected names raise an error."""
        self.model.load_state_dict(cut_weights(state["model"], self.model))
        self.optimizer.load_state_dict(cut_moments(state["optimizer"], self.optimizer))
        if bool(state["scaler"]) == self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        elif is_main():  # --amp auto on another kind of device
            now, before = ("fp16", "another precision") if self.scaler.is_enabled() else ("another precision", "fp16")
            print(f"WARNING: --amp: the run used {before} until now and uses {now} from here on", file=sys.stderr)
        self.updates = state["updates"]
        self.best_metric = state.get("best_metric")
        if self.model_ema is not None:
            averages = {name.removeprefix(EMA_PREFIX): x for name, x in state["model_ema"].items()}
            self.model_ema.load_state_dict(cut_weights(averages, self.model_ema))

    def record_metric(self, metric: float | None) -> None:
        """Keep the highest metric, by which the best checkpoint is chosen."""
        if metric is not None:
            self.best_metric = metric if self.best_metric is None else max(self.best_metric, metric)

    def unsharded(self, module: nn.Module, device: torch.device, keep: bool = True) -> nn.Module | None:
        """Return the model or its EMA with whole weights, for any method and for one rank alone; see `gathered`."""
        return gathered(module, self.skeleton, device, keep)


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
