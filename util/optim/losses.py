"""Distances between what the student predicts and what the context encoder gives: the rows of Table 4d.

Each takes predictions and targets [N, D], row n of one against row n of the other, computes in fp32 and returns the
mean over the rows, 0-dim. Targets carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from util.runtime.distributed import gather_rows


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """The paper's: squared distance of the normalised vectors, 2 - 2 cos."""
    return (2 - 2 * F.cosine_similarity(x.float(), y.float(), dim=-1)).mean()


def smooth_l1_distance(x: Tensor, y: Tensor) -> Tensor:
    """Smooth L1, quadratic below 1, mean over the D numbers too.

    Of the vectors as they are: the paper names no normalisation for it.
    """
    return F.smooth_l1_loss(x.float(), y.float())


def infonce(x: Tensor, y: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE (van den Oord et al., 2018): pick the own target among those of all rows of all processes, by cosine.

    Each process scores its own predictions against everybody's targets. As targets carry no gradient, nothing has to
    flow back between processes: the mean that DistributedDataParallel takes of their gradients is that of one process
    with all rows. The same shapes on every rank. The paper gives no temperature; .2 is MoCo v3's.

    Args:
        x: [N, D].
        y: [N + M, D]; the last M rows are nobody's own here: negatives alone.
    """
    with full_precision(x.device):
        queries = F.normalize(x.float(), dim=-1)
        keys, first = gather_rows(F.normalize(y.float(), dim=-1))  # [W*(N + M), D]
        own = torch.arange(first, first + len(x), device=x.device)
        return F.cross_entropy(queries @ keys.T / temperature, own)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off, on devices that have it: matrix products stay in fp32."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1_distance,
    "infonce": infonce,
}
