"""LUT: a masked autoencoder whose visible tokens also learn (Kim et al., ECCV 2024).

Read downwards: `Student` (views -> losses), `LUT` (the student with MAE's decoder), `MomentumEncoder` (the context
encoder g of the paper). MAE (He et al., 2022) is `LUT` without heads. Beside it: the ViT with patchify and positions in
models_encoder.py with the masks, sizes in models_architectures.py, SimMIM in models_simmim.py.

Letters: B images, C channels, H x W pixels, p patch side, L = (H/p)(W/p) patches, V visible patches,
P = p*p*C numbers in a patch, D encoder width, E decoder width, G views that the student sees (1 or 2).
One mask polarity everywhere: 1 = hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models_encoder import (
    Encoder,
    Masking,
    fixed_positions,
    independent_noise,
    init_weights,
    mask_from_noise,
    mask_squares,
    num_visible_patches,
    patch_statistics,
    patchify,
    take,
    vit_block,
)
from util.optim.losses import DISTANCES
from util.runtime.sharding import local

# --------------------------------------------------------------------------------------------------------
# Student: what is the same for every method of masked image modelling
# --------------------------------------------------------------------------------------------------------


HEAD_NORMS = {"BN": nn.BatchNorm1d, "LN": nn.LayerNorm, "none": None}
HEAD_ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU}


def mlp_head(
    dim: int, hidden_dim: int, depth: int, norm: str = "BN", activation: str = "ReLU", out_dim: int | None = None
) -> nn.Sequential:
    """Return `depth` linear layers without bias, with norm and activation between them: D -> hidden -> ... -> out.

    The output has the input's width unless `out_dim` says otherwise.
    """
    layers: list[nn.Module] = []
    out_dim = out_dim or dim
    for i in range(depth):
        last = i == depth - 1
        layers.append(nn.Linear(hidden_dim if i else dim, out_dim if last else hidden_dim, bias=False))
        if not last:
            layers += [HEAD_NORMS[norm](hidden_dim)] if HEAD_NORMS[norm] else []
            layers.append(HEAD_ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Steering:
    """The switches of Table 4: the way in which the context encoder steers the student. Defaults are the paper's."""

    steered_tokens: Literal["visible", "all"] = "visible"  # 4a; all: also the mean of what the mask tokens become
    context_token: Literal["avg", "cls"] = "avg"  # 4b; of student and context encoder: mean of the patch tokens, or cls
    supervision: Literal["context", "token", "both"] = "context"  # 4c; token: each visible token, at its own place
    distance: str = "cosine"  # 4d; a key of util.optim.losses.DISTANCES
    infonce_temperature: float = 0.2
    context_mask_ratio: float = 0.0  # 4e; share of patches hidden from the context encoder


class Targets(NamedTuple):
    """The momentum encoder's outputs for the views; None where --supervision does not need them."""

    context: Tensor | None  # [G, B, D] v̂; with InfoNCE and --accum_iter M more rows, of other batches: negatives
    tokens: Tensor | None  # [G, B, L, D] the same of each patch token, in image order


class Losses(NamedTuple):
    """Scalars, each a mean over the batch and not yet weighted (Eq. 3)."""

    mim: Tensor  # L_MIM, Eq. 1; zero without a decoder
    bc: Tensor  # L_BC, "broader contextualization"; zero without heads


def context_token(latent: Tensor, kind: Literal["avg", "cls"]) -> Tensor:
    """Return ũ or ṽ of Section 3, [B, D]: the mean of the patch tokens in [B, 1 + N, D], or the cls token."""
    return latent[:, 0] if kind == "cls" else latent[:, 1:].mean(dim=1)


