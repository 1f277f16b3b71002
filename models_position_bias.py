"""Relative position bias in self-attention, which MAE (appendix A.4) adds to an encoder that is transferred to ADE20K.

Each head adds a learned number to the logit of every pair of tokens. The number depends on the offset between the two
patches alone; three more numbers serve the pairs with the cls token. Tables have BEiT's names and order of entries, so
BEiT's, SimMIM's and mmsegmentation's tables can be read. They start at 0, which leaves a pre-trained encoder unchanged.

Letters: h x w patches, N = 1 + h w tokens with cls in front, M heads, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

RelativeBias = Literal["none", "shared", "per_block"]
Grid = tuple[int, int]  # rows and columns of patches
TABLE = "relative_position_bias_table"
SHARED = "rel_pos_bias"  # the module of a table that all blocks share
CLS_ENTRIES = 3  # the last ones of a table: cls to a patch, a patch to cls, cls to cls


class RelativePositionBias(nn.Module):
    """A table [(2h - 1)(2w - 1) + 3, M] of one number per offset and head, and the bias [1, M, N, N] made from it.

    Args:
        grid: rows and columns of patches, h and w, of the images that the table is trained with.
    """

    def __init__(self, num_heads: int, grid: Grid):
        super().__init__()
        self.grid = tuple(grid)
        self.register_parameter(TABLE, nn.Parameter(torch.zeros(table_length(grid), num_heads)))
        self.register_buffer("index", pair_index(grid), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """Return the bias [1, M, N, N] for images of `grid` patches; rows are queries, columns are keys."""
        return bias_of_table(getattr(self, TABLE), self.index, self.grid, grid)


class BiasedAttention(Attention):
    """Self-attention with a bias table of its own. The bias is the mask of the fused kernel.

    Args:
        grid: as for `RelativePositionBias`.
        attention: the layer whose weights and settings are taken over.
    """

    def __init__(self, attention: Attention, grid: Grid):
        super().__init__(attention.qkv.in_features, attention.num_heads, qkv_bias=attention.qkv.bias is not None)
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.grid = self.window = tuple(grid)  # of the table, and of the images at present
        self.register_parameter(TABLE, nn.Parameter(torch.zeros(table_length(grid), self.num_heads)))
        self.register_buffer("index", pair_index(grid), persistent=False)

    def bias(self) -> Tensor:
        """Return the bias [1, M, N, N] for images of `window` patches."""
        return bias_of_table(getattr(self, TABLE), self.index, self.grid, self.window)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among tokens x [B, N, D]; the shape does not change."""
        return super().forward(x, attn_mask=self.bias())


def table_length(grid: Grid) -> int:
    """Return the number of entries of a table for a grid of patches."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLS_ENTRIES


def pair_index(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Return the entry of the table for each pair of tokens, [N * N] int32, query by query.

    An offset is the query's row and column minus the key's; offsets are numbered row by row from (1 - h, 1 - w).
    """
    h, w = grid
    rows = torch.arange(h, device=device).repeat_interleave(w)
    columns = torch.arange(w, device=device).repeat(h)
    offset_rows, offset_columns = (x[:, None] - x + side - 1 for x, side in ((rows, h), (columns, w)))
    index = F.pad(offset_rows * (2 * w - 1) + offset_columns, (1, 0, 1, 0))  # [N, N]
    from_cls, to_cls, itself = range(table_length(grid) - CLS_ENTRIES, table_length(grid))
    index[0], index[1:, 0], index[0, 0] = from_cls, to_cls, itself
    return index.flatten().int()


def bias_of_table(table: Tensor, index: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Return the bias [1, M, N, N] of `grid` patches from a table for `own` patches with its `pair_index`.

    Its type is autocast's, as that of the logits which it is added to.
    """
    if tuple(grid) != own:
        table, index = resample_table(table, own, grid), pair_index(grid, table.device)
    number = 1 + grid[0] * grid[1]
    bias = table.T.contiguous().index_select(1, index).view(1, -1, number, number)
    kind = table.device.type  # after the selection, whose gradient is a sum of many numbers
    return bias.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else bias


def resample_table(table: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Return a table for `wanted` patches: bicubic over the offsets, the largest to the largest, and 0 stays at 0.

    The pairs with cls keep their numbers. (BEiT interpolates at offsets in geometric progression instead.)
    """
    offsets = table[:-CLS_ENTRIES].T.unflatten(1, tuple(2 * side - 1 for side in grid)).unsqueeze(0)
    size = tuple(2 * side - 1 for side in wanted)
    resized = F.interpolate(offsets, size, mode="bicubic", align_corners=True)
    return torch.cat([resized[0].flatten(1).T, table[-CLS_ENTRIES:]])


# --------------------------------------------------------------------------------------------------------
# In a ViT
# --------------------------------------------------------------------------------------------------------


def add_position_bias(vit: VisionTransformer, kind: RelativeBias) -> None:
    """Give a ViT's attention a relative position bias, in place: one table per block, or one for all blocks."""
    grid = vit.patch_embed.grid_size
    if kind == "shared":
        setattr(vit, SHARED, RelativePositionBias(vit.blocks[0].attn.num_heads, grid))
    elif kind == "per_block":
        for block in vit.blocks:
            block.attn = BiasedAttention(block.attn, grid)


def shared_bias(vit: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Return the bias [1, M, N, N] of a table that all blocks share, for images [B, C, H, W], as timm's `attn_mask`.

    Tables of single blocks are told the grid of these images, whose bias they compute within the block.
    """
    grid = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    for block in vit.blocks:
        if isinstance(block.attn, BiasedAttention):
            block.attn.window = grid
    return {"attn_mask": getattr(vit, SHARED)(grid)} if hasattr(vit, SHARED) else {}


def bias_of_block(model: nn.Module, layer: int) -> Tensor | None:
    """Return the bias [1, M, N, N] that block `layer` adds, for images of the size of the latest forward pass.

    None if the model has none.
    """
    attention = model.blocks[layer].attn
    if isinstance(attention, BiasedAttention):
        return attention.bias()
    shared = getattr(model, SHARED, None)
    return None if shared is None else shared(model.patch_embed.grid_size)


# --------------------------------------------------------------------------------------------------------
# In a state dict
# --------------------------------------------------------------------------------------------------------


def transfer_part(name: str) -> str | None:
    """Return what a tensor belongs to that transfer adds to an encoder: bias tables or layer scale; else None."""
    if name.endswith(TABLE):
        return "relative position bias"
    return "layer scale" if name.endswith((".ls1.gamma", ".ls2.gamma")) else None


def added_layers(state: dict[str, Tensor]) -> dict[str, object]:
    """Return the arguments of models_vit.Classifier for the layers in a state dict that transfer adds."""
    tables = [name for name in state if transfer_part(name) == "relative position bias"]
    kind = "none" if not tables else "shared" if tables[0].startswith(SHARED) else "per_block"
    scaled = any(transfer_part(name) == "layer scale" for name in state)
    return dict(rel_pos_bias=kind, layer_scale=float(scaled))


def resampled_tables(state: dict[str, Tensor], grid: Grid, wanted: Grid) -> dict[str, Tensor]:
    """Return the tables of a state dict for `grid` patches, resampled for `wanted` patches."""
    return {
        name: resample_table(table.float(), grid, wanted)
        for name, table in state.items()
        if name.endswith(TABLE) and table.ndim == 2 and len(table) == table_length(grid)
    }
