"""The distances of Table 4d against their definitions, and InfoNCE in two processes against one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.ranks import in_two_processes
from shared.slow_losses import slow_cosine, slow_infonce, slow_smooth_l1
from util.optim.losses import cosine_distance, infonce, smooth_l1_distance

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.3, 1, 20])
def test_distances_are_their_definitions(scale):
    x, y = scale * numbers(2, 7, 5)
    assert cosine_distance(x, y).item() == pytest.approx(slow_cosine(x, y), rel=1e-5)
    assert smooth_l1_distance(x, y).item() == pytest.approx(slow_smooth_l1(x, y), rel=1e-5)
    for temperature in (0.1, 0.2, 1.0):
        assert infonce(x, y, temperature).item() == pytest.approx(slow_infonce(x, y, temperature), rel=1e-5)


def test_infonce_of_one_direction_knows_nothing_and_of_its_own_target_all():
    x = numbers(8, 5)
    assert infonce(x, torch.ones(8, 5)).item() == pytest.approx(math.log(8), rel=1e-5)
    assert infonce(torch.eye(8), 3 * torch.eye(8), 0.01).item() == pytest.approx(0, abs=1e-6)


def test_infonce_takes_further_targets_as_negatives_alone():
    x, y = numbers(2, 7, 5)
    losses = [infonce(x[i : i + 1], torch.cat([y[i : i + 1], y[:i], y[i + 1 :]])).item() for i in range(7)]
    assert sum(losses) / 7 == pytest.approx(slow_infonce(x, y), rel=1e-5)


@pytest.mark.skipif(not torch.amp.is_autocast_available("cpu"), reason="no autocast on CPU")
def test_infonce_is_computed_in_fp32_under_autocast():
    x, y = numbers(2, 7, 64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = infonce(x, y, 0.01)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, infonce(x, y, 0.01))


# ---- two processes -----------------------------------------------------------------------------------------
def loss_and_gradients(ranks: slice) -> dict[str, Tensor]:
    """Return loss and gradients of these rows, by a layer that averages its gradients over the processes there are."""
    x, y = numbers(2, 10, 6)
    layer = nn.Linear(6, 6, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = DistributedDataParallel(layer) if dist.is_initialized() else layer
    x = x[ranks].clone().requires_grad_()
    loss = infonce(model(x), y[ranks].requires_grad_(), 0.3)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def share(rank: int) -> dict[str, Tensor]:
    """Compute the loss and gradients of every second row."""
    return loss_and_gradients(slice(rank, None, 2))


@needs_gloo
def test_infonce_of_two_processes_is_that_of_one_with_all_rows(tmp_path):
    first, second = in_two_processes(share, tmp_path)
    expected = loss_and_gradients(slice(None))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, expected["loss"])
    for name in ("weight", "bias"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected[name], rtol=1e-5, atol=1e-7)  # sums that nearly cancel
    rows = torch.stack([first["x"], second["x"]], dim=1).flatten(0, 1) / 2  # each is of the mean over half the rows
    torch.testing.assert_close(rows, expected["x"], rtol=1e-5, atol=1e-8)
    x, y = numbers(2, 10, 6)
    assert expected["loss"].item() == pytest.approx(slow_infonce(x, y, 0.3), rel=1e-5)
    assert first["loss"] != infonce(x[::2], y[::2], 0.3)  # the other's targets are negatives
