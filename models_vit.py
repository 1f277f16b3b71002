"""Classifiers on a pre-trained encoder: timm's VisionTransformer, under timm's names.

`Classifier` is trained as a whole (fine-tuning); `LinearProbe` keeps the encoder frozen and in eval mode.

Letters: B images, C channels, H x W pixels, L patches, D width, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import DropPath as FloatDropPath
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models_encoder import fixed_positions
from models_position_bias import RelativeBias, add_position_bias, shared_bias

Pool = Literal["avg", "token"]  # mean of the patch tokens, or the cls token


class DropPath(nn.Module):
    """Stochastic depth per sample: x [B, ...] becomes 0 with probability `drop_prob`, else x / (1 - drop_prob).

    It equals timm's, but the rate is a tensor. torch.compile treats a float as a constant: it would compile each block
    with another rate anew, up to a limit, and run the blocks after that uncompiled.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.register_buffer("drop_prob", torch.tensor(drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of x [B, ...] while training; the shape does not change."""
        if not self.training:
            return x
        keeps = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.drop_prob
        return x * (keeps / (1 - self.drop_prob)).to(x.dtype)


class Classifier(VisionTransformer):
    """A ViT with a linear head, [B, C, H, W] to logits [B, K].

    `pool="avg"`: mean of the patch tokens, then a LayerNorm of its own (`fc_norm`), as MAE fine-tunes; `"token"`:
    LayerNorm (`norm`), then the cls token. Positions start as the fixed sines of pre-training and are trained.

    Args:
        architecture: a value of models_architectures.ARCHITECTURES; its decoder is ignored.
        img_size: height and width in pixels, multiples of `patch_size`.
        drop_path: rate of stochastic depth at the last block, falling linearly to 0 at the first.
        head_std: standard deviation of the head's initial weights; MAE uses 2e-5 for fine-tuning.
        rel_pos_bias: relative position bias in attention, of one table per block or one for all blocks.
        layer_scale: initial factor on what each attention layer and MLP adds (LayerScale); 0: none.
        vit: more arguments of timm's VisionTransformer.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        pool: Pool = "avg",
        drop_path: float = 0.0,
        head_std: float = 2e-5,
        rel_pos_bias: RelativeBias = "none",
        layer_scale: float = 0.0,
        **vit: Any,
    ):
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=architecture["embed_dim"],
            depth=architecture["depth"],
            num_heads=architecture["num_heads"],
            global_pool=pool,
            drop_path_rate=drop_path,
            init_values=layer_scale or None,
            **vit,
        )
        add_position_bias(self, rel_pos_bias)
        for block in self.blocks:
            for name, child in list(block.named_children()):
                if isinstance(child, FloatDropPath):
                    setattr(block, name, DropPath(child.drop_prob))
        with torch.no_grad():
            self.pos_embed.copy_(fixed_positions(self.embed_dim, self.patch_embed.grid_size))
        if num_classes:
            trunc_normal_(self.head.weight, std=head_std)

    def forward_features(self, x: Tensor, **more: Any) -> Tensor:
        """Return the tokens [B, N, D] of images [B, C, H, W]."""
        return super().forward_features(x, **more | shared_bias(self, x))

    def forward_intermediates(self, x: Tensor, *places: Any, **more: Any) -> Any:
        """Return the outputs of some blocks for images [B, C, H, W]; arguments are timm's."""
        return super().forward_intermediates(x, *places, **more | shared_bias(self, x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name the depth of each parameter for layer-wise lr decay: stem, block by block, norm and head at full rate.

        timm's own matcher counts the last norm to the last block; MAE (and Table D) give it the head's rate.
        """
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=[(r"^blocks\.(\d+)", None)])


class LinearProbe(Classifier):
    """MAE's linear probe: BatchNorm without affine parameters and a linear layer on a frozen encoder.

    The features are those of the pre-trained encoder: all tokens pass its last norm, then the cls token or the mean of
    the patch tokens is taken (L_BC trains the mean). `train()` leaves the encoder in eval mode.
    """

    def __init__(self, architecture: dict[str, Any], *, num_classes: int, head_std: float = 0.01, **vit: Any):
        super().__init__(architecture, num_classes=num_classes, head_std=head_std, fc_norm=False, **vit)
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.head = nn.Sequential(nn.BatchNorm1d(self.embed_dim, affine=False, eps=1e-6), self.head)

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the head alone to training mode, so that the encoder's dropout and running statistics stay off."""
        super().train(False)
        self.head.train(mode)
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, C, H, W], giving logits [B, K]; the encoder records no graph."""
        with torch.no_grad():
            features = self.forward_head(self.forward_features(images), pre_logits=True)  # [B, D]
        return self.head(features)
