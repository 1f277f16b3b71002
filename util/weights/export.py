"""Checkpoints for other programs: MAE's layout, timm's, a folder for the Hugging Face Hub, ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from models_architectures import ARCHITECTURES
from models_encoder import Encoder
from models_lut import LUT
from models_position_bias import transfer_part
from models_vit import Classifier, Pool
from util.data.views import crop_share
from util.runtime.errors import UserError
from util.runtime.files import write_durably
from util.runtime.reading import read_mapping
from util.weights.interop import WeightsFile
from util.weights.layouts import DINOV2, PATCH_KERNEL, POSITIONS, check_shapes, depth_of, dinov2_description, part_of
from util.weights.reader import shortened
from util.weights.resampling import is_square
from util.weights.run_state import CLASS_NAMES, MOST_CLASSES, shown

# width, depth, heads, patch -> timm's own name
TIMM_NAMES = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
ANY_SHAPE = "vit_base_patch16_224"  # timm builds other shapes from it, given width, depth and heads
IMAGE_KEYS = ("input_size", "interpolation", "crop_pct", "mean", "std")  # of timm's pretrained_cfg
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # that timm knows
MOST_SIDE = 4096  # pixels
MOST_OVERLAY_BYTES = 2**24  # 100,000 names of classes
LABEL_NAMES = "label_names"  # timm's key for the names of the classes
MOST_NAMES_PRINTED = 20


@dataclass(frozen=True)
class ViTShape:
    """The shape of an encoder, as its tensors tell it, and its heads and grid, which they do not tell."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    img_size: tuple[int, int]


@dataclass(frozen=True)
class Export:
    """An encoder or classifier to write for another program."""

    file: WeightsFile
    shape: ViTShape
    pool: Pool  # of an encoder without a head; a classifier knows its own
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]


def shape_of(file: WeightsFile, num_heads: int | None, img_size: tuple[int, ...], flag: str = "IN") -> ViTShape:
    """Return the shape of the encoder in a file.

    Args:
        num_heads: None: as the file or its layout tells.
        img_size: height and width in pixels; empty: those of the run's settings, or a square.
        flag: flag and path of the file, which begin a message.

    Raises:
        UserError: the file holds no encoder of our layers, or its heads or grid cannot be known.
    """
    state, config = file.state, file.config or {}
    if file.layout.startswith(DINOV2):
        raise UserError(f"{flag}: {dinov2_description(state)}")
    missing = [name for name in (PATCH_KERNEL, POSITIONS) if name not in state]
    if missing:
        raise UserError(f"{flag}: holds no encoder ({' and '.join(missing)} missing)")
    check_shapes(state, flag)
    embed_dim, in_chans, patch_size, _ = state[PATCH_KERNEL].shape
    depth = depth_of(state, flag)
    run_model = ARCHITECTURES.get(str(config.get("model", "")).removeprefix("lut_").removeprefix("mae_"))
    if run_model and run_model["depth"] != depth:
        raise UserError(f"{flag}: holds {depth} blocks, but its run's --model has {run_model['depth']}")
    heads = file.num_heads if num_heads is None else num_heads
    if heads is None:
        raise UserError(
            f"--num_heads: {flag} does not tell its attention heads ({file.layout}, {embed_dim} wide): "
            + ("MoCo v3's ViT-S has 12, all others 6; give the number" if embed_dim == 384 else "give the number")
        )
    if heads < 1 or embed_dim % heads:
        raise UserError(f"--num_heads {heads}: does not divide the width {embed_dim}, give its number of heads")
    if embed_dim % 4:
        raise UserError(f"{flag}: is {embed_dim} wide, which fixed positions in two dimensions cannot have")
    grid = img_size_of(state, tuple(img_size) or tuple(config.get("input_size") or ()), patch_size)
    return ViTShape(embed_dim, depth, heads, patch_size, in_chans, grid)


