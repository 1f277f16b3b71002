"""Whose checkpoint a file is, by its keys and names: which network is taken, under which names, with how many heads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from models_architectures import ARCHITECTURES
from models_position_bias import transfer_part
from util.runtime.errors import UserError
from util.weights.reader import short_name

Weights = Literal["student", "momentum"]
PATCH_KERNEL, POSITIONS, DECODER_POSITIONS = "patch_embed.proj.weight", "pos_embed", "decoder_pos_embed"
CLASSIFIER, MOCO, DINO, DINOV2 = "ViT classifier", "MoCo v3", "DINO or iBOT", "DINOv2"

# where programs put the weights that were trained (of DINO's and iBOT's two the teacher, which they evaluate;
# `module` is DeepSpeed's), and their EMA (`state_dict_ema` is timm's)
TRAINED_KEYS = ("model", "state_dict", "teacher", "student", "module")
AVERAGE_KEYS = ("model_ema", "state_dict_ema", "teacher")
# left in names by DistributedDataParallel, torch.compile, activation checkpointing, FSDP, Lightning, DINO, MoCo v3
WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|backbone|encoder|model|base_encoder|ema)\.)*"
)
WRAPPERS_WITHIN = re.compile(r"(?<=\.)(?:(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.)+")
MOCO_AVERAGE = "momentum_encoder."

# projector or classifier, the other heads of pre-training, a classifier's norm, UperNet, MoCo v3's second encoder
OTHER_PARTS = (
    *("head", "predictor", "mask_head", "mask_predictor", "fc_norm"),
    *("neck", "decode_head", "auxiliary_head", "momentum_encoder"),
)
ENCODER_NAME = re.compile(r"cls_token|pos_embed|patch_embed\.|blocks\.|norm\.")

MATRICES = ("head.weight", "decoder_embed.weight")  # their rows are counted
MOST_PATCHES = 2**16  # images of 4096 x 4096 pixels at patch 16
MOST_PATCH_PIXELS = 64  # side of a patch
MOCO_HEADS = {384: 12, 768: 12}  # width -> heads; its ViT-S is the only one with 12
DINO_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
# (width, patch) of which published models differ in their heads: MoCo v3's ViT-S and all others
AMBIGUOUS = {(384, 16)}


def part_of(name: str) -> str:
    """Return `encoder`, `decoder` (MAE's), a `transfer_part` or one of `OTHER_PARTS`.

    A part is loaded as a whole or not at all.
    """
    if name.startswith("decoder") or name == "mask_token":
        return "decoder"
    if added := transfer_part(name):
        return added
    part = name.split(".")[0]
    return part if part in OTHER_PARTS else "encoder"


def is_linear_probe(state: Mapping[str, Tensor]) -> bool:
    """True if the head is a BatchNorm without parameters and a layer; a projector has its first layer at 0."""
    return "head.1.weight" in state and "head.0.weight" not in state and state["head.1.weight"].ndim == 2


def choose_network(
    checkpoint: Mapping[str, Any], weights: Weights, where: str
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the tensors of the trained network or of its EMA, without prefixes of wrappers.

    Returns: the tensors, the key under which they lay (empty: at the top), and the keys of other networks.

    Raises:
        UserError: no EMA is there, or two tensors have the same name without their prefixes.
    """
    present = [key for key in dict.fromkeys(TRAINED_KEYS + AVERAGE_KEYS) if isinstance(checkpoint.get(key), dict)]
    trained = next((key for key in TRAINED_KEYS if key in present), "")
    average = next((key for key in AVERAGE_KEYS if key in present), "")
    if weights == "momentum" and not average:
        state = without_wrappers(checkpoint[trained] if trained else checkpoint, where)
        followed = {name.removeprefix(MOCO_AVERAGE): x for name, x in state.items() if name.startswith(MOCO_AVERAGE)}
        if not followed:
            raise UserError(f"{where}: holds no momentum encoder ({', '.join(AVERAGE_KEYS)}), ask for the student's")
        return followed, MOCO_AVERAGE.rstrip("."), [trained]
    key = average if weights == "momentum" else trained
    state = without_wrappers(checkpoint[key] if key else checkpoint, where)
    others = [other for other in present if other != key and other != "module"]
    return state, key, others


def without_wrappers(state: Mapping[object, object], where: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict under their names without the prefixes of wrappers, in any order and depth.

    Raises:
        UserError: a name is no text, or two tensors have one name then.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str):
            raise UserError(f"{where}: names a tensor {short_name(name)}, not by a text; is it a checkpoint?")
        bare = WRAPPERS_WITHIN.sub("", name[WRAPPERS.match(name).end() :])
        if bare in tensors:
            raise UserError(
                f"{where}: holds two networks: two tensors are named {short_name(bare)} without the prefixes of"
                " wrappers; save one of them alone"
            )
        tensors[bare] = tensor
    return tensors


def layout_of(state: Mapping[str, Tensor], key: str, raw_names: list[object]) -> str:
    """Say which program writes such names.

    Args:
        key: the key under which the state lay; MAE writes `model`.
        raw_names: with the prefixes of wrappers.
    """
    if any(name.endswith(("ls1.gamma", "ls_1.gamma")) for name in state) and is_dinov2(state):
        return DINOV2
    if any(isinstance(name, str) and "base_encoder." in name for name in raw_names) or key == "momentum_encoder":
        return MOCO
    if key in ("teacher", "student"):
        return DINO
    if "head.weight" in state or "fc_norm.weight" in state:
        return CLASSIFIER
    if "decode_head.bottleneck.0.weight" in state:
        return "UperNet"
    if "decoder.weight" in state:
        return "SimMIM, student"
    if "predictor.0.weight" in state:
        return "LUT, student"
    if "mask_token" in state:
        return "MAE with decoder"
    return "MAE encoder" if key == "model" else "timm ViT"


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """True if an encoder with LayerScale has DINOv2's mask token, register tokens or patch of 14 pixels."""
    mask_token, kernel = state.get("mask_token"), state.get(PATCH_KERNEL)
    registers = "register_tokens" in state or "reg_token" in state
    patch_14 = kernel is not None and kernel.ndim == 4 and kernel.shape[-1] == 14
    return registers or patch_14 or (mask_token is not None and mask_token.ndim == 2)


def dinov2_description(state: Mapping[str, Tensor]) -> str:
    """Say what a DINOv2 file has that our encoder lacks, and how it can be opened."""
    kernel = state.get(PATCH_KERNEL)
    registers = ["registers"] * ("register_tokens" in state or "reg_token" in state)
    patch = [f"patch {kernel.shape[-1]}"] if kernel is not None else []
    return (
        f"is a file of DINOv2 ({', '.join(['LayerScale', *registers, *patch])}), whose layers our encoder lacks; for"
        " analysis open it as timm:NAME=FILE with timm's name, such as timm:vit_small_patch14_dinov2=FILE"
    )


# --------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------


def heads_of(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], layout: str, config: Mapping[str, Any] | None
) -> int | None:
    """Number of attention heads by the run's settings, the export, the layout, the architecture's name or the width.

    A state dict does not hold it. None if nothing of this tells, or if published models of that shape differ.
    """
    kernel = state.get(PATCH_KERNEL)
    if kernel is None or kernel.ndim != 4:
        return None
    width, patch = len(kernel), kernel.shape[-1]
    written = export_heads(checkpoint) or (config or {}).get("num_heads")
    if written:
        return written
    settings = checkpoint.get("args")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    settings = settings if isinstance(settings, dict) else {}
    if layout == MOCO or checkpoint.get("arch") in ("vit_small", "vit_base"):  # main_moco.py and main_lincls.py
        return MOCO_HEADS.get(width)
    if layout == DINO or settings.get("arch") in ("vit_tiny", "vit_small", "vit_base", "vit_large", "deit_small"):
        return DINO_HEADS.get(width)
    for name in ((config or {}).get("model"), checkpoint.get("arch"), settings.get("model"), settings.get("arch")):
        heads = heads_of_model(name, width) if isinstance(name, str) else None
        if heads:
            return heads
    ours = layout.startswith(("LUT", "SimMIM", "UperNet", "MAE with"))
    if (width, patch) in AMBIGUOUS and not ours:
        return None
    known = {shape["embed_dim"]: shape["num_heads"] for shape in ARCHITECTURES.values()}
    return known.get(width)


