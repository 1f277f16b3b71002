"""Check that this build of torch has kernels for the GPU, before data is read."""

from __future__ import annotations

import re

import torch

from util.runtime.errors import UserError

VOLTA_FIX = "pip install -r requirements.txt -c constraints-volta.txt"


def check_kernels(device: torch.device) -> None:
    """Raise UserError, which names the GPU, the build and the fix, if torch has no kernels for the GPU `device`."""
    built = torch.cuda.get_arch_list()
    if not any(name.startswith("sm_") for name in built):  # a build for AMD
        return
    capability = torch.cuda.get_device_capability(device)
    if any(runs_on(name, capability) for name in built):
        return
    older = capability < min(version_of(name) for name in built if version_of(name))
    fix = VOLTA_FIX if older and capability >= (7, 0) else "use --device cpu" if older else "pip install -U torch"
    raise UserError(
        f"--device {device}: torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}"
        f" (sm_{capability[0]}{capability[1]}), only for {' '.join(built)}: {fix}"
    )


def version_of(name: str) -> tuple[int, int] | None:
    """Return the capability in a name like sm_70 or compute_120; None for sm_90a, which one capability alone runs."""
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)", name)
    return (int(match[1]), int(match[2])) if match else None


def runs_on(name: str, capability: tuple[int, int]) -> bool:
    """True if a GPU runs code built as `name`: sm_XY from XY to X9, compute_XY (PTX) from XY on."""
    built = version_of(name)
    if built is None or built > capability:
        return name.rstrip("af") == f"sm_{capability[0]}{capability[1]}"
    return name.startswith("compute_") or built[0] == capability[0]
