"""Measure what saving costs: how long a checkpoint blocks the training, and how much it slows the updates beside it.

    python scripts/bench.py saving --folder /scratch
    python scripts/bench.py saving --device cuda --limit_percent 1      # exit status 1 if it costs more

The state is that of a real run of the model: student, momentum encoder and the moments of AdamW. The files are written
to a temporary folder below --folder. Shares are those of an epoch with one save.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models_lut import LUT, MomentumEncoder
from util.bench.config import SavingConfig
from util.config.pretrain import PretrainConfig
from util.optim.optimizer import build_optimizer
from util.runtime.amp import grad_scaler
from util.runtime.distributed import choose_device
from util.runtime.errors import RunError
from util.train.trainer import TrainState
from util.weights.checkpoint import CheckpointStore


def full_state(model: str, device: torch.device) -> TrainState:
    """Return the state of a run after its first update, taken with random gradients."""
    config = PretrainConfig(model=model)
    student = LUT(**config.model_arguments).to(device)
    momentum_encoder = MomentumEncoder(student) if config.has_momentum_encoder else None
    optimizer = build_optimizer(student, 1e-3, config.betas, config.weight_decay)
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(student, momentum_encoder, optimizer, grad_scaler(None, device), updates=1)


class Updates:
    """Small training updates that run on the device while a checkpoint is saved."""

    def __init__(self, device: torch.device, device_seconds: float):
        self.device_seconds = device_seconds
        self.model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(8 if device_seconds else 256, 512, device=device)

    def rate(self, proceed: Callable[[float], bool]) -> float:
        """Train while `proceed(seconds so far)` is true, and return the updates per second."""
        begin, done = time.perf_counter(), 0
        while proceed(time.perf_counter() - begin):
            self.model(self.x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.x.sum().item()  # waits for the device
            time.sleep(self.device_seconds)
            done += 1
        return done / (time.perf_counter() - begin)


def seconds_of(call: Callable[[], object]) -> float:
    """Return how many seconds the call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class SavingCost(NamedTuple):
    """Medians of several saves, in seconds but for `mib` and `slowed`."""

    mib: float  # size of the checkpoint
    foreground: float  # a save that the training waits for
    blocked: float  # the part of a save in the background that the training waits for
    writing: float  # the rest of it, beside the training
    slowed: float  # share by which updates are slower meanwhile
    background: float  # training time that a save in the background costs


def measure_saving(model: str, device: torch.device, folder: Path, repeats: int, device_seconds: float) -> SavingCost:
    """Save `repeats` times in the foreground, and as often in the background with updates beside it.

    Args:
        device_seconds: see SavingConfig.
    """
    state, updates = full_state(model, device), Updates(device, device_seconds)
    updates.rate(lambda seconds: seconds < 1)  # warm up
    store = CheckpointStore(folder, 1, None, keep_best=False)
    costs = []
    for i in range(repeats):
        after = 2 * i + 1
        foreground = seconds_of(lambda n=after - 1: store.save(state.state_dict(), epoch=n, step=n))
        alone = updates.rate(lambda seconds: seconds < 3)
        begin = time.perf_counter()
        blocked = seconds_of(lambda n=after: store.save_in_background(state.state_dict(), epoch=n, step=n))
        beside = updates.rate(lambda _: store.is_writing)
        writing = time.perf_counter() - begin - blocked
        store.wait()
        slowed = max(0.0, 1 - beside / alone)
        mib = store.list()[-1][1].bytes / 2**20
        costs.append(SavingCost(mib, foreground, blocked, writing, slowed, blocked + slowed * writing))
    return SavingCost(*map(statistics.median, zip(*costs, strict=True)))


def bench_saving(config: SavingConfig) -> None:
    """Measure the saving, print the medians, and compare the share of an epoch with --limit_percent.

    Raises:
        RunError: a save in the background costs more than --limit_percent.
    """
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        cost = measure_saving(config.model, device, Path(folder), config.repeats, config.device_seconds)
    percent = 100 / (60 * config.epoch_minutes)
    share = percent * cost.background
    print(f"{config.model} on {device}: a checkpoint of {cost.mib:.0f} MiB, medians of {config.repeats}")
    print(f"in the foreground  {cost.foreground:.2f} s, {percent * cost.foreground:.2f} % of the epoch")
    print(
        f"in the background  {cost.blocked:.2f} s, then for {cost.writing:.1f} s updates are slower by"
        f" {100 * cost.slowed:.0f} %: {cost.background:.2f} s, {share:.2f} % of the epoch"
    )
    if config.limit_percent is not None and share > config.limit_percent:
        raise RunError(f"--limit_percent {config.limit_percent:g}: a save in the background costs {share:.2f} %")
