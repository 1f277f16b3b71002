"""Any plain ViT, for analysis: our encoders and classifiers and timm's VisionTransformer, opened from any checkpoint.

Letters: B images, L patches, N = L + prefix tokens (cls, registers), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models_lut import Encoder, patchify
from models_position_bias import added_layers
from models_vit import Classifier, LinearProbe, Pool
from util.config.groups import DataConfig
from util.data.views import Normalise, Size
from util.runtime.errors import UserError, nearest
from util.weights.export import LABEL_NAMES, ViTShape, depth_remark, overlay_beside, shape_of
from util.weights.interop import WeightsFile, load_weights, read_weights
from util.weights.layouts import Weights, check_shapes, is_linear_probe
from util.weights.reader import shortened

TIMM = "timm:"  # timm:NAME or timm:NAME=FILE
AnyViT = Encoder | VisionTransformer
# what timm raises for a file of another model
CONVERSION_ERRORS = (
    *(RuntimeError, ValueError, LookupError, ArithmeticError),
    *(AttributeError, TypeError, AssertionError),
)

# --------------------------------------------------------------------------------------------------------
# Tokens, logits and shape of a model
# --------------------------------------------------------------------------------------------------------


def tokens_of(model: AnyViT, images: Tensor) -> Tensor:
    """Return tokens [B, N, D] of normalised images [B, C, H, W] after the last norm, if any, prefix tokens first."""
    if isinstance(model, Encoder):
        return model.encode(patchify(images, model.patch_size))
    return model.forward_features(images)


def logits_of(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return logits [B, K] of normalised images, with a graph through the encoder even for a linear probe."""
    return model.forward_head(model.forward_features(images))


def is_classifier(model: AnyViT) -> bool:
    """True if the model has logits."""
    return isinstance(model, VisionTransformer) and model.num_classes > 0


def num_prefix_tokens(model: AnyViT) -> int:
    """Number of tokens before the patches: cls and registers."""
    return 1 if isinstance(model, Encoder) else model.num_prefix_tokens


def grid_of(model: AnyViT) -> tuple[int, int]:
    """Return rows and columns of patches."""
    return model.patch_embed.grid_size


def num_heads_of(model: AnyViT) -> int:
    """Number of attention heads of a block, the same in all."""
    return model.blocks[0].attn.num_heads


def pooled(model: AnyViT, tokens: Tensor, pool: Pool) -> Tensor:
    """Return the mean of the patch tokens, or the cls token, of tokens [B, N, D]: [B, D]."""
    return tokens[:, 0] if pool == "token" else tokens[:, num_prefix_tokens(model) :].mean(dim=1)


def block_number(model: AnyViT, layer: int, label: str) -> int:
    """Return the number of a block, counted from 0; a negative `layer` counts from the end, as in Python.

    Raises:
        UserError: the model, called `label`, has no such block.
    """
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise UserError(f"--layer {layer}: {label} has {depth} blocks, 0 to {depth - 1} or {-depth} to -1")
    return layer % depth


