"""What to know of the update at which a loss or a gradient was no longer finite."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.runtime.distributed import sum_over_ranks
from util.runtime.sharding import is_sharded, local

FILE = "nonfinite.json"
NEVER = 2**53  # an update that no run reaches, exact in float64


def grouped(names: Iterable[str]) -> dict[str, list[int]]:
    """Places of the parameters of each block (`blocks.3`, `decoder_blocks.0`) or other part (`norm`, `head`)."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        parts = name.split(".")
        group = ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdecimal() else parts[0]
        groups.setdefault(group, []).append(place)
    return groups


class NonFiniteWatch:
    """Remembers the first update since the last `report` whose loss or gradient was not finite.

    All on the device, without waiting for it: the host looks at a log line. With fp16 an infinite gradient is the loss
    scaler's business, and the loss alone is looked at.
    """

    def __init__(self, model: nn.Module, device: torch.device, looks_at_gradients: bool):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.parameters = [p for _, p in trained]
        self.sharded = is_sharded(model)
        self.looks_at_gradients = looks_at_gradients
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget."""
        self.first = torch.full((), NEVER, dtype=torch.float64, device=self.device)
        self.norms = torch.zeros(len(self.parameters), device=self.device)
        self.losses: dict[str, Tensor] = {}
        self.samples: dict[int, list[Tensor]] = {}  # update -> sample ids of its batches, on the CPU

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Those that there are, of a sharded parameter this rank's part."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """[P] norm of each parameter's gradient, 0 where there is none; after the exchange between ranks."""
        with_gradient = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        found = torch._foreach_norm(self.gradients())
        if self.sharded:  # double: the square of a large norm is infinite in fp32
            found = sum_over_ranks(torch.stack(found).double().square()).sqrt().float().unbind()
        if len(with_gradient) == len(self.parameters):
            return torch.stack(found)
        norms = torch.zeros(len(self.parameters), device=self.device)
        norms[torch.tensor(with_gradient, device=self.device)] = torch.stack(found)
        return norms

    @torch.no_grad()
    def see(self, update: int, losses: Mapping[str, Tensor], norms: Tensor, samples: list[Tensor]) -> Tensor:
        """Note an update; a bool on the device that says whether it was bad on this rank.

        Args:
            losses: 0-dim sums over the parts of an accumulated update, detached.
            norms: what `gradient_norms` gave, before clipping and unscaled.
        """
        finite = torch.stack([x.float() for x in losses.values()]).isfinite().all()
        if self.looks_at_gradients:
            finite = finite & norms.isfinite().all()
        now = ~finite & (self.first == NEVER)
        self.first = torch.where(now, float(update), self.first)
        self.norms = torch.where(now, norms, self.norms)
        zero = torch.zeros((), device=self.device)
        self.losses = {n: torch.where(now, x, self.losses.get(n, zero)) for n, x in losses.items()}
        self.samples[update] = samples
        return ~finite

    def report(self) -> dict[str, Any]:
        """The first bad update on any rank; a collective, to be called on all ranks together, when there was one."""
        norms = self.norms.tolist()
        update = int(self.first)
        mine = {
            "update": update if update < NEVER else None,
            "losses": {name: number(x.item()) for name, x in self.losses.items()},
            "samples": {step: torch.cat(ids).tolist() for step, ids in self.samples.items()},
            "gradient_norms": {
                group: number(math.hypot(*(norms[i] for i in places))) for group, places in grouped(self.names).items()
            },
        }
        ranks = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        seen = [r["update"] for r in ranks if r["update"] is not None]
        if not seen:
            return {}
        first = min(seen)
        hit = next(r for r in ranks if r["update"] == first)
        return {
            "update": first,
            "gradient_norms": hit["gradient_norms"],
            "ranks": [
                {"losses": r["losses"] if r["update"] == first else {}, "samples": r["samples"].get(first, [])}
                for r in ranks
            ],
        }


def number(value: float) -> float | str:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else str(value)


def write_report(report: Mapping[str, Any], folder: Path, more: Mapping[str, Any]) -> Path:
    """Append the report, and what else is known, to nonfinite.json in the run's folder."""
    path = folder / FILE
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(more) | dict(report)) + "\n")
    return path
