"""Checkpoints for other programs: MAE's layout, timm's, a folder for the Hugging Face Hub, ONNX."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from models_architectures import ARCHITECTURES
from util.data.views import crop_share
from util.runtime.errors import UserError
from util.weights.interop import PATCH_KERNEL, POSITIONS, WeightsFile, is_square, part_of

# timm's own name of a shape: width, depth, heads, patch
TIMM_NAMES = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
ANY_SHAPE = "vit_base_patch16_224"  # what timm builds others from, given width, depth and heads


@dataclass(frozen=True)
class ViTShape:
    """What the tensors of an encoder say of it, and what they do not: heads and grid."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    img_size: tuple[int, int]


def shape_of(file: WeightsFile, num_heads: int | None, img_size: tuple[int, ...], flag: str = "IN") -> ViTShape:
    """The shape of the encoder in a file.

    Args:
        num_heads: None: of the run's settings, or of the model of that width.
        img_size: height and width in pixels; empty: of the run's settings, or a square.
        flag: what to call the file in a message.

    Raises:
        UserError: no encoder in it, or heads or grid cannot be known.
    """
    state, config = file.state, file.config or {}
    if PATCH_KERNEL not in state or POSITIONS not in state:
        raise UserError(f"{flag}: holds no encoder ({PATCH_KERNEL} and {POSITIONS} are missing)")
    embed_dim, in_chans, patch_size, _ = state[PATCH_KERNEL].shape
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    if num_heads is None:
        name = str(config.get("model", "")).removeprefix("lut_").removeprefix("mae_")
        known = {shape["embed_dim"]: shape["num_heads"] for shape in ARCHITECTURES.values()}
        num_heads = ARCHITECTURES[name]["num_heads"] if name in ARCHITECTURES else known.get(embed_dim)
    if num_heads is None:
        raise UserError(f"--num_heads: no known model is {embed_dim} wide, give its number of heads")
    if num_heads < 1 or embed_dim % num_heads:
        raise UserError(f"--num_heads {num_heads}: does not divide the width {embed_dim}, give its number of heads")

    length = state[POSITIONS].shape[1] - 1
    size = tuple(img_size) or tuple(config.get("input_size") or ())
    if not size and is_square(length):
        size = (round(length**0.5) * patch_size,)
    if not size or (size[0] // patch_size) * (size[-1] // patch_size) != length:
        raise UserError(f"--input_size {size}: does not give the {length} patches of the file, give height and width")
    return ViTShape(embed_dim, depth, num_heads, patch_size, in_chans, (size[0], size[-1]))


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a ViT has: the encoder, and the head of a classifier; no decoder, no projector."""
    classifier = "head.weight" in state
    kept = ("encoder", "fc_norm", "head") if classifier else ("encoder",)
    return {name: x.contiguous() for name, x in state.items() if part_of(name) in kept}


# --------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------


def write_mae(file: WeightsFile, output: Path) -> str:
    """A .pth with the tensors that MAE knows under its key `model`; what to say."""
    kept = ("encoder", "decoder") if "decoder_embed.weight" in file.state else ("encoder",)  # SimMIM's is not MAE's
    state = {n: x for n, x in file.state.items() if part_of(n) in kept}
    if "head.weight" in file.state:
        state = encoder_state(file.state)  # MAE's fine-tuned layout
    if "mask_token" in state and "decoder_pos_embed" not in state:
        raise UserError("IN: its decoder is incomplete, decoder_pos_embed is missing")
    torch.save({"model": {name: x.contiguous() for name, x in state.items()}}, output)
    return f"{len(state)} tensors under `model`"


def timm_arguments(file: WeightsFile, shape: ViTShape, pool: str) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments for timm.create_model.

    Args:
        pool: `avg` or `token`, for an encoder without a head; a classifier knows its own.
    """
    state = file.state
    key = (shape.embed_dim, shape.depth, shape.num_heads, shape.patch_size)
    name = TIMM_NAMES.get(key, ANY_SHAPE)
    arguments: dict[str, Any] = {}
    if key not in TIMM_NAMES:
        arguments |= dict(
            embed_dim=shape.embed_dim, depth=shape.depth, num_heads=shape.num_heads, patch_size=shape.patch_size
        )  # fmt: skip
    if shape.img_size != (224, 224):
        arguments["img_size"] = list(shape.img_size)
    if shape.in_chans != 3:
        arguments["in_chans"] = shape.in_chans
    if "head.weight" in state:
        arguments |= dict(
            num_classes=len(state["head.weight"]), global_pool="avg" if "fc_norm.weight" in state else "token"
        )
    else:  # all tokens go through the encoder's own norm, then are pooled
        arguments |= dict(num_classes=0, global_pool=pool, fc_norm=False)
    return name, arguments


def timm_model(file: WeightsFile, shape: ViTShape, pool: str, mean: Any, std: Any) -> nn.Module:
    """timm's model with these weights, loaded strictly."""
    name, arguments = timm_arguments(file, shape, pool)
    model = timm.create_model(name, **arguments)
    try:
        model.load_state_dict(encoder_state(file.state))
    except RuntimeError as error:
        raise UserError(f"IN: its tensors are not those of timm's {name} ({' '.join(str(error).split())})") from error
    model.pretrained_cfg.update(evaluated(shape, mean, std), num_classes=model.num_classes)
    return model.eval()


SEEN = ("input_size", "interpolation", "crop_pct", "mean", "std")  # timm's pretrained_cfg, as far as it is of images


def evaluated(shape: ViTShape, mean: Any, std: Any) -> dict[str, Any]:
    """How images reach the model, in the words of timm's pretrained_cfg."""
    values = ((shape.in_chans, *shape.img_size), "bicubic", crop_share(shape.img_size), tuple(mean), tuple(std))
    return dict(zip(SEEN, values, strict=True))


def write_timm(file: WeightsFile, shape: ViTShape, pool: str, mean: Any, std: Any, output: Path) -> str:
    """OUTPUT.safetensors and beside it OUTPUT.json with the arguments; the call that loads it."""
    timm_model(file, shape, pool, mean, std)  # loads strictly, or is refused
    name, arguments = timm_arguments(file, shape, pool)
    save_file(encoder_state(file.state), output, metadata={"format": "pt"})
    arguments["pretrained_cfg_overlay"] = evaluated(shape, mean, std)
    config = {"architecture": name, "model_args": arguments}
    output.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}"{said}, checkpoint_path="{output}")'


