"""LUT: a masked autoencoder whose visible tokens also learn (Kim et al., ECCV 2024).

Read downwards: masking, `Student` (views -> losses), `LUT` (the student with MAE's decoder), `MomentumEncoder` (the
context encoder g of the paper), and the table of models. MAE (He et al., 2022) is `LUT` without heads. The ViT itself
is in models_encoder.py, SimMIM as another method in models_simmim.py.

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

from models_encoder import Encoder, fixed_positions, init_weights, patch_statistics, patchify, take, vit_block
from util.optim.losses import DISTANCES
from util.runtime.sharding import local

# --------------------------------------------------------------------------------------------------------
# Masking
# --------------------------------------------------------------------------------------------------------


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """V = int(L (1 - r)), truncated as MAE does, so that published checkpoints see the same number."""
    return int(num_patches * (1 - mask_ratio))


class Masking(NamedTuple):
    """Which patches of each image are visible; a random order of all patches says it."""

    shuffle: Tensor  # [B, L] patch ids in the order of the noise: the first V are visible in view u
    num_visible: int  # V

    def visible_ids(self, view: int = 0) -> Tensor:
        """[B, V] ids of the patches that the student sees of view 0 or 1, disjoint between the views."""
        return self.shuffle[:, view * self.num_visible : (view + 1) * self.num_visible]

    def order(self, view: int = 0) -> Tensor:
        """[B, L] ids of all patches, those that the student sees of this view in front."""
        return self.shuffle.roll(-view * self.num_visible, dims=1)

    @property
    def hidden_ids(self) -> Tensor:
        """[B, L - V] ids of the patches of view u that the decoder must predict."""
        return self.shuffle[:, self.num_visible :]

    @property
    def ids_restore(self) -> Tensor:
        """[B, L] place of each patch in `shuffle`."""
        return self.shuffle.argsort(dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, L] float, 1 = hidden."""
        return torch.ones_like(self.shuffle, dtype=torch.float32).scatter_(1, self.visible_ids(), 0.0)


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the V patches with the smallest noise [B, L]; a stable sort, so that every device agrees on ties."""
    num_visible = num_visible_patches(noise.shape[1], mask_ratio)
    return Masking(shuffle=noise.argsort(dim=1, stable=True), num_visible=num_visible)


def mask_squares(noise: Tensor, mask_ratio: float, unit: int, grid_size: tuple[int, int]) -> Masking:
    """As `mask_from_noise`, but squares of `unit` x `unit` patches are hidden or visible together.

    The noise of a square is that of its first patch. The grid's sides are multiples of `unit`.
    """
    rows, cols = grid_size
    squares = mask_from_noise(noise.unflatten(1, grid_size)[:, ::unit, ::unit].flatten(1), mask_ratio)
    ids = torch.arange(rows * cols, device=noise.device).view(rows // unit, unit, cols // unit, unit)
    ids = ids.transpose(1, 2).reshape(-1, unit * unit)  # [squares, patches of a square]
    return Masking(ids[squares.shuffle].flatten(1), squares.num_visible * unit * unit)


def independent_noise(noise: Tensor) -> Tensor:
    """Noise of the same shape for a second mask, made of digits that hardly ever decide the order of the first.

    Noise holds multiples of 2^-24: the order follows from the first 12 bits but for about one pair of patches in 4096,
    and this is what the other bits say.
    """
    return noise * 2**12 % 1


# --------------------------------------------------------------------------------------------------------
# Student: what is the same for every method of masked image modelling
# --------------------------------------------------------------------------------------------------------


HEAD_NORMS = {"BN": nn.BatchNorm1d, "LN": nn.LayerNorm, "none": None}
HEAD_ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU}


def mlp_head(
    dim: int, hidden_dim: int, depth: int, norm: str = "BN", activation: str = "ReLU", out_dim: int | None = None
) -> nn.Sequential:
    """`depth` linear layers without bias, norm and activation between, none at the end; by default D -> ... -> D."""
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
    """How the context encoder steers the student's tokens; each default is the paper's choice in its Table 4."""

    steered_tokens: Literal["visible", "all"] = "visible"  # 4a; all: also the mean of what the mask tokens become
    context_token: Literal["avg", "cls"] = "avg"  # 4b; of student and context encoder: mean of the patch tokens, or cls
    supervision: Literal["context", "token", "both"] = "context"  # 4c; token: each visible token, at its own place
    distance: str = "cosine"  # 4d; a key of util.optim.losses.DISTANCES
    infonce_temperature: float = 0.2
    context_mask_ratio: float = 0.0  # 4e; share of patches hidden from the context encoder


class Targets(NamedTuple):
    """What the momentum encoder makes of views; None where the supervision does not ask for it."""

    context: Tensor | None  # [G, B, D] v̂; InfoNCE takes more rows, [G, B + M, D], the last M as negatives alone
    tokens: Tensor | None  # [G, B, L, D] the same of each patch token, in image order


class Losses(NamedTuple):
    """Scalars, each a mean over the batch and not yet weighted (Eq. 3)."""

    mim: Tensor  # L_MIM, Eq. 1; zero without a decoder
    bc: Tensor  # L_BC, "broader contextualization"; zero without heads


def context_token(latent: Tensor, kind: Literal["avg", "cls"]) -> Tensor:
    """ũ and ṽ of Section 3: mean of the patch tokens of [B, 1 + N, D], or cls, [B, D]."""
    return latent[:, 0] if kind == "cls" else latent[:, 1:].mean(dim=1)


class Student(Encoder):
    """What LUT makes of a method of masked image modelling: L_MIM as that has it, and L_BC by projector and predictor.

    The method is a subclass: it says how views are encoded (`encode_views`), what stands for the hidden patches
    (`decode`), how pixels are predicted of that (`to_pixels`) and compared (`pixel_loss`).

    Args:
        mask_ratio: share of patches hidden from the student.
        mask_unit_patches: patches are hidden in squares of so many by so many.
        norm_pix_loss: predict each patch after removing its mean and dividing by its deviation.
        reconstructs: False builds no decoder, for training with L_BC alone (Table C).
        steering: what L_BC is made of.
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
        """MAE's initialisation of all that is there."""
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)

    def add_heads(self, heads: Mapping | None, head_depth: int, predictor_depth: int, hidden_width: int) -> None:
        """Projector and predictor; last, so that a method starts from the same weights with them and without.

        Args:
            heads: the keywords of `mlp_head` besides widths and `depth`; None builds the method alone.
            head_depth, predictor_depth: number of linear layers in each.
            hidden_width: of the tokens that `decode` gives.
        """
        if heads is None:
            return
        D = self.embed_dim
        self.head = mlp_head(D, depth=head_depth, **heads).apply(init_weights)
        self.predictor = mlp_head(D, depth=predictor_depth, **heads).apply(init_weights)
        if self.steering.steered_tokens == "all":
            self.mask_head = mlp_head(hidden_width, depth=head_depth, out_dim=D, **heads).apply(init_weights)
            self.mask_predictor = mlp_head(D, depth=predictor_depth, **heads).apply(init_weights)

    @property
    def num_visible(self) -> int:
        """V."""
        squares = self.num_patches // self.mask_unit_patches**2
        return num_visible_patches(squares, self.mask_ratio) * self.mask_unit_patches**2

    def mask(self, noise: Tensor) -> Masking:
        """Which patches are visible, by the order of the noise [B, L]."""
        if self.mask_unit_patches == 1:
            return mask_from_noise(noise, self.mask_ratio)
        return mask_squares(noise, self.mask_ratio, self.mask_unit_patches, self.grid_size)

    def forward(self, views: Tensor, noise: Tensor, targets: Targets | None = None) -> Losses:
        """Losses of one batch.

        Args:
            views: [G, B, C, H, W] normalised. G = 1: view u alone, the paper's form. G = 2: both views, each
                with visible patches of its own, the release's form; L_MIM is that of view u in both.
            noise: [B, L], its order decides which patches are visible.
            targets: what the momentum encoder made for each of these views, or None without L_BC.
        """
        masking = self.mask(noise)
        patches = patchify(views.flatten(0, 1), self.patch_size)  # [G*B, L, P]
        latents = self.encode_views(patches, masking).unflatten(0, views.shape[:2])  # [G, B, 1 + V or 1 + L, D]
        hidden = self.decode(latents[0], masking, hidden_only=True) if self.reconstructs else None

        mim = self.mim_loss(hidden, patches[: views.shape[1]], masking) if self.reconstructs else views.new_zeros(())
        bc = self.bc_loss(latents, hidden, targets, masking) if targets is not None else torch.zeros_like(mim)
        return Losses(mim, bc)

    def encode_views(self, patches: Tensor, masking: Masking) -> Tensor:
        """[G*B, L, P] to latents whose first 1 + V are cls and the visible patches of each view."""
        raise NotImplementedError

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """Latents of view u to tokens of width E in the order of the shuffle: of cls and all patches, [B, 1 + L, E], or
        of the hidden ones, [B, L - V, E]."""
        raise NotImplementedError

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """[B, N, E] to patch vectors [B, N, P]."""
        raise NotImplementedError

    def mim_loss(self, hidden: Tensor, patches: Tensor, masking: Masking) -> Tensor:
        """Eq. 1: `pixel_loss` of the hidden patches, mean over them and their numbers.

        Args:
            hidden: [B, L - V, E], what `decode` made of them.
            patches: [B, L, P] of view u.
        """
        target = take(patches, masking.hidden_ids)  # [B, L - V, P]
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return self.pixel_loss(self.to_pixels(hidden).float(), target.float())

    def bc_loss(self, latents: Tensor, hidden: Tensor | None, targets: Targets, masking: Masking) -> Tensor:
        """L_BC: the mean of its terms, so that alpha means the same whichever of them there are.

        For each view û against v̂; with token-wise supervision each visible token against the context encoder's token
        at its place, through the same heads; with all tokens steered the mean of the hidden tokens [B, L - V, E], which
        are view u's, against v̂ too, through heads of their own. Each on its own, so that BatchNorm sees the
        statistics of one kind of token of one view at a time (of views as released). Its running statistics, which the
        momentum encoder normalises with, are of all kinds that pass through the projector.
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
        """û of Section 3: predictor(projector(context token)) of what is visible, [B, 1 + V, D] to [B, D]."""
        visible = latent[:, : 1 + self.num_visible]
        return self.predictor(self.head(context_token(visible, self.steering.context_token)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """For pictures: mask [B, L] (1 = hidden) and the predicted patch vectors [B, L, P], in image order."""
        masking = self.mask(noise)
        latent = self.encode_views(patchify(images, self.patch_size), masking)
        return masking.mask, self.to_pixels(take(self.decode(latent, masking)[:, 1:], masking.ids_restore))


# --------------------------------------------------------------------------------------------------------
# LUT on MAE
# --------------------------------------------------------------------------------------------------------


class DecoderBlock(Block):
    """A ViT block that can be asked for some of its tokens only."""

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, N, E] to [B, N, E], or to [B, `last`, E]: what the block makes of the last tokens, which see all."""
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
            seen = F.scaled_dot_product_attention(q, k, v)
        else:  # see util.runtime.amp.choose_attention
            seen = (q * self.attn.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x[:, -last:] + self.attn.proj(seen.transpose(1, 2).reshape(B, last, E))
        return x + self.mlp(self.norm2(x))


class LUT(Student):
    """LUT on MAE, the paper's: the encoder sees visible patches alone, a decoder of ViT blocks predicts the others.

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
        self.add_heads(heads, head_depth, predictor_depth, hidden_width=E)

    def encode_views(self, patches: Tensor, masking: Masking) -> Tensor:
        """[G*B, L, P] to [G*B, 1 + V, D]: hidden patches are left out."""
        num_views = len(patches) // len(masking.shuffle)
        return self.encode(patches, torch.cat([masking.visible_ids(view) for view in range(num_views)]))

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """Latent [B, 1 + V, D] of the visible patches to the decoder's tokens [B, 1 + L, E], shuffled.

        With `hidden_only` to those of the hidden patches, [B, L - V, E]: the last block computes no others.
        Attention does not care for the order of its tokens: they stay in the order of the shuffle with their
        own positions, which saves restoring the order and makes the hidden ones a slice.
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
        """[B, N, E] to patch vectors [B, N, P]."""
        return self.decoder_pred(tokens)


# --------------------------------------------------------------------------------------------------------
# Momentum encoder
# --------------------------------------------------------------------------------------------------------


class MomentumEncoder(Encoder):
    """The context encoder g and its projector: a moving average of the student, never trained itself.

    Always in eval mode, without gradients, on the student's device; its weights are fp32, its products as the autocast
    around it says. Holds no decoder, no mask token and no predictor.
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
        """v̂ of Section 3: momentum projector(mean of the patch tokens) of each view, and the same of each token.

        Args:
            views: [G, B, C, H, W] normalised. All patches are seen, unless `context_mask_ratio` hides some: then the
                same ones of both views, left out as MAE does, whatever the student's method.
            noise: [B, L] the student's.
        """
        steering, patches = self.steering, patchify(views.flatten(0, 1), self.patch_size)
        seen_ids = None
        if steering.context_mask_ratio > 0:
            masking = mask_from_noise(independent_noise(noise), steering.context_mask_ratio)
            seen_ids = masking.visible_ids().repeat(len(views), 1)
        latents = self.encode(patches, seen_ids)  # [G*B, 1 + L, D]
        context = tokens = None
        if steering.supervision != "token":
            context = self.head(context_token(latents, steering.context_token)).unflatten(0, views.shape[:2])
        if steering.supervision != "context":
            tokens = self.head(latents[:, 1:].flatten(0, 1)).unflatten(0, (*views.shape[:2], -1))
        return Targets(context, tokens)

    @torch.no_grad()
    def update(self, student: Student, decay: float) -> None:
        """One step of the moving average: self <- decay * self + (1 - decay) * student.

        Parameters and BatchNorm's running statistics; the fixed positions and counters stay. Call it once after
        each optimiser step that was taken.
        """
        mine, theirs = moving_state(self), moving_state(student)
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - decay)


def moving_state(module: nn.Module) -> dict[str, Tensor]:
    """Name to tensor of all that training changes: parameters (this rank's part of them) and running statistics."""
    running = {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return {name: local(p) for name, p in module.named_parameters()} | running


# --------------------------------------------------------------------------------------------------------
# Table of models
# --------------------------------------------------------------------------------------------------------

_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)  # MAE's, for every size
_SMALL_DECODER = dict(decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "medium": dict(embed_dim=512, depth=12, num_heads=8),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}

# Name without its prefix -> arguments of LUT; img_size is the default of --input_size.
ARCHITECTURES: dict[str, dict] = {
    "vit_small_patch16": dict(img_size=224, patch_size=16, **_SIZES["small"], **_DECODER),
    "vit_medium_patch16": dict(img_size=224, patch_size=16, **_SIZES["medium"], **_DECODER),
    "vit_base_patch16": dict(img_size=224, patch_size=16, **_SIZES["base"], **_DECODER),
    "vit_large_patch16": dict(img_size=224, patch_size=16, **_SIZES["large"], **_DECODER),
    "vit_huge_patch14": dict(img_size=224, patch_size=14, **_SIZES["huge"], **_DECODER),
    # small images: 32 pixels (CIFAR) and 64 pixels (Tiny-ImageNet)
    "vit_nano_patch4": dict(
        img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2,
    ),
    "vit_tiny_patch4": dict(img_size=32, patch_size=4, **_SIZES["tiny"], **_SMALL_DECODER),
    "vit_tiny_patch8": dict(img_size=64, patch_size=8, **_SIZES["tiny"], **_SMALL_DECODER),
    "vit_small_patch4": dict(img_size=32, patch_size=4, **_SIZES["small"], **_SMALL_DECODER),
    "vit_small_patch8": dict(img_size=64, patch_size=8, **_SIZES["small"], **_SMALL_DECODER),
}  # fmt: skip

# Both prefixes name the same architecture; `mae_` makes alpha 0 the default (see PretrainConfig.resolved_alpha).
MODELS: dict[str, dict] = {
    f"{prefix}_{name}": shape for prefix in ("lut", "mae") for name, shape in ARCHITECTURES.items()
}
