"""Learning rate and EMA decay as functions of the update; they hold no state, so a resume cannot lose any."""

from __future__ import annotations

import math


def learning_rate(update: float, total: int, warmup: float, peak: float, end: float) -> float:
    """Return the rate that rises linearly to `peak` in `warmup` updates, then follows a half cosine to `end`."""
    if update < warmup:
        return peak * update / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def polynomial_rate(update: float, total: int, warmup: float, peak: float, end: float, power: float) -> float:
    """Return the rate: linear to `peak` over `warmup` updates, then down to `end` as (1 - progress)^power."""
    if update < warmup:
        return peak * update / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    return end + (peak - end) * (1 - min(progress, 1.0)) ** power


def momentum_decay(update: int, total: int, start: float, end: float) -> float:
    """Return the momentum encoder's decay: a half cosine from `start` to `end` over all updates, as in BYOL."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(update / max(total, 1), 1.0)))
