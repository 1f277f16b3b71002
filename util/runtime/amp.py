"""Mixed precision: the type that a device computes in, and the loss scaler that fp16 needs."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention
from torch import nn

from util.runtime.errors import UserError


def computes_in_bf16(device: torch.device) -> bool:
    """True if the device computes in bf16 natively; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        flags = cpu_flags()
        return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is Arm's
    return False


def cpu_flags() -> set[str]:
    """Return the processor's instruction sets by the kernel's names; empty if the kernel does not list them."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the type for autocast, None for plain fp32.

    Raises:
        UserError: the device cannot compute in the type that was asked for.
    """
    if amp == "auto":
        if computes_in_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else None
    if amp == "bf16" and not computes_in_bf16(device):
        raise UserError(f"--amp bf16: {describe(device)} does not compute in bf16, use --amp auto")
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16: needs a GPU, this is {describe(device)}; use --amp auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[amp]


def name_of(dtype: torch.dtype | None) -> str:
    """Return the name that --amp has for a type of autocast (None: fp32)."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[dtype]


def choose_attention(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Choose the faster attention in place: PyTorch's fused kernel, except for bf16 on a CPU.

    There the backward pass of a block takes 1.2 to 3.5 times as long with the fused kernel as with separate products
    and softmax (docs/RESULTS.md).
    """
    fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def describe(device: torch.device) -> str:
    """Return a device's name for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def grad_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler of the loss for fp16; for every other type it changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
