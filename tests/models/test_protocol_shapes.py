"""ViT-B with UperNet as the recipe builds it has the parameters of mmsegmentation's MAE configuration, one by one.

Source: mmsegmentation 1.x, configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py and
configs/_base_/models/upernet_mae.py, with the shapes that mmseg/models/{backbones/mae, backbones/beit, necks/
featurepyramid, decode_heads/uper_head, decode_heads/fcn_head}.py give them: names on the left are mmsegmentation's.
"""

from __future__ import annotations

from math import prod

import pytest
import torch

from models_upernet import UperNet
from util.config.command_line import parse_config
from util.config.segment import SegmentConfig

D, M = 768, 768  # width of the ViT and of the decode head
BLOCK = {
    "ln1.weight": ("norm1.weight", (D,)),
    "ln1.bias": ("norm1.bias", (D,)),
    "attn.relative_position_bias_table": ("attn.relative_position_bias_table", (63 * 63 + 3, 12)),
    "attn.qkv.weight": ("attn.qkv.weight", (3 * D, D)),
    "attn.qkv.bias": ("attn.qkv.bias", (3 * D,)),
    "attn.proj.weight": ("attn.proj.weight", (D, D)),
    "attn.proj.bias": ("attn.proj.bias", (D,)),
    "gamma_1": ("ls1.gamma", (D,)),
    "ln2.weight": ("norm2.weight", (D,)),
    "ln2.bias": ("norm2.bias", (D,)),
    "ffn.layers.0.0.weight": ("mlp.fc1.weight", (4 * D, D)),
    "ffn.layers.0.0.bias": ("mlp.fc1.bias", (4 * D,)),
    "ffn.layers.1.weight": ("mlp.fc2.weight", (D, 4 * D)),
    "ffn.layers.1.bias": ("mlp.fc2.bias", (D,)),
    "gamma_2": ("ls2.gamma", (D,)),
}
BACKBONE = {
    "backbone.cls_token": ("cls_token", (1, 1, D)),
    "backbone.pos_embed": ("pos_embed", (1, 1 + 32 * 32, D)),
    "backbone.patch_embed.projection.weight": ("patch_embed.proj.weight", (D, 3, 16, 16)),
    "backbone.patch_embed.projection.bias": ("patch_embed.proj.bias", (D,)),
} | {
    f"backbone.layers.{i}.{mmseg_name}": (f"blocks.{i}.{own_name}", shape)
    for i in range(12)
    for mmseg_name, (own_name, shape) in BLOCK.items()
}


def convolution(mmseg_name: str, own_name: str, channels: int, width: int, kernel: int) -> dict:
    """Return a ConvModule: convolution without bias, BatchNorm, ReLU."""
    return {
        f"{mmseg_name}.conv.weight": (f"{own_name}.0.weight", (width, channels, kernel, kernel)),
        f"{mmseg_name}.bn.weight": (f"{own_name}.1.weight", (width,)),
        f"{mmseg_name}.bn.bias": (f"{own_name}.1.bias", (width,)),
    }


def classifier(mmseg_name: str, own_name: str, width: int) -> dict:
    return {
        f"{mmseg_name}.conv_seg.weight": (f"{own_name}.weight", (150, width, 1, 1)),
        f"{mmseg_name}.conv_seg.bias": (f"{own_name}.bias", (150,)),
    }


NECK = {}
for name, numbers in (("upsample_4x", {0: 0, 3: 3}), ("upsample_2x", {0: 0})):
    level = 0 if name == "upsample_4x" else 1
    for number in numbers:
        module = f"neck.{name}.{number}"
        NECK[f"{module}.weight"] = (f"neck.{level}.{number}.weight", (D, D, 2, 2))
        NECK[f"{module}.bias"] = (f"neck.{level}.{number}.bias", (D,))
NECK |= {f"neck.upsample_4x.1.{kind}": (f"neck.0.1.{kind}", (D,)) for kind in ("weight", "bias")}

DECODE_HEAD = classifier("decode_head", "decode_head.classifier.1", M)
for i in range(4):
    DECODE_HEAD |= convolution(f"decode_head.psp_modules.{i}.1", f"decode_head.pools.{i}.1", D, M, 1)
DECODE_HEAD |= convolution("decode_head.bottleneck", "decode_head.bottleneck", D + 4 * M, M, 3)
for i in range(3):
    DECODE_HEAD |= convolution(f"decode_head.lateral_convs.{i}", f"decode_head.lateral.{i}", D, M, 1)
    DECODE_HEAD |= convolution(f"decode_head.fpn_convs.{i}", f"decode_head.smooth.{i}", M, M, 3)
DECODE_HEAD |= convolution("decode_head.fpn_bottleneck", "decode_head.fuse", 4 * M, M, 3)

AUXILIARY_HEAD = classifier("auxiliary_head", "auxiliary_head.classifier.1", 256)
AUXILIARY_HEAD |= convolution("auxiliary_head.convs.0", "auxiliary_head.convolution", D, 256, 3)

MODULES = {  # parameters of each, and their number
    "backbone": (BACKBONE, 87_023_424),
    "neck": (NECK, 7_081_728),
    "decode_head": (DECODE_HEAD, 67_963_542),
    "auxiliary_head": (AUXILIARY_HEAD, 1_808_534),
}


@pytest.fixture(scope="module")
def own_shapes() -> dict[str, tuple[int, ...]]:
    config = parse_config(SegmentConfig, ["--recipe", "segment_vit_base", "--data_path", "ADE20K"], "main_segment.py")
    with torch.device("meta"):
        model = UperNet(**config.model_arguments(150))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("module", MODULES)
def test_names_and_shapes_module_by_module(own_shapes, module):
    parameters, number = MODULES[module]
    outside = [f"{name}." for name in MODULES if name != "backbone"]
    own = {name: shape for name, shape in own_shapes.items() if name.startswith(f"{module}.")}
    if module == "backbone":
        own = {name: shape for name, shape in own_shapes.items() if not name.startswith(tuple(outside))}
    assert own == dict(parameters.values())
    assert sum(map(prod, own.values())) == number


def test_the_whole_has_163_9_million_parameters(own_shapes):
    assert sum(map(prod, own_shapes.values())) == sum(number for _, number in MODULES.values()) == 163_877_228


def test_parameters_of_the_encoder_come_in_the_order_of_their_depth(own_shapes):
    names = [name for name in own_shapes if name.startswith(("cls_token", "pos_embed", "patch_embed", "blocks"))]
    assert names[:4] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    blocks = [int(name.split(".")[1]) for name in names[4:]]
    assert blocks == sorted(blocks)
    assert len(blocks) == 12 * len(BLOCK)
