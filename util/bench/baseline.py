"""A plain eager PyTorch implementation of the pre-training step, with which scripts/bench.py compares ours.

It computes MAE, and LUT with the choices that the paper makes in its Table 4. Networks, weights, masks, losses and
schedules are the same as ours. It uses none of our exact optimisations:

- The convolution embeds every patch, then the visible ones are picked. Each view has a pass of its own.
- The decoder restores the order of the image. Its last block and the pixel head process all tokens, and the mask
  selects the loss of the hidden ones.
- Attention stores its matrix of weights.
- AdamW, the gradient norm and the EMA update loop over tensors. The momentum encoder is a copy of the whole student,
  decoder and predictor included, and all of it is updated.
- The data loader delivers normalised fp32 images, and each step copies its losses to the host.

The letters in shapes are those of models_lut.py. Only the benchmarks use this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from models_encoder import patchify
from models_lut import LUT, Masking, moving_state
from util.config.pretrain import PretrainConfig
from util.optim.optimizer import parameter_groups, set_learning_rate
from util.optim.schedules import learning_rate, momentum_decay
from util.runtime.amp import grad_scaler

# --------------------------------------------------------------------------------------------------------
# Views to losses
# --------------------------------------------------------------------------------------------------------


def pick(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` [B, K] of tokens [B, N, D] as [B, K, D]."""
    return torch.gather(tokens, 1, ids[:, :, None].repeat(1, 1, tokens.shape[2]))


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute self-attention [B, N, D] -> [B, N, D]; autograd keeps the weights [B, heads, N, N]."""
    B, N, D = x.shape
    heads = layer.num_heads
    q, k, v = layer.qkv(x).reshape(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
    weights = torch.softmax(q @ k.transpose(2, 3) / (D // heads) ** 0.5, dim=-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Run all blocks on all tokens, [B, N, D] -> [B, N, D]."""
    for block in blocks:
        x = x + attention(block.attn, block.norm1(x))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return x


def encode(model: LUT, images: Tensor, visible_ids: Tensor | None = None) -> Tensor:
    """Encode images [B, C, H, W] to latents [B, 1 + V, D] of the visible patches; None means all patches."""
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]  # [B, L, D]
    if visible_ids is not None:
        x = pick(x, visible_ids)
    cls = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    return model.norm(run_blocks(model.blocks, x))


def mim_loss(model: LUT, latent: Tensor, images: Tensor, masking: Masking) -> Tensor:
    """Return L_MIM of the images [B, C, H, W] whose visible patches were encoded as `latent` [B, 1 + V, D]."""
    x = model.decoder_embed(latent)
    hidden = model.mask_token.repeat(len(x), masking.hidden_ids.shape[1], 1)
    in_order = pick(torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1), masking.ids_restore)
    x = run_blocks(model.decoder_blocks, torch.cat([x[:, :1], in_order], dim=1) + model.decoder_pos_embed)
    prediction = model.decoder_pred(model.decoder_norm(x))[:, 1:]  # [B, L, P]

    target = patchify(images, model.patch_size)
    if model.norm_pix_loss:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    error = ((prediction.float() - target) ** 2).mean(-1)  # [B, L]
    return (error * masking.mask).sum() / masking.mask.sum()


def bc_loss(model: LUT, latent: Tensor, target: Tensor) -> Tensor:
    """Return L_BC of one view from its latents [B, 1 + V, D] and the momentum encoder's target [B, D]."""
    prediction = model.predictor(model.head(latent[:, 1:].mean(1)))
    difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return (difference**2).sum(-1).mean()


# --------------------------------------------------------------------------------------------------------
# One update
# --------------------------------------------------------------------------------------------------------


class PlainBatch(NamedTuple):
    """A batch of a data loader that normalises; it lies in the memory of the host."""

    views: Tensor  # [2, B, C, H, W] float32; one view for MAE
    noise: Tensor  # [B, L]


class PlainTrainer:
    """The plain counterpart of engine_pretrain.PretrainTrainer.

    Args:
        student: the model that is trained in place.
        total_updates: the length of the schedules.
    """

    def __init__(
        self, config: PretrainConfig, student: LUT, device: torch.device, dtype: torch.dtype | None, total_updates: int
    ):
        self.config, self.student, self.device, self.dtype = config, student, device, dtype
        self.total_updates, self.updates = total_updates, 0
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False) if config.has_momentum_encoder else None
        groups = parameter_groups(student, config.weight_decay, config.layer_decay)
        self.optimizer = AdamW(groups, lr=config.peak_lr, betas=config.betas, foreach=False, fused=False)
        self.scaler = grad_scaler(dtype, device)

    def update(self, batches: list[PlainBatch], mark: Callable[[str], None] = lambda part: None) -> dict[str, float]:
        """Take one optimiser step on the mean loss over the batches and return the losses.

        Args:
            mark: called at the end of each part of the step, with the name of the part.
        """
        config = self.config
        warmup = config.resolved_warmup_epochs * self.total_updates / config.epochs
        lr = learning_rate(self.updates, self.total_updates, warmup, config.peak_lr, config.min_lr)
        set_learning_rate(self.optimizer, lr)
        sums = dict(loss=0.0, mim=0.0, bc=0.0)
        for batch in batches:
            views = batch.views.to(self.device, non_blocking=True)
            noise = batch.noise.to(self.device, non_blocking=True)
            mark("data")
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                targets = self.targets(views)
                mark("target")
                mim, bc = self.losses(views, noise, targets)
                loss = config.w_mim * mim + config.resolved_alpha * bc
            for name, value in dict(loss=loss, mim=mim, bc=bc).items():
                sums[name] += value.item() / len(batches)
            mark("student")
            self.scaler.scale(loss / len(batches)).backward()
            mark("backward")
        self.step_optimizer()
        mark("optimiser")
        if self.teacher is not None:
            self.follow(momentum_decay(self.updates, self.total_updates, config.momentum, config.momentum_end))
        self.updates += 1
        mark("momentum")
        return sums

    @torch.no_grad()
    def targets(self, views: Tensor) -> list[Tensor]:
        """Return the target [B, D] for each view of the student: the momentum encoder's output for the other view."""
        if self.teacher is None:
            return []
        others = [1, 0] if self.config.views == "symmetric" else [1]
        return [self.teacher.head(encode(self.teacher, views[i])[:, 1:].mean(1)) for i in others]

    def losses(self, views: Tensor, noise: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return L_MIM of view u, and the mean L_BC over the views of the student (zero for MAE)."""
        model, masking = self.student, self.student.mask(noise)
        latents = [encode(model, views[i], masking.visible_ids(i)) for i in range(max(1, len(targets)))]
        mim = mim_loss(model, latents[0], views[0], masking)
        if not targets:
            return mim, torch.zeros_like(mim)
        return mim, torch.stack([bc_loss(model, *pair) for pair in zip(latents, targets, strict=True)]).mean()

    def step_optimizer(self) -> None:
        """Unscale the gradients, compute their norm, clip them if asked, and step."""
        self.scaler.unscale_(self.optimizer)
        norms = [p.grad.norm() for p in self.student.parameters() if p.grad is not None]
        torch.stack(norms).norm().item()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Update the EMA copy of the student, tensor by tensor."""
        student = moving_state(self.student)
        for name, x in moving_state(self.teacher).items():
            x.mul_(decay).add_(student[name], alpha=1 - decay)
