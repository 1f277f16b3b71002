"""Learning rate and momentum as functions of the update; nothing is kept, so a resume cannot lose it."""

from __future__ import annotations

import math


def learning_rate(update: float, total: int, warmup: float, peak: float, end: float) -> float:
    """Linear from 0 to `peak` over `warmup` updates, then a half cosine to `end` at `total` updates."""
    if update < warmup:
        return peak * update / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def polynomial_rate(update: float, total: int, warmup: float, peak: float, end: float, power: float) -> float:
    """Linear from 0 to `peak` over `warmup` updates, then (1 - progress)^power down to `end` at `total` updates."""
    if update < warmup:
        return peak * update / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    return end + (peak - end) * (1 - min(progress, 1.0)) ** power


def momentum_decay(update: int, total: int, start: float, end: float) -> float:
    """Decay of the momentum encoder: a half cosine from `start` to `end` over all updates (as BYOL)."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(update / max(total, 1), 1.0)))
