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


def world_size() -> int:
    """Number of processes, known from the launcher before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def choose_device(name: str) -> torch.device:
    """The device of this process; `auto` is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no device has that name, use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is of no use here, use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable GPU, use --device cpu")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and device.index is not None and device.index >= gpus:
        raise UserError(f"--device {name}: this machine has {gpus} GPUs, counted from 0")
    if device.type == "cuda" and device.index is None:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if gpus == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
            local_rank = 0  # a site that binds each task to a GPU of its own shows it no other
        if local_rank >= gpus:
            raise UserError(f"--nproc_per_node: process {local_rank} has no GPU, this machine has {gpus}")
        device = torch.device("cuda", local_rank)
    if device.type == "cuda":
        check_kernels(device)
    return device


@dataclass(frozen=True)
class Processes:
    """The process group as `start_processes` found or made it."""

    rank: int
    world_size: int
    device: torch.device


def start_processes(device_name: str, backend: str = "auto", timeout_minutes: float = 30) -> Processes:
    """Join the other processes where a launcher (torchrun) says that there are any."""
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
    """The sum of all ranks' x, which is overwritten."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows [W*N, D] of all ranks' x [N, D], without gradient, and the place of this rank's first one."""
    if not dist.is_initialized():
        return x.detach(), 0
    rows = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    _gather(rows, x.detach().contiguous())
    return rows, dist.get_rank() * len(x)


def from_all_ranks(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank gives, small and of any type, by rank; `group`: of all of them, another than the default one."""
    if not dist.is_initialized():
        return [item]
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, item, group=group)
    return everybody


def patient_group() -> dist.ProcessGroup | None:
    """All ranks, for what may take one of them hours: the default group gives up after half an hour."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None


def any_rank(flag: Tensor) -> bool:
    """Whether the 0-dim bool is true on any rank; waits for the device."""
    flag = flag.float()
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def main_says(flag: bool, device: torch.device) -> bool:
    """Rank 0's flag, on all ranks together; `device`: the one that this rank computes on."""
    return any_rank(torch.tensor(flag and is_main(), device=device))


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of which each rank has a copy; the sharded ones are left out."""
    return {name: x for name, x in module.state_dict().items() if not isinstance(x, DTensor)}


def broadcast_module(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if dist.is_initialized():
        for tensor in replicated(module).values():
            dist.broadcast(tensor, src=0)


def checksum(x: Tensor) -> Tensor:
    """A number, int64, that tells tensors with other bits or another order apart."""
    bits = x.detach().contiguous().flatten().view(torch.int32 if x.element_size() >= 4 else torch.uint8).long()
    return (bits * torch.arange(1, len(bits) + 1, device=x.device)).sum()  # wraps, alike on every rank


def check_in_sync(module: nn.Module, name: str) -> None:
    """RuntimeError unless all ranks hold the same weights: ranks that drift apart train nothing useful."""
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


class _OfAllRanks(torch.autograd.Function):
    """x [N, D] of each rank as [W*N, D], whose gradient is the sum of what all ranks ask of this one's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather_rows(x)[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all ranks, on any device; one collective forward and one backward.

    torch.nn.SyncBatchNorm refuses CPU tensors, and on GPUs it makes the host wait for the device in each forward pass.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Vectors and feature maps alike."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] or [B, D, H, W] to the same shape; the same shape on every rank."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.normalise(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def normalise(self, x: Tensor) -> Tensor:
        """The same in fp32, with the statistics of all ranks, which go into the running ones."""
        rows = (0, *range(2, x.ndim))  # all but the features
        count = x.numel() // x.shape[1] * dist.get_world_size()

        def spread(of_features: Tensor) -> Tensor:
            return of_features.view(-1, *[1] * (x.ndim - 2))

        own = torch.var_mean(x, rows, correction=0)
        variances, means = _OfAllRanks.apply(torch.stack(own)).view(-1, 2, x.shape[1]).unbind(1)  # [W, D] each
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, as BatchNorm keeps it
        x = (x - spread(mean)) * spread((var + self.eps).rsqrt())
        return x * spread(self.weight) + spread(self.bias) if self.affine else x


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm see the batches of all ranks; a single process keeps plain BatchNorm.

    Feature maps on GPUs get torch's: for those its fused kernels save more than its waiting costs.
    """
    if world_size() == 1:
        return model
    of_maps = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    kinds = {nn.BatchNorm1d: SyncBatchNorm, nn.BatchNorm2d: of_maps}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in kinds:
                synced = kinds[type(child)](child.num_features, child.eps, child.momentum, child.affine)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)
    return model
