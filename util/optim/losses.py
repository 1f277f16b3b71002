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
    """Return the paper's distance: the squared distance of the normalised vectors, 2 - 2 cos."""
    return (2 - 2 * F.cosine_similarity(x.float(), y.float(), dim=-1)).mean()


def smooth_l1_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the smooth L1 distance, quadratic below 1, averaged over the D numbers too.

    The vectors are not normalised, because the paper names no normalisation for it.
    """
    return F.smooth_l1_loss(x.float(), y.float())


def infonce(x: Tensor, y: Tensor, temperature: float = 0.2) -> Tensor:
    """Return InfoNCE (van den Oord et al., 2018): classify each row's own target among the targets of all ranks.

    Each rank scores its own predictions against all ranks' targets, by cosine. Targets carry no gradient, so no
    gradient passes between ranks, and the mean that DistributedDataParallel takes equals the gradient of one process
    with all rows. Shapes must be equal on all ranks. The paper gives no temperature; .2 is MoCo v3's.

    Args:
        x: predictions [N, D].
        y: targets [N + M, D]; the last M rows belong to no prediction of this call and are negatives only.
    """
    with full_precision(x.device):
        queries = F.normalize(x.float(), dim=-1)
        keys, first = gather_rows(F.normalize(y.float(), dim=-1))  # [W*(N + M), D]
        own = torch.arange(first, first + len(x), device=x.device)
        return F.cross_entropy(queries @ keys.T / temperature, own)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, in which matrix products are computed in fp32."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1_distance,
    "infonce": infonce,
}
