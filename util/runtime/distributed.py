"""Processes: start-up under torchrun, SLURM or alone, and the few collectives that we need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from util.runtime.errors import UserError
from util.runtime.kernels import check_kernels
from util.runtime.stop import end_with_launcher

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.14


LAUNCHERS = "start several processes with torchrun or scripts/submit.py; for one process unset"


def launcher_number(variable: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    """Return the number that a launcher has put into a variable of the environment.

    Raises:
        UserError: it is no number of that range, for example because another job left it there.
    """
    text = os.environ.get(variable, str(default))
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"{variable}={text} in the environment: must be a number from {least}; {LAUNCHERS} {variable}")
    return number


def world_size() -> int:
    """Return the number of processes, which the launcher gives before the process group exists."""
    return launcher_number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Return this process's number, 0 to world_size() - 1."""
    return launcher_number("RANK", 0, least=0)


def check_launcher() -> None:
    """Raise UserError that names the variable if the environment holds a part of what a launcher sets, or nonsense."""
    launcher_number("LOCAL_RANK", 0, least=0)
    launcher_number("MASTER_PORT", 29500, least=1, most=65535)
    number, processes = rank(), world_size()
    if number >= processes:
        where = f"RANK={number} in the environment"
        raise UserError(f"{where}: but WORLD_SIZE={processes}; {LAUNCHERS} RANK")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if processes > 1 and missing and not dist.is_initialized():
        where = f"WORLD_SIZE={processes} in the environment"
        raise UserError(f"{where}: without {' and '.join(missing)}; {LAUNCHERS} WORLD_SIZE")


def is_main() -> bool:
    """True on the one process that prints and writes, rank 0."""
    return rank() == 0


def choose_device(name: str) -> torch.device:
    """Return the device of this process; `auto` is cuda if there is one, else cpu.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no device has that name, use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is not supported, use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable GPU, use --device cpu")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and device.index is not None and device.index >= gpus:
        raise UserError(f"--device {name}: this machine has {gpus} GPUs, counted from 0")
    if device.type == "cuda" and device.index is None:
        local_rank = launcher_number("LOCAL_RANK", 0, least=0)
        if gpus == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
            local_rank = 0  # the cluster shows each task only its own GPU
        if local_rank >= gpus:
            raise UserError(f"--nproc_per_node: process {local_rank} has no GPU, this machine has {gpus}")
        device = torch.device("cuda", local_rank)
    if device.type == "cuda":
        check_kernels(device)
    return device


@dataclass(frozen=True)
class Processes:
    """This process's place in the process group, and its device."""

    rank: int
    world_size: int
    device: torch.device


def start_processes(device_name: str, backend: str = "auto", timeout_minutes: float = 30) -> Processes:
    """Join the other processes if a launcher (torchrun, scripts/submit.py) has started several.

    Raises:
        UserError: the launcher's variables, the device or the backend cannot be used.
    """
    check_launcher()
    end_with_launcher()
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise UserError(f"--dist_backend {backend}: not in this build of torch, use auto, nccl or gloo")
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Processes(rank(), world_size(), device)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Overwrite x with the sum of all ranks' x and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows [W*N, D] of all ranks' x [N, D], without gradient, and the index of this rank's first row."""
    if not dist.is_initialized():
        return x.detach(), 0
    rows = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    _gather(rows, x.detach().contiguous())
    return rows, dist.get_rank() * len(x)


def from_all_ranks(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather a small picklable item of each rank, in the order of the ranks.

    Args:
        group: a group of all ranks to use instead of the default one.
    """
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=group)
    return items


def check_same_on_all_ranks(facts: dict[str, str | int | float]) -> None:
    """Compare what all ranks must have in common (images, classes, seed, learning rate ...); a collective.

    Args:
        facts: short values by name; of data sets and models, a fingerprint.

    Raises:
        UserError: on all ranks together; it names the first fact that differs, both values and their ranks.
    """
    gathered = from_all_ranks(dict(facts))
    for name in dict.fromkeys(name for each in gathered for name in each):
        values = [each.get(name, "missing") for each in gathered]
        other = next((number for number, value in enumerate(values) if repr(value) != repr(values[0])), None)
        if other is not None:
            raise UserError(
                f"{name}: is {values[0]} on rank 0 but {values[other]} on rank {other};"
                " all processes need the same command, data and code"
            )


def patient_group() -> dist.ProcessGroup | None:
    """Make a group of all ranks for work that may take one of them hours; the default one gives up after 30 minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None


def any_rank(flag: Tensor) -> bool:
    """Return whether the 0-dim bool is true on any rank; it waits for the device."""
    flag = flag.float()
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def main_says(flag: bool, device: torch.device) -> bool:
    """Return rank 0's flag on all ranks; a collective. `device` is the one that this rank computes on."""
    return any_rank(torch.tensor(flag and is_main(), device=device))


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of which each rank has a copy, without the sharded ones."""
    return {name: x for name, x in module.state_dict().items() if not isinstance(x, DTensor)}


def broadcast_module(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if dist.is_initialized():
        for tensor in replicated(module).values():
            dist.broadcast(tensor, src=0)


def checksum(x: Tensor) -> Tensor:
    """Return an int64 that differs between tensors with other bits or another order."""
    bits = x.detach().contiguous().flatten().view(torch.int32 if x.element_size() >= 4 else torch.uint8).long()
    return (bits * torch.arange(1, len(bits) + 1, device=x.device)).sum()  # wraps, alike on every rank


def check_in_sync(module: nn.Module, name: str) -> None:
    """Raise RuntimeError unless all ranks hold the same weights: ranks that drift apart train nothing useful."""
    tensors = replicated(module)
    if not dist.is_initialized() or not tensors:
        return
    sums = torch.stack([checksum(x) for x in tensors.values()])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        drifted = [key for key, same in zip(tensors, (least == most).tolist(), strict=True) if not same]
        raise RuntimeError(f"the {name} differs between ranks, first in {drifted[0]}")


# --------------------------------------------------------------------------------------------------------
# BatchNorm over all processes
# --------------------------------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    """Gather x [N, D] of each rank to [W*N, D]; the gradient of a rank's rows is summed over all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather_rows(x)[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all ranks, on any device, with one collective forward and one backward.

    torch.nn.SyncBatchNorm refuses CPU tensors, and on GPUs it makes the host wait for the device in each forward pass.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept vectors and feature maps alike."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, D] or [B, D, H, W]; the shape is the same on every rank."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.normalise(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise x in fp32 by the statistics of all ranks, and update the running ones with them."""
        rows = (0, *range(2, x.ndim))  # all but the features
        count = x.numel() // x.shape[1] * dist.get_world_size()

        def spread(per_feature: Tensor) -> Tensor:
            return per_feature.view(-1, *[1] * (x.ndim - 2))

        own = torch.var_mean(x, rows, correction=0)
        variances, means = _GatherRows.apply(torch.stack(own)).view(-1, 2, x.shape[1]).unbind(1)  # [W, D] each
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, as BatchNorm keeps it
        x = (x - spread(mean)) * spread((var + self.eps).rsqrt())
        return x * spread(self.weight) + spread(self.bias) if self.affine else x


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm by one over the batches of all ranks; a single process keeps plain BatchNorm.

    Feature maps on GPUs get torch's SyncBatchNorm: its fused kernels save more there than its waiting costs.
    """
    if world_size() == 1:
        return model
    for_maps = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    kinds = {nn.BatchNorm1d: SyncBatchNorm, nn.BatchNorm2d: for_maps}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in kinds:
                synced = kinds[type(child)](child.num_features, child.eps, child.momentum, child.affine)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)
    return model
