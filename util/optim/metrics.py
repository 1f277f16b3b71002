"""Means of training metrics, kept on the device until they are logged."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

NON_FINITE = "non_finite"


class Meter:
    """Running means of scalars, without a host synchronisation between two log lines.

    A step calls `update`, which only queues additions on `device`; a log line calls `drain`, which pays
    for one transfer. With several processes, `device` must be one that their backend can reduce on.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget everything since the last drain."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # per name: some metrics come only with an optimiser step

    @torch.no_grad()
    def update(self, **values: Tensor | float) -> None:
        """Add one observation of each value, a 0-dim tensor (it may carry a graph) or a number."""
        for name, value in values.items():
            if name == NON_FINITE:
                raise ValueError(f"{NON_FINITE!r} is the name of the flag that drain() returns")
            if name not in self._sums:
                # float64: a float32 sum of many steps loses the digits in which they differ
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
                self._counts[name] = 0
            self._sums[name] += value
            self._counts[name] += 1

    def drain(self, reduce: bool = False) -> dict[str, float]:
        """Return the mean of each value since the last drain, and start again.

        Args:
            reduce: average over all processes' observations, if torch.distributed is initialised. It is a
                collective: every process must call it, having updated the same names.

        Returns:
            The means by name, and `non_finite`: 1.0 if any observation was NaN or infinite, else 0.0.
            The values at fault are those whose mean is not finite.
        """
        names = sorted(self._sums)  # processes may have met the names in different orders
        means: dict[str, float] = {}
        if names:
            sums = torch.stack([self._sums[name] for name in names])
            counts = torch.tensor([self._counts[name] for name in names]).to(sums)
            if reduce and dist.is_available() and dist.is_initialized():
                sums_and_counts = torch.stack([sums, counts])
                dist.all_reduce(sums_and_counts)
                sums, counts = sums_and_counts
            means = dict(zip(names, (sums / counts).tolist(), strict=True))
        self.reset()
        # The device needs no flag for this: a sum that has met a NaN or infinity never becomes finite again,
        # on any rank, and float64 does not overflow from finite float32 values.
        return means | {NON_FINITE: float(not all(map(math.isfinite, means.values())))}
