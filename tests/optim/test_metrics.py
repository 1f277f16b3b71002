"""Meter: means, missing values, no host reads in update, the flag, several processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from util.optim.metrics import Meter


def test_means_since_the_last_drain():
    meter = Meter("cpu")
    for step in range(4):
        meter.update(loss=torch.tensor(float(step)), lr=0.5)
    meter.update(grad_norm=torch.tensor(7))  # less often than the others
    assert meter.drain() == {"loss": 1.5, "lr": 0.5, "grad_norm": 7.0, "non_finite": 0.0}
    meter.update(loss=torch.tensor(10.0))
    assert meter.drain() == {"loss": 10.0, "non_finite": 0.0}
    assert meter.drain() == {"non_finite": 0.0}


def test_reset_forgets():
    meter = Meter("cpu")
    meter.update(loss=torch.tensor(math.nan))
    meter.reset()
    assert meter.drain() == {"non_finite": 0.0}


def test_mean_of_many_half_precision_values_keeps_its_digits():
    meter = Meter("cpu")
    value = torch.tensor(0.1, dtype=torch.bfloat16)
    for _ in range(1000):  # a bfloat16 sum would stop growing at 32
        meter.update(loss=value)
    assert meter.drain()["loss"] == pytest.approx(value.item(), rel=1e-12)


def test_update_reads_nothing_back_from_the_device():
    meter = Meter("meta")  # tensors without data: any .item(), branch or copy to the host raises
    meter.update(loss=torch.ones((), device="meta"), lr=0.1)
    meter.update(loss=torch.ones((), device="meta"), lr=0.1)


def test_update_keeps_no_graph_and_does_not_alias():
    meter = Meter("cpu")
    weight = torch.ones((), requires_grad=True)
    loss = weight * 2
    meter.update(loss=loss)
    with torch.no_grad():
        loss.fill_(100)  # as a CUDA graph or an in-place step would
    assert meter.drain()["loss"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_value_is_noticed_whatever_follows(bad):
    meter = Meter("cpu")
    for value in (1.0, bad, 2.0, -math.inf, 3.0):
        meter.update(loss=torch.tensor(value), other=torch.tensor(1.0))
    means = meter.drain()
    assert means["non_finite"] == 1.0
    assert not math.isfinite(means["loss"])
    assert means["other"] == 1.0
    meter.update(loss=torch.tensor(1.0))
    assert meter.drain() == {"loss": 1.0, "non_finite": 0.0}


def test_name_of_the_flag_is_reserved():
    with pytest.raises(ValueError, match="non_finite"):
        Meter("cpu").update(non_finite=1.0)


def test_reduce_without_processes_is_a_plain_drain():
    meter = Meter("cpu")
    meter.update(loss=torch.tensor(3.0))
    assert meter.drain(reduce=True) == {"loss": 3.0, "non_finite": 0.0}


def _check_reduce(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = Meter("cpu")
    if rank == 0:
        meter.update(loss=torch.tensor(1.0), other=torch.tensor(5.0))
    else:  # other order, other number of observations
        meter.update(other=torch.tensor(7.0))
        meter.update(loss=torch.tensor(2.0))
        meter.update(loss=torch.tensor(6.0))
    assert meter.drain(reduce=True) == {"loss": 3.0, "other": 6.0, "non_finite": 0.0}

    meter.update(loss=torch.tensor(1.0 if rank == 0 else math.nan))
    assert meter.drain(reduce=True)["non_finite"] == 1.0  # both ranks learn of it and can stop together

    meter.update(loss=torch.tensor(float(rank)))
    assert meter.drain()["loss"] == rank  # without reduce each keeps its own
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_reduce_across_two_processes(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_check_reduce, args=(str(tmp_path / "store"),), nprocs=2)
