"""Attentive and linear heads on frozen tokens, many side by side: each kind is one batched tensor operation.

An attentive head pools patch tokens by the cross-attention of learned queries, where a linear probe takes their mean or
the cls token: features of masked image modelling are spread over the patches. Two forms are known:

- own key and value projections with the encoder's number of attention heads, as AIM (El-Nouby et al. 2024), V-JEPA
  (Bardes et al. 2024) and CAPI (Darcet et al. 2025) probe. Several queries are averaged, as in AIM. There is no output
  projection and no MLP after the attention.
- no projections, after "efficient probing" (Psomas et al. 2025): each query attends to the tokens as they are, and
  averages its own slice of their channels.

A BatchNorm without affine parameters and a linear layer follow, as in MAE's linear probe.

Letters: B images, L patches, D width, K classes, G heads of the grid, Q queries, h attention heads, d = D / h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import LinearProbe
from util.runtime.errors import UserError

INIT_STD = 0.02
HEAD_STD = 0.01  # of the linear layer, as MAE's probe
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW


def initial(G: int, *shape: int, std: float, generator: torch.Generator | None) -> nn.Parameter:
    """Return a parameter [G, *shape] of normal numbers that are the same for all G heads."""
    return nn.Parameter((std * torch.randn(shape, generator=generator)).expand(G, *shape).clone())


class LinearHeads(nn.Module):
    """G linear heads: BatchNorm without affine parameters and a linear layer each.

    Args:
        shared: all heads read the same feature, so they share their BatchNorm.
    """

    def __init__(self, G: int, D: int, K: int, generator: torch.Generator | None = None, shared: bool = True):
        super().__init__()
        self.norm = nn.BatchNorm1d(D if shared else G * D, affine=False, eps=1e-6)
        self.weight = initial(G, D, K, std=HEAD_STD, generator=generator)
        self.bias = nn.Parameter(torch.zeros(G, 1, K))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [G, B, K] of features [B, D], or of a feature for each head, [B, G, D]."""
        if features.ndim == 2:
            return torch.einsum("bd,gdk->gbk", self.norm(features), self.weight) + self.bias
        x = self.norm(features.flatten(1)).view_as(features).transpose(0, 1)  # [G, B, D]
        return torch.baddbmm(self.bias, x, self.weight)


class AttentiveHeads(nn.Module):
    """G attentive heads (see the module), which differ in their parameters alone.

    With projections, head h of query q has the score qᵀ(W_K x) = (W_Kᵀ q)ᵀ x at token x, and Σ a_l (W_V x_l) is
    W_V (Σ a_l x_l). So the projections are applied to queries and pooled tokens, not to all tokens: the result is the
    same, and a head costs O(Q h L D) for an image where projecting its tokens costs O(L D²).

    Args:
        num_queries: Q.
        num_heads: attention heads of the projections; None: no projections.

    Raises:
        UserError: the width is no multiple of the number of attention heads, or without projections of Q.
    """

    def __init__(
        self,
        G: int,
        D: int,
        K: int,
        num_queries: int = 1,
        num_heads: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        Q, h = num_queries, num_heads
        if D % (h or Q):
            flag = "attention heads" if h else "--attentive_queries"
            raise UserError(f"{flag} {h or Q}: does not divide the width of the tokens, {D}")
        self.num_heads = h
        if h:
            self.query = initial(G, Q, h, D // h, std=INIT_STD, generator=generator)
            self.key = initial(G, h, D // h, D, std=INIT_STD, generator=generator)
            self.value = initial(G, h, D // h, D, std=INIT_STD, generator=generator)
        else:
            self.query = initial(G, Q, D, std=INIT_STD, generator=generator)
        self.linear = LinearHeads(G, D, K, generator, shared=False)

    def attend(self, tokens: Tensor) -> Tensor:
        """Return the attention [B, G, Q, L], with projections [B, G, Q·h, L], over tokens [B, L, D]."""
        D = tokens.shape[-1]
        if self.num_heads:
            query = torch.einsum("gqhd,ghdc->gqhc", self.query, self.key).flatten(1, 2)  # [G, Q·h, D]
            scale = math.sqrt(D // self.num_heads)
        else:
            query, scale = self.query, math.sqrt(D)
        scores = tokens @ (query.flatten(0, 1).T / scale)  # [B, L, G·Q·h]
        return scores.softmax(dim=1).transpose(1, 2).unflatten(1, query.shape[:2])

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled tokens [B, G, D] of tokens [B, L, D]."""
        attention = self.attend(tokens)
        B, G, N, L = attention.shape
        if not self.num_heads:
            slices = tokens.unflatten(2, (N, -1)).transpose(1, 2)  # [B, Q, L, D / Q]
            return (attention.transpose(1, 2) @ slices).transpose(1, 2).flatten(2)  # [B, G, D]
        pooled = (attention.reshape(B, G * N, L) @ tokens).view(B, G, -1, self.num_heads, tokens.shape[-1])
        pooled = pooled.mean(dim=2)  # [B, G, h, D]: averaging queries commutes with W_V
        return torch.einsum("bghc,ghdc->bghd", pooled, self.value).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [G, B, K] of patch tokens [B, L, D]."""
        return self.linear(self.pool(tokens))


class AttentiveProbe(LinearProbe):
    """One attentive head on the patch tokens of a frozen encoder, [B, C, H, W] to logits [B, K].

    The tokens are those of the encoder as it was pre-trained, after its last norm. As in LinearProbe, `train()` leaves
    the encoder in eval mode, and only `head` has gradients.

    Args:
        num_queries: learned queries.
        projections: the head has its own key and value projections.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        num_classes: int,
        num_queries: int = 1,
        projections: bool = True,
        **vit: Any,
    ):
        super().__init__(architecture, num_classes=num_classes, **vit)
        num_heads = architecture["num_heads"] if projections else None
        self.head = AttentiveHeads(1, self.embed_dim, num_classes, num_queries, num_heads)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]; no graph is kept of the encoder."""
        with torch.no_grad():
            tokens = self.forward_features(images)[:, self.num_prefix_tokens :]  # [B, L, D]
        return self.head(tokens)[0]


class GridAdamW:
    """AdamW (Loshchilov & Hutter 2019) for heads side by side, each with its own learning rate and weight decay.

    torch's own takes one rate for a tensor. Biases are not decayed.

    Args:
        heads: all parameters are [G, ...].
        lrs, weight_decays: [G] each.
    """

    def __init__(self, heads: nn.Module, lrs: Tensor, weight_decays: Tensor):
        self.parameters = list(heads.named_parameters())
        self.lrs, self.weight_decays, self.steps = lrs, weight_decays, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for _, p in self.parameters]

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """Update all heads with `schedule` times their learning rates, and clear the gradients."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for (name, parameter), (mean, square) in zip(self.parameters, self.moments, strict=True):
            rate, decay = (x.view(-1, *[1] * (parameter.ndim - 1)) for x in (self.lrs * schedule, self.weight_decays))
            if not name.endswith("bias"):
                parameter.mul_(1 - rate * decay)
            mean.lerp_(parameter.grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
            parameter.sub_(rate / first * mean / ((square / second).sqrt_() + EPSILON))
            parameter.grad = None


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy [G] of logits [G, B, K]; the gradient of their sum is each head's own."""
    G, B, K = logits.shape
    return F.cross_entropy(logits.reshape(-1, K), labels.repeat(G), reduction="none").view(G, B).mean(dim=1)
