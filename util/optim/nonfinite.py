"""Records the first update whose loss or gradient is not finite, and what led to it."""

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
    """Group parameter names by block (`blocks.3`) or part (`norm`, `head`): indices into `names` by group."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        parts = name.split(".")
        group = ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdecimal() else parts[0]
        groups.setdefault(group, []).append(place)
    return groups


class NonFiniteWatch:
    """Remembers the first update since the last `report` whose loss or gradient was not finite.

    Everything stays on the device, and the host reads it only at a log line, so no update waits.

    Args:
        checks_gradients: False with fp16, where the loss scaler handles infinite gradients and only the loss counts.
    """

    def __init__(self, model: nn.Module, device: torch.device, checks_gradients: bool):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.parameters = [p for _, p in trained]
        self.sharded = is_sharded(model)
        self.checks_gradients = checks_gradients
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded so far."""
        self.first = torch.full((), NEVER, dtype=torch.float64, device=self.device)
        self.norms = torch.zeros(len(self.parameters), device=self.device)
        self.losses: dict[str, Tensor] = {}
        self.samples: dict[int, list[Tensor]] = {}  # update -> sample ids of its batches, on the CPU

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return the gradients that exist; of a sharded parameter, this rank's part."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """Return the norm [P] of each parameter's gradient, 0 where there is none; call it after DDP's reduction."""
        with_gradient = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(self.gradients()))
        if self.sharded:  # double: the square of a large norm is infinite in fp32
            norms = sum_over_ranks(norms.double().square()).sqrt().float()
        if len(with_gradient) == len(self.parameters):
            return norms
        all_norms = torch.zeros(len(self.parameters), device=self.device)
        all_norms[torch.tensor(with_gradient, device=self.device)] = norms
        return all_norms

    @torch.no_grad()
    def record(self, update: int, losses: Mapping[str, Tensor], norms: Tensor, samples: list[Tensor]) -> Tensor:
        """Record an update and return a bool on the device, true if it was not finite on this rank.

        Args:
            losses: 0-dim sums over the parts of an accumulated update, detached.
            norms: from `gradient_norms`, unscaled and before clipping.
            samples: sample ids of each part of the update.
        """
        finite = torch.stack([x.float() for x in losses.values()]).isfinite().all()
        if self.checks_gradients:
            finite = finite & norms.isfinite().all()
        now = ~finite & (self.first == NEVER)
        self.first = torch.where(now, float(update), self.first)
        self.norms = torch.where(now, norms, self.norms)
        zero = torch.zeros((), device=self.device)
        self.losses = {n: torch.where(now, x, self.losses.get(n, zero)) for n, x in losses.items()}
        self.samples[update] = samples
        return ~finite

    def report(self) -> dict[str, Any]:
        """Return what is known of the first non-finite update on any rank, {} if there was none.

        It is a collective: all ranks must call it.
        """
        norms = self.norms.tolist()
        update = int(self.first)
        own_report = {
            "update": update if update < NEVER else None,
            "losses": {name: number(x.item()) for name, x in self.losses.items()},
            "samples": {step: torch.cat(ids).tolist() for step, ids in self.samples.items()},
            "gradient_norms": {
                group: number(math.hypot(*(norms[i] for i in places))) for group, places in grouped(self.names).items()
            },
        }
        ranks = [own_report]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own_report)
        updates = [r["update"] for r in ranks if r["update"] is not None]
        if not updates:
            return {}
        first = min(updates)
        return {
            "update": first,
            "gradient_norms": next(r["gradient_norms"] for r in ranks if r["update"] == first),
            "ranks": [
                {"losses": r["losses"] if r["update"] == first else {}, "samples": r["samples"].get(first, [])}
                for r in ranks
            ],
        }


def number(value: float) -> float | str:
    """Spell NaN and infinity as text, because JSON has neither."""
    return value if math.isfinite(value) else str(value)


def write_report(report: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]) -> Path:
    """Append the report, with settings of the update, to nonfinite.json in the run's folder."""
    path = folder / FILE
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(settings) | dict(report)) + "\n")
    return path


def describe_report(report: Mapping[str, Any], lr: float, scale: float, path: Path) -> str:
    """Return a report in one line: update, losses, learning rate, loss scale, and the layers at fault.

    Args:
        path: the file that holds the whole report.
    """
    losses_by_rank = [rank["losses"] for rank in report["ranks"]]
    not_finite = [any(isinstance(value, str) for value in losses.values()) for losses in losses_by_rank]
    rank = not_finite.index(True) if any(not_finite) else 0  # a loss may be finite and its gradient not
    losses = ", ".join(f"{name} {value}" for name, value in losses_by_rank[rank].items())
    layers = [name for name, norm in report["gradient_norms"].items() if isinstance(norm, str)]
    gradients = f"; gradients not finite in {', '.join(layers[:4])}{', ...' * (len(layers) > 4)}" if layers else ""
    return (
        f"update {report['update']} ({losses} on rank {rank}; lr {lr:.3g}, loss scale now {scale:g}{gradients});"
        f" its samples and gradient norms are in {path}"
    )