# --------------------------------------------------------------------------------------------------------
# Opening a checkpoint
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedViT:
    """A model in eval mode and without gradients on its device, and the preparation of its images."""

    label: str
    model: AnyViT
    size: Size  # height and width in pixels
    in_chans: int
    normalise: Normalise
    origin: str  # where the weights come from and what became of each tensor, one line
    weights: Weights = "student"
    class_names: list[str] | None = None  # of a classifier, in the order of its logits

    def images(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels [B, C, H, W] as the model takes them, on its device."""
        return self.normalise(pixels.to(self.normalise.shift.device))


def open_vit(
    name: str,
    weights: Weights | None,
    label: str,
    size: Sequence[int],
    num_heads: int | None,
    device: torch.device,
    flag: str = "--checkpoint",
) -> NamedViT:
    """Open a checkpoint of any program that docs/MODELS.md lists, `timm:NAME` (random weights) or `timm:NAME=FILE`.

    Nothing is downloaded, and no code in a file is run.

    Args:
        weights: which of the file's two networks; None: see `read_weights`.
        label: name of the model in tables and pictures; empty: made from the file's.
        size: of the images in pixels, one number or height and width; empty: the model's own. Positions are resampled.
        num_heads: attention heads; None: as the file or its layout tells.
        flag: of the command line, which begins every message.

    Raises:
        UserError: the name is unknown, the file unreadable, the model no ViT with plain softmax attention, its heads
            are unknown, or the patches do not divide the size.
    """
    if name.startswith(TIMM):
        model, mean, std, origin = open_timm(name, size, flag)
        weights, class_names = "student", model.pretrained_cfg.get(LABEL_NAMES)
    else:
        file = read_weights(Path(name), weights, flag)
        model, mean, std, origin = open_file(file, Path(name), size, num_heads, flag)
        weights, class_names = file.weights, file.class_names
    pixels = DataConfig(in_chans=model.patch_embed.proj.in_channels, mean=mean, std=std)
    return NamedViT(
        label=label or default_label(name, weights),
        model=model.requires_grad_(False).eval().to(device),
        size=tuple(model.patch_embed.img_size),
        in_chans=pixels.in_chans,
        normalise=Normalise(pixels.resolved_mean, pixels.resolved_std, device),
        origin=origin,
        weights=weights,
        class_names=list(class_names) if class_names else None,
    )


def default_label(name: str, weights: Weights) -> str:
    """Return a short label: timm's name, or the run's folder and the file."""
    if name.startswith(TIMM):
        return name.removeprefix(TIMM).partition("=")[0]
    path = Path(name).resolve()
    run = f"{path.parent.name}/{path.stem.removeprefix('checkpoint-')}" if "checkpoint" in path.stem else path.stem
    return f"{run}, momentum" if weights == "momentum" else run


Opened = tuple[AnyViT, tuple[float, ...], tuple[float, ...], str]  # model, mean, std, origin


def open_file(file: WeightsFile, path: Path, size: Sequence[int], num_heads: int | None, flag: str) -> Opened:
    """Open a checkpoint as the model that its tensors tell."""
    shape = shape_of(file, num_heads, (), f"{flag} {path}")
    model = empty_model(file, shape, image_size(size, shape.img_size, shape.patch_size))
    report = load_weights(
        model, path, flag=flag, strict=isinstance(model, Classifier), file=file, num_heads=shape.num_heads
    )
    run = file.config or {}
    taken = "" if run else "; the file does not tell how pixels are normalised, ImageNet's mean and std taken"
    origin = f"{path}: {report}; {shape.num_heads} attention heads{depth_remark(shape)}{taken}"
    return model, tuple(run.get("mean") or ()), tuple(run.get("std") or ()), origin


def empty_model(file: WeightsFile, shape: ViTShape, size: Size) -> AnyViT:
    """Build the classifier, linear probe or encoder (a segmenter's too) that the file holds, for images of `size`."""
    common = dict(img_size=size, patch_size=shape.patch_size, in_chans=shape.in_chans)
    architecture = dict(embed_dim=shape.embed_dim, depth=shape.depth, num_heads=shape.num_heads)
    state, run = file.state, file.config or {}
    if "head.weight" in state:
        pool = "avg" if "fc_norm.weight" in state else "token"
        return Classifier(
            architecture, num_classes=len(state["head.weight"]), pool=pool, **added_layers(state), **common
        )
    if is_linear_probe(state):
        pool = "avg" if run.get("global_pool") and not run.get("cls_token") else "token"
        return LinearProbe(architecture, num_classes=len(state["head.1.weight"]), pool=pool, **common)
    if any(name.startswith("decode_head.") for name in state):  # a segmenter's encoder has no last norm
        return Classifier(architecture, num_classes=0, pool="token", final_norm=False, **added_layers(state), **common)
    return Encoder(**architecture, **common)


def open_timm(name: str, size: Sequence[int], flag: str) -> Opened:
    """Open timm's model of that name, with the weights of a file or the initial ones of seed 0."""
    architecture, path = timm_name(name, flag)
    model = random_timm(architecture)
    if not is_plain_vit(model):
        raise UserError(
            f"{flag} {name}: is no plain ViT with softmax attention in every block, as timm:vit_base_patch16_224 is"
        )
    origin = f"{name}: random weights"
    if path:
        origin = load_timm(model, Path(path), architecture, flag)
        model.pretrained_cfg.update(overlay_beside(Path(path), model.patch_embed.proj.in_channels))
    patch = model.patch_embed.patch_size[0]
    own = tuple(model.patch_embed.img_size)
    if image_size(size, own, patch) != own:
        model.set_input_size(img_size=image_size(size, own, patch))
    mean, std = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    return model, mean, std, f"{origin}; pixels normalised as timm has it, by mean {mean} and std {std}"


def timm_name(name: str, flag: str) -> tuple[str, str]:
    """Split `timm:NAME=FILE` into architecture and file (empty if none).

    Raises:
        UserError: timm knows no such model, or no such tag of it.
    """
    architecture, _, path = name.removeprefix(TIMM).partition("=")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(f"{flag} {name}: timm knows no model {architecture}{nearest(architecture, known)}")
    try:
        timm.models.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        bare = architecture.partition(".")[0]
        raise UserError(f"{flag} {name}: timm knows no such tag of {bare}, leave out what follows the point") from error
    return architecture, path


def random_timm(architecture: str) -> nn.Module:
    """Build timm's model of that name with the initial weights of seed 0; the global generator stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(architecture, pretrained=False)


def load_timm(model: VisionTransformer, path: Path, architecture: str, flag: str) -> str:
    """Load a file of timm's, or of a program whose names timm or we know, into timm's model; return its origin.

    A head for other classes is left out, and the model then has none.
    """
    file, own = read_weights(path, flag=flag), model.state_dict()
    check_shapes(file.state, f"{flag} {path}")
    try:
        state = checkpoint_filter_fn(file.state, model)
    except CONVERSION_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {path}: does not fit timm's {architecture} ({reason})") from error
    fitting = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    missing = [name for name in own if name not in fitting and not name.startswith(("head.", "fc_norm."))]
    if missing:
        raise UserError(f"{flag} {path}: lacks {len(missing)} tensors of timm's {architecture}: {shortened(missing)}")
    model.load_state_dict(fitting, strict=False)
    if "head.weight" not in fitting:
        model.reset_classifier(0)
    unused = [name for name in state if name not in fitting]
    return f"{path} as timm's {architecture}" + (f", not used: {shortened(unused)}" if unused else "")


def is_plain_vit(model: nn.Module) -> bool:
    """True if the model cuts images into patches, and each block has one attention layer with a softmax."""
    return (
        isinstance(model, VisionTransformer)
        and isinstance(model.patch_embed, PatchEmbed)
        and all(isinstance(getattr(block, "attn", None), Attention) for block in model.blocks)
    )


def image_size(given: Sequence[int], own: Size, patch_size: int) -> Size:
    """Return --input_size as height and width, or the model's own; UserError if the patches do not divide it."""
    size = (given[0], given[-1]) if given else own
    if any(side % patch_size for side in size):
        multiples = " ".join(str(max(1, round(side / patch_size)) * patch_size) for side in given)
        raise UserError(
            f"--input_size {' '.join(map(str, given))}: no multiple of the patch, {patch_size} pixels, try {multiples}"
        )
    return size