def export_heads(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the number that scripts/convert.py writes: at the top of a .pth, in the header of a .safetensors file."""
    metadata = checkpoint.get("metadata")
    text = metadata.get("num_heads", "") if isinstance(metadata, dict) else ""
    number = checkpoint.get("num_heads", int(text) if re.fullmatch(r"\d{1,3}", str(text)) else None)
    return number if type(number) is int and 1 <= number < 1000 else None


def heads_of_model(name: str, width: int) -> int | None:
    """Return the heads of our, MAE's or timm's model of that name, None if there is none of that width."""
    ours = ARCHITECTURES.get(name.removeprefix("lut_").removeprefix("mae_"))
    if ours:
        return ours["num_heads"] if ours["embed_dim"] == width else None
    if not (name.startswith(("vit_", "deit_", "deit3_")) and timm.is_model(name)):
        return None
    with torch.device("meta"):
        model = timm.create_model(name.partition(".")[0], pretrained=False)  # its tag may be of another version of timm
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks is not None and len(blocks) else None
    return getattr(attention, "num_heads", None) if getattr(model, "embed_dim", None) == width else None


def check_shapes(state: Mapping[str, Tensor], where: str) -> None:
    """Check the shapes that sizes of a model and of resampled tensors follow from.

    Raises:
        UserError: patch kernel or positions have a shape that no plain ViT has.
    """
    kernel = state.get(PATCH_KERNEL)
    if kernel is not None:
        square = kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3]
        if not square or not kernel.numel() or kernel.shape[2] > MOST_PATCH_PIXELS:
            raise UserError(
                f"{where}: {PATCH_KERNEL} has the shape {list(kernel.shape)}, not [width, channels, patch, patch] with"
                f" patches of 1 to {MOST_PATCH_PIXELS} pixels"
            )
    for name in MATRICES:
        if name in state and not (state[name].ndim == 2 and state[name].numel()):
            raise UserError(f"{where}: {name} has the shape {list(state[name].shape)}, not that of a matrix")
    for name in (POSITIONS, DECODER_POSITIONS):
        positions = state.get(name)
        if positions is not None and not (positions.ndim == 3 and 2 <= positions.shape[1] <= 1 + MOST_PATCHES):
            raise UserError(
                f"{where}: {name} has the shape {list(positions.shape)}, not [1, 1 + patches, width] with 1 to"
                f" {MOST_PATCHES} patches"
            )


def depth_of(state: Mapping[str, Tensor], where: str) -> int:
    """Number of blocks, whose names must count from 0 without a gap.

    Raises:
        UserError: they do not.
    """
    texts = {name.split(".")[1] for name in state if name.startswith("blocks.")}  # never made a number before a check
    depth = len(texts)
    gaps = [number for number in range(depth) if str(number) not in texts]
    if gaps or not depth:
        others = sorted(texts - {str(number) for number in range(depth)})
        surplus = f"blocks.{short_name(others[0])} is there, " if others else ""
        raise UserError(f"{where}: {surplus}blocks.{gaps[0] if gaps else 0} is missing; is the file complete?")
    return depth