def overlay_beside(path: Path) -> dict[str, Any]:
    """What `write_timm` wrote beside its file about the images; nothing for other files."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        overlay = dict(found["model_args"]["pretrained_cfg_overlay"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in overlay.items() if key in SEEN}


def write_hub_folder(file: WeightsFile, shape: ViTShape, pool: str, mean: Any, std: Any, output: Path) -> str:
    """A folder with config.json and model.safetensors, for timm and the Hub; the call that loads it."""
    model = timm_model(file, shape, pool, mean, std)
    _, arguments = timm_arguments(file, shape, pool)
    arguments.pop("num_classes")  # timm keeps it at the config's root
    save_for_hf(model, str(output), model_args=arguments, safe_serialization=True)
    return f'timm.create_model("local-dir:{output}", pretrained=True)'


def write_onnx(file: WeightsFile, shape: ViTShape, pool: str, mean: Any, std: Any, output: Path) -> str:
    """An .onnx graph from normalised images [B, C, H, W], any B, to features [B, D] or logits [B, K]."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx: needs the packages {' '.join(missing)}: pip install {' '.join(missing)}")
    model = timm_model(file, shape, pool, mean, std)
    images = torch.zeros(2, shape.in_chans, *shape.img_size)
    torch.onnx.export(
        model,
        (images,),
        str(output),
        input_names=["images"],
        output_names=["output"],
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    return f"normalise pixels in [0, 1] with mean {tuple(mean)} and std {tuple(std)}"
