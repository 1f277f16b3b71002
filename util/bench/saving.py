"""What saving costs: how long a checkpoint keeps the training waiting, and how much the updates beside it slow down.

    python scripts/bench.py saving --folder /scratch
    python scripts/bench.py saving --device cuda --limit_percent 1      # status 1 where it costs more

The state is that of a real run of the model: student, momentum encoder and the moments of AdamW. Its files go into a
folder of their own below --folder, which is deleted at the end. The share is of an epoch with one save.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models_lut import LUT, MomentumEncoder
from util.config.groups import check
from util.config.pretrain import PretrainConfig
from util.optim.optimizer import build_optimizer
from util.runtime.amp import grad_scaler
from util.runtime.distributed import choose_device
from util.runtime.errors import RunError
from util.train.state import TrainState
from util.weights.checkpoint import CheckpointStore


@dataclass(frozen=True)
class SavingConfig:
    """Measure the saving of checkpoints."""

    model: str = "lut_vit_base_patch16"
    """as for main_pretrain.py"""
    folder: str = ""
    """where the checkpoints are written, two at a time; default: the system's folder for temporary files"""
    device: str = "auto"
    """where the state lies and the updates run; auto: cuda where there is one, else cpu"""
    device_seconds: float = 0.0
    """of each update on a CPU, for which the process sleeps as it would while a GPU computes; 0: it computes"""
    repeats: int = 3
    """saves of each kind; the medians are shown"""
    epoch_minutes: float = 5.0
    """length of the epoch whose share is shown"""
    limit_percent: float | None = None
    """error where a save in the background costs more of an epoch; default: no limit"""

    def __post_init__(self) -> None:
        check(0 <= self.device_seconds < 1, "device_seconds", self.device_seconds, "must lie in [0, 1)")
        check(self.repeats >= 1, "repeats", self.repeats, "must be 1 or more")
        check(self.epoch_minutes > 0, "epoch_minutes", self.epoch_minutes, "must be above 0")


def full_state(model: str, device: torch.device) -> TrainState:
    """The state of a run after its first update, with gradients of nothing but noise."""
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
    """Small updates on the device, as a training beside the saving would make them."""

    def __init__(self, device: torch.device, device_seconds: float):
        self.device_seconds = device_seconds
        self.model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(8 if device_seconds else 256, 512, device=device)

    def rate(self, goes_on: Callable[[float], bool]) -> float:
        """Updates per second for as long as `goes_on(seconds so far)`."""
        begin, done = time.perf_counter(), 0
        while goes_on(time.perf_counter() - begin):
            self.model(self.x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.x.sum().item()  # waits for the device
            time.sleep(self.device_seconds)
            done += 1
        return done / (time.perf_counter() - begin)


def seconds_of(call: Callable[[], object]) -> float:
    """How long the call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def bench_saving(config: SavingConfig) -> None:
    """Save in the foreground, then in the background with updates beside it; print the medians."""
    device = choose_device(config.device)
    state, updates = full_state(config.model, device), Updates(device, config.device_seconds)
    updates.rate(lambda seconds: seconds < 1)  # warm
    foreground, blocked, writing, slowed = [], [], [], []
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        store = CheckpointStore(Path(folder), 1, None, keep_best=False)
        for i in range(config.repeats):
            after = 2 * i + 1
            foreground.append(seconds_of(lambda n=after - 1: store.save(state.state_dict(), epoch=n, step=n)))
            alone = updates.rate(lambda seconds: seconds < 3)
            begin = time.perf_counter()
            blocked.append(seconds_of(lambda n=after: store.save_in_background(state.state_dict(), epoch=n, step=n)))
            beside = updates.rate(lambda _: store.is_writing)
            writing.append(time.perf_counter() - begin - blocked[-1])
            store.wait()
            slowed.append(max(0.0, 1 - beside / alone))
        size = store.list()[-1][1].bytes
    epoch = 60 * config.epoch_minutes
    costs = [wait + lost * seconds for wait, lost, seconds in zip(blocked, slowed, writing, strict=True)]
    median = statistics.median
    share = 100 * median(costs) / epoch
    print(f"{config.model} on {device}: a checkpoint of {size / 2**20:.0f} MiB, medians of {config.repeats}")
    print(f"in the foreground  {median(foreground):.2f} s, {100 * median(foreground) / epoch:.2f} % of the epoch")
    print(
        f"in the background  {median(blocked):.2f} s, then for {median(writing):.1f} s updates are slower by"
        f" {100 * median(slowed):.0f} %: {median(costs):.2f} s, {share:.2f} % of the epoch"
    )
    if config.limit_percent is not None and share > config.limit_percent:
        raise RunError(f"--limit_percent {config.limit_percent:g}: a save in the background costs {share:.2f} %")
