"""A GPU that the build of torch has no kernels for ends the start in one line."""

from __future__ import annotations

import pytest
import torch

from util.runtime.distributed import choose_device
from util.runtime.errors import UserError

NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
VOLTA = ["sm_70", "sm_75", "sm_80", "sm_90"]


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of this capability, and that torch was built for these."""

    def pretend(capability: tuple[int, int], built: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)

    return pretend


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 0), VOLTA),
        ((8, 9), VOLTA),  # sm_80 runs on all 8.x
        ((9, 0), ["sm_90a"]),
        ((13, 0), NEW),  # compiled from PTX by the driver
        ((9, 4), ["gfx90a", "gfx942"]),  # AMD
    ],
)
def test_a_gpu_with_kernels(gpu, capability, built):
    gpu(capability, built)
    assert choose_device("auto") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "built", "fix"),
    [
        ((7, 0), NEW, "pip install -r requirements.txt -c constraints-volta.txt"),
        ((6, 1), NEW, "use --device cpu"),
        ((13, 0), VOLTA, "pip install -U torch"),
        ((9, 1), ["sm_80", "sm_90a"], "pip install -U torch"),
    ],
)
def test_a_gpu_without_kernels_is_one_line_that_names_gpu_build_and_fix(gpu, capability, built, fix):
    gpu(capability, built)
    with pytest.raises(UserError) as error:
        choose_device("auto")
    message = str(error.value)
    name = f"sm_{capability[0]}{capability[1]}"
    assert message.startswith(f"--device cuda:0: torch {torch.__version__} has no kernels for Tesla V100 ({name})")
    assert " ".join(built) in message
    assert message.endswith(fix)
    assert "\n" not in message
