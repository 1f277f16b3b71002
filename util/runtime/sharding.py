"""Fully sharded data parallelism (torch's FSDP2): each rank keeps a part of every weight, gradient and moment.

A sharded weight is a DTensor. The weights of a block are put together right before it computes and dropped after it.
Files do not know of all this: what is saved was made whole before (`whole`), and what is loaded is cut anew
(`cut_like`), so that a checkpoint goes on with any number of processes, sharded or not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from util.runtime.distributed import broadcast_module
from util.runtime.errors import UserError

CAN_SUM = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")


def check_sharding(parallel: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """UserError where --parallel fsdp would not compute the same as ddp."""
    if parallel != "fsdp":
        return
    if dtype == torch.float16:
        raise UserError("--parallel fsdp: has no loss scaling for fp16, use --amp bf16 or fp32")
    if device.type == "cpu" and not CAN_SUM:  # older gloo adds up where it is asked for the mean, and does not say so
        raise UserError(f"--parallel fsdp: torch {torch.__version__} does it on GPUs only, use ddp or a newer torch")


def shard(model: nn.Module, follower: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Cut the weights of a model with `blocks`, and of what follows it, over all ranks, in place.

    Optimisers are to be built after this, from the sharded weights. Buffers stay whole on every rank.

    Returns:
        The model without numbers, for `gathered`; None where one process is all there is, and nothing was cut.
    """
    if not dist.is_initialized():
        return None
    skeleton = copy.deepcopy(model).to("meta")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (model, follower):
        if module is None:
            continue
        broadcast_module(module)
        for part in [*module.blocks, *getattr(module, "decoder_blocks", ()), module]:
            fully_shard(part, mesh=mesh)
            if device.type == "cpu":
                part.set_force_sum_reduction_for_comms(True)
        if not any(p.requires_grad for p in module.parameters()):  # else the backward pass would do it
            module.register_forward_hook(lambda module, *_: module.reshard())
    return skeleton


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut it."""
    return isinstance(module, FSDPModule)


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, which may be empty; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def whole(state: Any, keep: bool) -> Any:
    """Nested dicts and lists with every sharded tensor put together on the CPU, one after the other.

    A collective: for all ranks together. Without `keep` this rank only takes part, and gets None in their place.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value, keep) for value in state)
    return state


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is, rank 0's numbers; `full` itself where `like` is not sharded. A collective."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def cut_weights(saved: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors, cut as the module's own."""
    if not is_sharded(module):
        return saved
    own = module.state_dict()
    return {name: cut_like(x, own[name]) if name in own else x for name, x in saved.items()}


def cut_moments(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state dict of whole tensors, cut as its parameters; counters stay as they are."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=False))

    def moment(number: int, x: Any) -> Any:
        p = parameters.get(number)
        return cut_like(x, p) if p is not None and isinstance(x, Tensor) and x.shape == p.shape else x

    state = {number: {name: moment(number, x) for name, x in kept.items()} for number, kept in saved["state"].items()}
    return saved | {"state": state}


def gathered(module: nn.Module, skeleton: nn.Module | None, device: torch.device, keep: bool) -> nn.Module | None:
    """A copy with whole weights, any method of which may be called, by any rank alone.

    A collective. `skeleton` is what `shard` gave; a module that is not sharded has none, and is given back itself.
    Without `keep` this rank takes part and gets None.
    """
    if skeleton is None:
        return module
    weights = whole(module.state_dict(), keep)
    if not keep:
        return None
    built = copy.deepcopy(skeleton)
    built.load_state_dict(weights, assign=True)
    for name, buffer in module.named_buffers():
        if name not in weights:  # no part of the state, as rates of stochastic depth
            parent, _, leaf = name.rpartition(".")
            setattr(built.get_submodule(parent), leaf, buffer)
    return built.to(device)
