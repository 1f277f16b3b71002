"""A ViT on patch vectors, shared by student, momentum encoder and every method of pre-training.

Read downwards: patches, positions, `Encoder`, and its blocks. Letters as in models_lut.py.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------
# Patches and positions
# --------------------------------------------------------------------------------------------------------


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] into patch vectors [B, L, P], each ordered (row, column, channel)."""
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)  # [B, L, P]


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [..., 1] of each patch vector [..., P], for --norm_pix_loss."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # the unbiased variance
    return mean, (var + 1e-6).sqrt()


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Put patch vectors [B, L, P] together to images [B, C, H, W]; the inverse of `patchify`."""
    B, _, P = patches.shape
    p, (rows, cols) = patch_size, grid_size
    x = patches.reshape(B, rows, cols, p, p, P // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, P // (p * p), rows * p, cols * p)  # [B, C, H, W]


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Select the rows `ids` [B, K] of each image's tokens [B, N, D], giving [B, K, D]."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def fixed_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Return 2-D sin-cos positions [1, 1 + L, dim] in MAE's order, with zeros for cls in front.

    timm stacks (sin, cos) x (row, column); MAE's layout is (column, row) x (sin, cos).
    """
    table = build_sincos2d_pos_embed(list(grid_size), dim)  # [L, dim]
    table = table.reshape(-1, 2, 2, dim // 4).transpose(1, 2).flip(1).reshape(-1, dim)
    return torch.cat([torch.zeros(1, dim), table]).unsqueeze(0)


# --------------------------------------------------------------------------------------------------------
# Encoder
# --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A ViT on patch vectors, with MAE's state-dict keys.

    Args: `img_size` and `patch_size` in pixels, each side of the image a multiple of the patch.
    """

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if img_size[0] % patch_size or img_size[1] % patch_size:
            raise ValueError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of 4 and of num_heads {num_heads}")
        self.shape = dict(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
        )  # fmt: skip
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", fixed_positions(embed_dim, self.grid_size))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(vit_block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def embed(self, patches: Tensor) -> Tensor:
        """Embed patch vectors [B, N, P] as tokens [B, N, D], computing the patch convolution as a matrix product.

        It takes vectors and not the image, so that hidden patches are never embedded.
        """
        kernel = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P] as (row, column, channel)
        return F.linear(patches, kernel, self.patch_embed.proj.bias)

    def encode(self, patches: Tensor, visible_ids: Tensor | None = None) -> Tensor:
        """Encode the patch vectors [B, L, P] that `visible_ids` [B, V] selects (None: all) to [B, 1 + V, D]."""
        positions = self.pos_embed[:, 1:].expand(patches.shape[0], -1, -1)
        if visible_ids is not None:
            patches, positions = take(patches, visible_ids), take(positions, visible_ids)
        return self.attend(self.embed(patches) + positions)

    def attend(self, tokens: Tensor) -> Tensor:
        """Put cls before the positioned patch tokens [B, N, D] and apply blocks and norm, giving [B, 1 + N, D]."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls, tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean patch token [B, D] of whole images [B, C, H, W], the features of kNN and probes."""
        return self.encode(patchify(images, self.patch_size))[:, 1:].mean(dim=1)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Name the depth of each parameter for timm's layer-wise lr decay: stem, block by block, then the rest."""
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=[(r"^blocks\.(\d+)", None)])


def vit_block(dim: int, num_heads: int, mlp_ratio: float, block: type[Block] = Block) -> Block:
    """Build a pre-norm ViT block with biases and LayerNorm eps 1e-6, as in MAE."""
    return block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def init_weights(module: nn.Module) -> None:
    """Initialise one module as MAE does; the patch projection counts as a linear layer."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim > 2 else module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Return V = int(L (1 - r)), truncated as MAE does, so that published checkpoints see the same number."""
    return int(num_patches * (1 - mask_ratio))


class Masking(NamedTuple):
    """The visible patches of each image: the first V of a random order of all patches."""

    shuffle: Tensor  # [B, L] patch ids in the order of the noise: the first V are visible in view u
    num_visible: int  # V

    def visible_ids(self, view: int = 0) -> Tensor:
        """Return the ids [B, V] of the patches that the student sees of view 0 or 1, disjoint between the views."""
        return self.shuffle[:, view * self.num_visible : (view + 1) * self.num_visible]

    def order(self, view: int = 0) -> Tensor:
        """Return the ids [B, L] of all patches, those that the student sees of this view in front."""
        return self.shuffle.roll(-view * self.num_visible, dims=1)

    @property
    def hidden_ids(self) -> Tensor:
        """The ids [B, L - V] of the patches of view u that the decoder must predict."""
        return self.shuffle[:, self.num_visible :]

    @property
    def ids_restore(self) -> Tensor:
        """The position [B, L] of each patch in `shuffle`."""
        return self.shuffle.argsort(dim=1)

    @property
    def mask(self) -> Tensor:
        """The mask of view u in image order, float [B, L], 1 = hidden."""
        return torch.ones_like(self.shuffle, dtype=torch.float32).scatter_(1, self.visible_ids(), 0.0)


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the V patches with the smallest noise [B, L]; the sort is stable, so that every device agrees on ties."""
    num_visible = num_visible_patches(noise.shape[1], mask_ratio)
    return Masking(shuffle=noise.argsort(dim=1, stable=True), num_visible=num_visible)


def mask_squares(noise: Tensor, mask_ratio: float, unit: int, grid_size: tuple[int, int]) -> Masking:
    """Hide or keep squares of `unit` x `unit` patches together, by the noise [B, L] of the first patch of each.

    The grid's sides must be multiples of `unit`.
    """
    rows, cols = grid_size
    squares = mask_from_noise(noise.unflatten(1, grid_size)[:, ::unit, ::unit].flatten(1), mask_ratio)
    ids = torch.arange(rows * cols, device=noise.device).view(rows // unit, unit, cols // unit, unit)
    ids = ids.transpose(1, 2).reshape(-1, unit * unit)  # [squares, patches of a square]
    return Masking(ids[squares.shuffle].flatten(1), squares.num_visible * unit * unit)


def independent_noise(noise: Tensor) -> Tensor:
    """Return noise of the same shape for a second mask, from digits that hardly ever decide the order of the first.

    Noise holds multiples of 2^-24. The first 12 bits decide the order, except for about one pair of patches in 4096;
    the second mask is drawn from the other bits.
    """
    return noise * 2**12 % 1
