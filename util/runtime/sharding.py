"""Fully sharded data parallelism (torch's FSDP2): each rank keeps a part of every weight, gradient and moment.

A sharded weight is a DTensor. The weights of a block are put together right before it computes and dropped after it.
Checkpoints do not depend on sharding: tensors are put together before they are saved (`unsharded`) and sharded again
after they are loaded (`cut_like`), so a run can resume with any number of processes, sharded or not.
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
    """Raise UserError if --parallel fsdp would not compute the same as ddp."""
    if parallel != "fsdp":
        return
    if dtype == torch.float16:
        raise UserError("--parallel fsdp: has no loss scaling for fp16, use --amp bf16 or fp32")
    if device.type == "cpu" and not CAN_SUM:  # older gloo sums where it is asked for the mean, silently
        raise UserError(f"--parallel fsdp: torch {torch.__version__} does it on GPUs only, use ddp or a newer torch")


def shard(model: nn.Module, follower: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Shard the weights of a model with `blocks`, and of its EMA `follower`, over all ranks in place.

    Build optimisers after this, from the sharded weights. Every rank keeps all buffers.

    Returns:
        The model on the meta device, for `gathered`; None if there is a single process and nothing was sharded.
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
    """True if `shard` has sharded the module."""
    return isinstance(module, FSDPModule)


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which may be empty, or any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def unsharded(state: Any, keep: bool) -> Any:
    """Return nested dicts and lists with every sharded tensor put together on the CPU, one after the other.

    It is a collective. Without `keep` this rank only takes part, and gets None instead of each tensor.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: unsharded(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(unsharded(value, keep) for value in state)
    return state


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard rank 0's tensor as `like` is sharded; return `full` itself if `like` is not. A collective."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def cut_weights(saved: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Shard a state dict of whole tensors as the module's own is sharded."""
    if not is_sharded(module):
        return saved
    own = module.state_dict()
    return {name: cut_like(x, own[name]) if name in own else x for name, x in saved.items()}


def cut_moments(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Shard an optimiser's state dict of whole tensors as its parameters are; counters do not change."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=False))

    def moment(number: int, x: Any) -> Any:
        p = parameters.get(number)
        return cut_like(x, p) if p is not None and isinstance(x, Tensor) and x.shape == p.shape else x

    state = {
        number: {name: moment(number, x) for name, x in moments.items()} for number, moments in saved["state"].items()
    }
    return saved | {"state": state}


def gathered(module: nn.Module, skeleton: nn.Module | None, device: torch.device, keep: bool) -> nn.Module | None:
    """Return a copy with whole weights, whose methods any rank may call alone. A collective.

    Args:
        skeleton: from `shard`; None for a module that is not sharded, which is then returned itself.
        keep: False: this rank only takes part and gets None.
    """
    if skeleton is None:
        return module
    weights = unsharded(module.state_dict(), keep)
    if not keep:
        return None
    built = copy.deepcopy(skeleton)
    built.load_state_dict(weights, assign=True)
    for name, buffer in module.named_buffers():
        if name not in weights:  # not part of the state, like the rates of stochastic depth
            parent, _, leaf = name.rpartition(".")
            setattr(built.get_submodule(parent), leaf, buffer)
    return built.to(device)