class Student(Encoder):
    """A method of masked image modelling with its own L_MIM, plus LUT's L_BC through a projector and a predictor.

    Each method is a subclass, which defines how views are encoded (`encode_views`), which tokens represent the hidden
    patches (`decode`), how pixels are predicted from them (`to_pixels`) and compared (`pixel_loss`).

    Args:
        mask_ratio: share of patches hidden from the student.
        mask_unit_patches: side of the squares that are hidden together, in patches.
        norm_pix_loss: predict each patch after removing its mean and dividing by its deviation.
        reconstructs: False builds no decoder, for training with L_BC alone (Table C).
        steering: the terms of L_BC.
        encoder: the arguments of `Encoder`.
    """

    pixel_loss = staticmethod(F.mse_loss)

    def __init__(
        self,
        *,
        mask_ratio: float = 0.75,
        mask_unit_patches: int = 1,
        norm_pix_loss: bool = True,
        reconstructs: bool = True,
        steering: Steering = Steering(),
        **encoder,
    ):
        super().__init__(**encoder)
        self.mask_ratio, self.mask_unit_patches, self.norm_pix_loss = mask_ratio, mask_unit_patches, norm_pix_loss
        self.reconstructs, self.steering = reconstructs, steering
        options = dict(temperature=steering.infonce_temperature) if steering.distance == "infonce" else {}
        self.distance = partial(DISTANCES[steering.distance], **options)

    def initialise(self) -> None:
        """Give all weights MAE's initialisation."""
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)

    def add_heads(self, heads: Mapping | None, head_depth: int, predictor_depth: int, token_width: int) -> None:
        """Add projector and predictor; last, so that a method starts from the same weights with them and without.

        Args:
            heads: the keywords of `mlp_head` besides widths and `depth`; None builds the method alone.
            head_depth, predictor_depth: number of linear layers in each.
            token_width: width of the tokens that `decode` gives.
        """
        if heads is None:
            return
        D = self.embed_dim
        self.head = mlp_head(D, depth=head_depth, **heads).apply(init_weights)  # the projector, by its name in files
        self.predictor = mlp_head(D, depth=predictor_depth, **heads).apply(init_weights)
        if self.steering.steered_tokens == "all":
            self.mask_head = mlp_head(token_width, depth=head_depth, out_dim=D, **heads).apply(init_weights)
            self.mask_predictor = mlp_head(D, depth=predictor_depth, **heads).apply(init_weights)

    @property
    def num_visible(self) -> int:
        """The number V of patches that the student sees of each view."""
        squares = self.num_patches // self.mask_unit_patches**2
        return num_visible_patches(squares, self.mask_ratio) * self.mask_unit_patches**2

    def mask(self, noise: Tensor) -> Masking:
        """Choose the visible patches by the order of the noise [B, L]."""
        if self.mask_unit_patches == 1:
            return mask_from_noise(noise, self.mask_ratio)
        return mask_squares(noise, self.mask_ratio, self.mask_unit_patches, self.grid_size)

    def forward(self, views: Tensor, noise: Tensor, targets: Targets | None = None) -> Losses:
        """Return the losses of one batch.

        Args:
            views: [G, B, C, H, W] normalised. G = 1: view u alone, the paper's form. G = 2: both views, each
                with visible patches of its own, the release's form; L_MIM is that of view u in both.
            noise: [B, L], its order decides which patches are visible.
            targets: the momentum encoder's output for each of these views, or None without L_BC.
        """
        masking = self.mask(noise)
        patches = patchify(views.flatten(0, 1), self.patch_size)  # [G*B, L, P]
        latents = self.encode_views(patches, masking).unflatten(0, views.shape[:2])  # [G, B, 1 + V or 1 + L, D]
        hidden = self.decode(latents[0], masking, hidden_only=True) if self.reconstructs else None

        own_patches = patches[: views.shape[1]]  # [B, L, P] of the first view, u
        mim = self.mim_loss(hidden, own_patches, masking) if self.reconstructs else views.new_zeros(())
        bc = self.bc_loss(latents, hidden, targets, masking) if targets is not None else torch.zeros_like(mim)
        return Losses(mim, bc)

    def encode_views(self, patches: Tensor, masking: Masking) -> Tensor:
        """Encode patch vectors [G*B, L, P]; the first 1 + V latents are cls and the visible patches of each view."""
        raise NotImplementedError

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """Decode the latents of view u to tokens in shuffled order: cls and all patches [B, 1 + L, E], or with
        `hidden_only` the hidden patches [B, L - V, E]."""
        raise NotImplementedError

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """Predict patch vectors [B, N, P] from tokens [B, N, E]."""
        raise NotImplementedError

    def mim_loss(self, hidden: Tensor, patches: Tensor, masking: Masking) -> Tensor:
        """Return L_MIM of Eq. 1: the mean `pixel_loss` over the hidden patches and their P numbers.

        Args:
            hidden: [B, L - V, E], the decoded tokens of the hidden patches.
            patches: [B, L, P], all patches of view u.
        """
        target = take(patches, masking.hidden_ids)  # [B, L - V, P]
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return self.pixel_loss(self.to_pixels(hidden).float(), target.float())

    def bc_loss(self, latents: Tensor, hidden: Tensor | None, targets: Targets, masking: Masking) -> Tensor:
        """Return L_BC: the mean of its terms, so that alpha means the same for any number of terms.

        - Context: û against v̂, for each view.
        - Token-wise supervision: each visible token against the context encoder's token at the same place, through the
          same heads, for each view.
        - All tokens steered: the mean of view u's hidden tokens [B, L - V, E] against v̂, through heads of their own.

        Each term passes the heads on its own, so that BatchNorm normalises one kind of token of one view at a time, as
        in the release. The running statistics, which the momentum encoder uses, average over all of them.
        """
        terms = []
        if targets.context is not None:
            terms += [self.distance(self.predict(x), y) for x, y in zip(latents, targets.context, strict=True)]
        if targets.tokens is not None:
            for view, (x, y) in enumerate(zip(latents, targets.tokens, strict=True)):
                predicted = self.predictor(self.head(x[:, 1 : 1 + self.num_visible].flatten(0, 1)))  # [B*V, D]
                terms.append(self.distance(predicted, take(y, masking.visible_ids(view)).flatten(0, 1)))
        if self.steering.steered_tokens == "all":
            predicted = self.mask_predictor(self.mask_head(hidden.mean(dim=1)))
            terms.append(self.distance(predicted, targets.context[0]))
        return torch.stack(terms).mean()

    def predict(self, latent: Tensor) -> Tensor:
        """Return û of Section 3, [B, D]: predictor(projector(context token)) of the visible part of `latent`."""
        visible = latent[:, : 1 + self.num_visible]
        return self.predictor(self.head(context_token(visible, self.steering.context_token)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask [B, L] (1 = hidden) and predicted patch vectors [B, L, P] in image order, for pictures."""
        masking = self.mask(noise)
        latent = self.encode_views(patchify(images, self.patch_size), masking)
        return masking.mask, self.to_pixels(take(self.decode(latent, masking)[:, 1:], masking.ids_restore))


# --------------------------------------------------------------------------------------------------------
# LUT on MAE
# --------------------------------------------------------------------------------------------------------


class DecoderBlock(Block):
    """A ViT block that can compute its last tokens only."""

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map [B, N, E] to [B, N, E], or to the last tokens [B, `last`, E] alone, which attend to all N."""
        if last is None:
            return super().forward(x)
        B, _, E = x.shape
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        normed = self.norm1(x)
        q = F.linear(normed[:, -last:], weight[:E], bias[:E]).unflatten(-1, (self.attn.num_heads, -1))
        kv = F.linear(normed, weight[E:], bias[E:]).unflatten(-1, (2, self.attn.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, E / heads]
        q = q.transpose(1, 2)
        if self.attn.fused_attn:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:  # see util.runtime.amp.choose_attention
            attended = (q * self.attn.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x[:, -last:] + self.attn.proj(attended.transpose(1, 2).reshape(B, last, E))
        return x + self.mlp(self.norm2(x))


class LUT(Student):
    """The paper's LUT on MAE: the encoder sees the visible patches only, a decoder of ViT blocks predicts the others.

    Args:
        heads, head_depth, predictor_depth: see `add_heads`.
        student: the arguments of `Student` and `Encoder`.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        heads: Mapping | None = None,
        head_depth: int = 2,
        predictor_depth: int = 2,
        **student,
    ):
        super().__init__(**student)
        E, mlp_ratio = decoder_embed_dim, self.shape["mlp_ratio"]
        if self.reconstructs:
            self.decoder_embed = nn.Linear(self.embed_dim, E)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
            self.register_buffer("decoder_pos_embed", fixed_positions(E, self.grid_size))
            self.decoder_blocks = nn.ModuleList(
                vit_block(E, decoder_num_heads, mlp_ratio, DecoderBlock) for _ in range(decoder_depth)
            )
            self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
            self.decoder_pred = nn.Linear(E, self.patch_size**2 * self.in_chans)
        self.initialise()
        self.add_heads(heads, head_depth, predictor_depth, token_width=E)

    def encode_views(self, patches: Tensor, masking: Masking) -> Tensor:
        """Encode the visible ones of the patches [G*B, L, P] to [G*B, 1 + V, D]."""
        num_views = len(patches) // len(masking.shuffle)
        return self.encode(patches, torch.cat([masking.visible_ids(view) for view in range(num_views)]))

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """Decode the visible patches' latents [B, 1 + V, D] to tokens [B, 1 + L, E] in shuffled order.

        With `hidden_only` the last block computes only the hidden patches' tokens, [B, L - V, E]. Attention ignores
        the order of its tokens, so they keep the shuffled order with their own positions: this saves restoring the
        order and makes the hidden ones a slice.
        """
        x = self.decoder_embed(latent)
        B, E, num_hidden = x.shape[0], x.shape[2], masking.hidden_ids.shape[1]
        positions = self.decoder_pos_embed[:, 1:].expand(B, -1, -1)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(B, num_hidden, E)], dim=1)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(B, -1, -1), take(positions, masking.shuffle)], 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_norm(self.decoder_blocks[-1](x, num_hidden if hidden_only else None))

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """Predict patch vectors [B, N, P] from tokens [B, N, E]."""
        return self.decoder_pred(tokens)


# --------------------------------------------------------------------------------------------------------
# Momentum encoder
# --------------------------------------------------------------------------------------------------------


class MomentumEncoder(Encoder):
    """The context encoder g and its projector: an EMA of the student, never trained itself.

    It is always in eval mode, without gradients, on the student's device. Its weights are fp32; the autocast around it
    chooses the precision of its products. It holds no decoder, no mask token and no predictor.
    """

    def __init__(self, student: Student):
        super().__init__(**student.shape)
        self.to(student.pos_embed.device)
        self.steering = student.steering
        self.head = copy.deepcopy(student.head)
        state = student.state_dict()
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Stay in eval mode: BatchNorm of the projector must use its running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Tensor, noise: Tensor) -> Targets:
        """Return v̂ of Section 3, momentum projector(context token), for each view, and the same for each token.

        Args:
            views: [G, B, C, H, W] normalised. The encoder sees all patches, unless `context_mask_ratio` hides some: the
                same ones in both views, left out as in MAE, whatever the student's method.
            noise: [B, L], the student's.
        """
        steering, patches = self.steering, patchify(views.flatten(0, 1), self.patch_size)
        visible_ids = None
        if steering.context_mask_ratio > 0:
            masking = mask_from_noise(independent_noise(noise), steering.context_mask_ratio)
            visible_ids = masking.visible_ids().repeat(len(views), 1)
        latents = self.encode(patches, visible_ids)  # [G*B, 1 + L, D]
        context = tokens = None
        if steering.supervision != "token":
            context = self.head(context_token(latents, steering.context_token)).unflatten(0, views.shape[:2])
        if steering.supervision != "context":
            tokens = self.head(latents[:, 1:].flatten(0, 1)).unflatten(0, (*views.shape[:2], -1))
        return Targets(context, tokens)

    @torch.no_grad()
    def update(self, student: Student, decay: float) -> None:
        """Move one step of the EMA: self <- decay * self + (1 - decay) * student.

        It covers parameters and BatchNorm's running statistics, not fixed positions and counters. Call it once after
        each optimiser step that was taken.
        """
        averages, weights = moving_state(self), moving_state(student)
        torch._foreach_lerp_(list(averages.values()), [weights[name] for name in averages], 1 - decay)


def moving_state(module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that training changes by name: parameters (this rank's part) and running statistics."""
    running = {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return {name: local(p) for name, p in module.named_parameters()} | running