def img_size_of(state: Mapping[str, Tensor], size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """Return height and width of the images in pixels; UserError if they do not give the file's patches."""
    length = state[POSITIONS].shape[1] - 1
    if not size and is_square(length):
        size = (math.isqrt(length) * patch_size,)
    if not size or min(size) < 1 or (size[0] // patch_size) * (size[-1] // patch_size) != length:
        given = " ".join(map(str, size))
        raise UserError(f"--input_size {given}: does not give the {length} patches of the file, give height and width")
    return size[0], size[-1]


def depth_remark(shape: ViTShape) -> str:
    """Return a remark if no known model of that width has so many blocks: the last ones may be missing."""
    depths = {known["depth"] for known in ARCHITECTURES.values() if known["embed_dim"] == shape.embed_dim}
    if not depths or shape.depth in depths:
        return ""
    return f"; {shape.depth} blocks, but models of width {shape.embed_dim} have {' or '.join(map(str, sorted(depths)))}"


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a ViT has: the encoder, and the head of a classifier; no decoder, no projector."""
    refuse_added_layers(state)
    parts = ("encoder", "fc_norm", "head") if "head.weight" in state else ("encoder",)
    return {name: x.contiguous() for name, x in state.items() if part_of(name) in parts}


def refuse_added_layers(state: Mapping[str, Tensor]) -> None:
    """Raise UserError where a model has layers, added for its transfer, that MAE's and timm's plain ViT lack."""
    added = sorted({part for name in state if (part := transfer_part(name))})
    if added:
        raise UserError(
            f"IN: holds {' and '.join(added)}, which a plain ViT does not have; export a model without them"
        )


# --------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------


def write_mae(file: WeightsFile, num_heads: int | None, output: Path) -> str:
    """Write a .pth with the tensors that MAE knows under its key `model`; return what to print.

    Raises:
        UserError: encoder, decoder or head lack tensors, or have others than MAE's.
    """
    state = mae_state(file.state)
    check_complete(file, state)
    saved: dict[str, Any] = {"model": {name: x.contiguous() for name, x in state.items()}}
    heads = num_heads or file.num_heads
    saved |= {"num_heads": heads} if heads else {}
    saved |= {CLASS_NAMES: file.class_names} if file.class_names and "head.weight" in state else {}
    buffer = io.BytesIO()  # torch's writer turns a full disk into errors of many kinds
    torch.save(saved, buffer)
    write_durably(output, lambda stream: stream.write(buffer.getbuffer()))
    return f"{len(state)} tensors under `model`"


def mae_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return encoder and head of a classifier, or encoder and decoder; SimMIM's decoder is not MAE's."""
    refuse_added_layers(state)
    if "head.weight" in state:
        return encoder_state(state)
    parts = ("encoder", "decoder") if "decoder_embed.weight" in state else ("encoder",)
    return {name: x for name, x in state.items() if part_of(name) in parts}


def check_complete(file: WeightsFile, state: Mapping[str, Tensor]) -> None:
    """Raise UserError unless these are all tensors of an encoder, an autoencoder or a classifier, in their shapes.

    The model that they are compared with has no memory. Its heads and its grid do not matter to any shape.
    """
    length = state[POSITIONS].shape[1] - 1 if POSITIONS in state else 1
    patch = state[PATCH_KERNEL].shape[-1] if PATCH_KERNEL in state else 1
    shape = shape_of(file, 1, (patch, patch * length))
    common = dict(img_size=shape.img_size, patch_size=shape.patch_size, in_chans=shape.in_chans)
    architecture = dict(embed_dim=shape.embed_dim, depth=shape.depth, num_heads=1)
    if "head.weight" in state:
        pool = "avg" if "fc_norm.weight" in state else "token"
        build = partial(Classifier, architecture, num_classes=len(state["head.weight"]), pool=pool)
    elif "decoder_embed.weight" in state:
        blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
        width = len(state["decoder_embed.weight"])
        decoder = dict(decoder_embed_dim=width, decoder_depth=len(blocks), decoder_num_heads=1)
        build = partial(LUT, **architecture, **decoder)
    else:
        build = partial(Encoder, **architecture)
    try:
        with torch.device("meta"):
            model = build(**common)
    except ValueError as error:
        raise UserError(f"IN: is no model of MAE's ({error})") from error
    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    wrong = [name for name, shape in own.items() if name not in state or tuple(state[name].shape) != shape]
    surplus = [name for name in state if name not in own]
    if wrong or surplus:
        raise UserError(
            f"IN: is no complete model of MAE's ({file.layout}); missing or of another shape:"
            f" {shortened(wrong) or 'nothing'}; besides: {shortened(surplus) or 'nothing'}"
        )


def timm_arguments(export: Export) -> tuple[str, dict[str, Any]]:
    """Return the name and the keyword arguments for timm.create_model."""
    state, shape = export.file.state, export.shape
    key = (shape.embed_dim, shape.depth, shape.num_heads, shape.patch_size)
    arguments: dict[str, Any] = {}
    if key not in TIMM_NAMES:
        arguments |= dict(zip(("embed_dim", "depth", "num_heads", "patch_size"), key, strict=True))
    if shape.img_size != (224, 224):
        arguments["img_size"] = list(shape.img_size)
    if shape.in_chans != 3:
        arguments["in_chans"] = shape.in_chans
    if "head.weight" in state:
        pool = "avg" if "fc_norm.weight" in state else "token"
        arguments |= dict(num_classes=len(state["head.weight"]), global_pool=pool)
    else:  # all tokens go through the encoder's own norm, then are pooled
        arguments |= dict(num_classes=0, global_pool=export.pool, fc_norm=False)
    return TIMM_NAMES.get(key, ANY_SHAPE), arguments


def timm_model(export: Export) -> nn.Module:
    """Return timm's model with these weights, loaded strictly."""
    name, arguments = timm_arguments(export)
    model = timm.create_model(name, **arguments)
    try:
        model.load_state_dict(encoder_state(export.file.state))
    except RuntimeError as error:
        raise UserError(f"IN: its tensors are not those of timm's {name} ({' '.join(str(error).split())})") from error
    model.pretrained_cfg.update(image_settings(export), num_classes=model.num_classes)
    return model.eval()


def image_settings(export: Export) -> dict[str, Any]:
    """Return how images must be made for the model, under the keys of timm's pretrained_cfg."""
    shape = export.shape
    size = (shape.in_chans, *shape.img_size)
    values = (size, "bicubic", crop_share(shape.img_size), tuple(export.mean), tuple(export.std))
    return dict(zip(IMAGE_KEYS, values, strict=True))


def names_of(export: Export) -> list[str]:
    """Return the classes of a classifier in the order of its logits; empty for an encoder, or if they are unknown."""
    return export.file.class_names or [] if "head.weight" in export.file.state else []


def write_timm(export: Export, output: Path) -> str:
    """Write OUTPUT.safetensors and beside it OUTPUT.json with the arguments; return the call that loads it."""
    timm_model(export)  # loads strictly, or is refused
    name, arguments = timm_arguments(export)
    names, overlay = names_of(export), image_settings(export)
    with_names = overlay | {LABEL_NAMES: names} if names else overlay
    config = {"architecture": name, "model_args": arguments | {"pretrained_cfg_overlay": with_names}}
    text = json.dumps(config, indent=2) + "\n"
    metadata = {"format": "pt", "num_heads": str(export.shape.num_heads)}
    write_durably(output, lambda stream: stream.write(save(encoder_state(export.file.state), metadata)))
    write_durably(output.with_suffix(".json"), lambda stream: stream.write(text.encode()))
    arguments["pretrained_cfg_overlay"] = with_names if len(names) <= MOST_NAMES_PRINTED else overlay
    keywords = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}"{keywords}, checkpoint_path="{output}")'


def overlay_beside(path: Path, in_chans: int) -> dict[str, Any]:
    """Return what `write_timm` wrote about images and classes beside its file; nothing for other files.

    Raises:
        UserError: a value has the wrong type or range, or is for another number of channels than `in_chans`.
    """
    beside = path.with_suffix(".json")
    try:
        config = read_mapping(beside, MOST_OVERLAY_BYTES)
        overlay = dict(config["model_args"]["pretrained_cfg_overlay"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in overlay.items()}
    known = {key: known[key] for key in (*IMAGE_KEYS, LABEL_NAMES) if key in known}
    wrong = [key for key, value in known.items() if not is_image_setting(key, value, in_chans)]
    if wrong:
        values = shortened([f"{key} {shown(overlay[key])}" for key in wrong])
        raise UserError(
            f"{beside}: unusable for a model of {in_chans} channels: {values}; write it again by convert.py --to timm"
        )
    return known


def is_image_setting(key: str, value: object, in_chans: int) -> bool:
    """True if timm's models of `in_chans` channels can take the value under this key of their pretrained_cfg."""
    values = value if isinstance(value, tuple) else ()
    if key == LABEL_NAMES:
        return value == values and len(values) <= MOST_CLASSES and all(isinstance(name, str) for name in values)
    if key == "interpolation":
        return isinstance(value, str) and value in INTERPOLATIONS
    numbers = (value,) if key == "crop_pct" else values
    if not all(type(number) in (int, float) and 0 <= number <= MOST_SIDE for number in numbers):
        return False
    if key == "crop_pct":
        return 0 < value <= 1
    if key == "input_size":
        sides_are_whole = all(type(number) is int and number > 0 for number in values)
        return len(values) == 3 and values[0] == in_chans and sides_are_whole
    return len(values) == in_chans and (key == "mean" or min(values) > 0)


def write_hub_folder(export: Export, output: Path) -> str:
    """Write a folder with config.json and model.safetensors, for timm and the Hub; return the call that loads it."""
    model = timm_model(export)
    _, arguments = timm_arguments(export)
    arguments.pop("num_classes")  # timm keeps it at the config's root
    names = names_of(export)
    with tempfile.TemporaryDirectory() as folder:  # timm writes the config in place
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_config={LABEL_NAMES: names} if names else {}, model_args=arguments)
        config = path.read_bytes()
    output.mkdir(parents=True, exist_ok=True)
    weights = save(encoder_state(export.file.state), {"format": "pt", "num_heads": str(export.shape.num_heads)})
    write_durably(output / "model.safetensors", lambda stream: stream.write(weights))
    write_durably(output / "config.json", lambda stream: stream.write(config))
    return f'timm.create_model("local-dir:{output}", pretrained=True)'


def write_onnx(export: Export, output: Path) -> str:
    """Write an .onnx graph from normalised images [B, C, H, W], any B, to features [B, D] or logits [B, K]."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx: needs the packages {' '.join(missing)}: pip install {' '.join(missing)}")
    shape, names = export.shape, names_of(export)
    program = torch.onnx.export(
        timm_model(export),
        (torch.zeros(2, shape.in_chans, *shape.img_size),),
        input_names=["images"],
        output_names=["output"],
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    graph = program.model_proto
    for key, value in ((LABEL_NAMES, json.dumps(names)),) * bool(names):
        graph.metadata_props.add(key=key, value=value)
    write_durably(output, lambda stream: stream.write(graph.SerializeToString()))
    return f"normalise pixels in [0, 1] with mean {tuple(export.mean)} and std {tuple(export.std)}"
