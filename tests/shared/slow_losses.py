"""Distances by explicit loops."""

from __future__ import annotations

import math

from torch import Tensor


def slow_cosine(x: Tensor, y: Tensor) -> float:
    return sum(2 - 2 * cosine(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def slow_smooth_l1(x: Tensor, y: Tensor) -> float:
    gaps = [abs(a - b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
    return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)


def slow_infonce(x: Tensor, y: Tensor, temperature: float = 0.2) -> float:
    losses = []
    for i, query in enumerate(x.tolist()):
        scores = [math.exp(cosine(query, key) / temperature) for key in y.tolist()]
        losses.append(-math.log(scores[i] / sum(scores)))
    return sum(losses) / len(losses)


SLOW = {"cosine": slow_cosine, "smooth_l1": slow_smooth_l1, "infonce": slow_infonce}
