"""UperNet (Xiao et al. 2018) on a plain ViT: features of four depths, rescaled to a pyramid, give logits per pixel.

Read downwards: `UperNet`, the ViT with its pyramid and heads; `rescaled`, a level of the pyramid; the two heads.

Letters: B images, C channels, H x W pixels, h x w of a feature map, D and M width of ViT and heads, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models_vit import Classifier

STRIDES = (4, 8, 16, 32)  # of the pyramid, in pixels, for a patch of a power of two
DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)  # blocks 3, 5, 7 and 11 of twelve, counted from 0: BEiT's, which MAE follows
POOLS = (1, 2, 3, 6)  # sides of the grids that the top of the pyramid is pooled into
AUXILIARY_LEVEL = 2  # of the pyramid: stride 16


class Logits(NamedTuple):
    """The logits of both heads, at the resolution of their features."""

    main: Tensor  # [B, K, H/4, W/4]
    auxiliary: Tensor  # [B, K, H/16, W/16]


class UperNet(Classifier):
    """A ViT, without its last norm, whose feature maps pass through a pyramid into a decode head.

    The ViT's parameters have timm's names, so that pre-trained encoders load and layer-wise rates apply as in
    fine-tuning. Neck and heads learn at the full rate.

    Args:
        architecture: a value of models_architectures.ARCHITECTURES.
        img_size: height and width in pixels of the training crops, multiples of `patch_size`. Images of other sizes
            are possible; positions are resampled for them.
        head_width: channels M of the decode head.
        auxiliary_width: channels of the auxiliary head; None: half of `head_width`.
        drop_path: rate of stochastic depth at the ViT's last block.
        dropout: probability that a channel is dropped before the classifiers.
        vit: more arguments of models_vit.Classifier.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        head_width: int = 512,
        auxiliary_width: int | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.1,
        **vit: Any,
    ):
        super().__init__(
            architecture,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            pool="token",
            drop_path=drop_path,
            final_norm=False,
            dynamic_img_size=True,
            **vit,
        )
        dim = self.embed_dim
        self.feature_blocks = feature_blocks(len(self.blocks))
        self.neck = nn.ModuleList(rescaled(dim, patch_size, stride) for stride in STRIDES)
        self.decode_head = DecodeHead(dim, head_width, num_classes, dropout)
        self.auxiliary_head = AuxiliaryHead(dim, auxiliary_width or max(1, head_width // 2), num_classes, dropout)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return feature maps [B, D, H/s, W/s] of images [B, C, H, W] for each s in `STRIDES`."""
        maps = self.forward_intermediates(images, indices=list(self.feature_blocks), intermediates_only=True)
        return [rescale(x) for rescale, x in zip(self.neck, maps, strict=True)]

    def forward(self, images: Tensor) -> Logits:
        """Return both heads' logits for images [B, C, H, W], for training; H and W are multiples of the patch."""
        pyramid = self.pyramid(images)
        return Logits(self.decode_head(pyramid), self.auxiliary_head(pyramid[AUXILIARY_LEVEL]))

    def predict(self, images: Tensor) -> Tensor:
        """Return the decode head's logits [B, K, H, W] of each pixel of images [B, C, H, W], as in `forward`."""
        return resized(self.decode_head(self.pyramid(images)).float(), images.shape[-2:])


def feature_blocks(depth: int) -> tuple[int, ...]:
    """Return the blocks, counted from 0, whose outputs make the pyramid.

    Raises:
        ValueError: the ViT has too few blocks for four different ones.
    """
    blocks = tuple(round(depth * share) - 1 for share in DEPTHS)
    if blocks[0] < 0 or len(set(blocks)) < len(blocks):
        raise ValueError(f"a ViT of {depth} blocks has no features of four depths")
    return blocks


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resample maps [B, *, h, w] to another size by bilinear interpolation."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------------
# From the ViT's one resolution to a pyramid
# --------------------------------------------------------------------------------------------------------


def rescaled(dim: int, patch_size: int, stride: int) -> nn.Module:
    """Return the module that turns one vector per patch into one per `stride` pixels.

    It enlarges by transposed convolutions and shrinks by max pooling. A patch size that is no power of two counts as
    the nearest one: patch 14 has the strides 3.5, 7, 14 and 28.
    """
    doublings = round(math.log2(patch_size)) - round(math.log2(stride))
    if doublings <= 0:
        # ceil: an odd number of patches leaves none out
        return nn.MaxPool2d(2**-doublings, ceil_mode=True) if doublings else nn.Identity()
    layers: list[nn.Module] = [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)]
    for _ in range(doublings - 1):
        layers += [nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)]
    return nn.Sequential(*layers)


# --------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------


class DecodeHead(nn.Module):
    """Pyramid pooling at the top, a feature pyramid below it, all levels fused, then a linear classifier."""

    def __init__(self, dim: int, width: int, num_classes: int, dropout: float):
        super().__init__()
        below = len(STRIDES) - 1
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), convolution(dim, width, 1)) for side in POOLS
        )
        self.bottleneck = convolution(dim + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(convolution(dim, width, 1) for _ in range(below))
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in range(below))
        self.fuse = convolution(len(STRIDES) * width, width, 3)
        self.classifier = pixel_classifier(width, num_classes, dropout)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Return logits [B, K, h, w] at the finest size from feature maps [B, D, h, w], ordered from fine to coarse."""
        *finer, top = pyramid
        pooled = [resized(pool(top), top.shape[-2:]) for pool in self.pools]
        level = self.bottleneck(torch.cat([top, *pooled], dim=1))  # [B, M, h, w]
        levels = [level]
        for x, lateral, smooth in reversed(list(zip(finer, self.lateral, self.smooth, strict=True))):
            level = lateral(x) + resized(level, x.shape[-2:])
            levels.append(smooth(level))
        size = pyramid[0].shape[-2:]
        fused = self.fuse(torch.cat([resized(x, size) for x in reversed(levels)], dim=1))
        return self.classifier(fused)


class AuxiliaryHead(nn.Module):
    """One convolution and a linear classifier on one level (FCN), which shortens the gradient's path to the ViT."""

    def __init__(self, dim: int, width: int, num_classes: int, dropout: float):
        super().__init__()
        self.convolution = convolution(dim, width, 3)
        self.classifier = pixel_classifier(width, num_classes, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, K, h, w] of features [B, D, h, w]."""
        return self.classifier(self.convolution(features))


def convolution(channels: int, width: int, kernel_size: int) -> nn.Module:
    """Build a size-preserving convolution with BatchNorm, ReLU and He's initialisation."""
    block = Conv2dNormActivation(channels, width, kernel_size, inplace=False)
    nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
    return block


def pixel_classifier(width: int, num_classes: int, dropout: float) -> nn.Module:
    """Build a linear classifier per pixel, with dropout of whole channels before it."""
    linear = nn.Conv2d(width, num_classes, kernel_size=1)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Dropout2d(dropout), linear)
