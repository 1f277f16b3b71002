"""Any image classifier, opened from a checkpoint of ours, MAE's fine-tuned or timm's, with its own view of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from util.data.views import Normalise, Size, centre_view
from util.runtime.errors import UserError
from util.weights.export import LABEL_NAMES, overlay_beside
from util.weights.interop import read_weights
from util.weights.layouts import Weights, check_shapes
from util.weights.vit import (
    CONVERSION_ERRORS,
    TIMM,
    default_label,
    image_size,
    is_classifier,
    open_vit,
    random_timm,
    timm_name,
)

View = Callable[[Tensor], Tensor]  # uint8 image [C, h, w] to the uint8 input of the model, [C, H, W]


@dataclass(frozen=True)
class NamedClassifier:
    """A model in eval mode and without gradients on its device, and the preparation of its images."""

    label: str
    model: nn.Module  # normalised images [B, C, H, W] to logits [B, K]
    size: Size  # height and width in pixels
    in_chans: int
    view: View
    normalise: Normalise
    origin: str  # where the weights come from and what became of each tensor, one line
    weights: Weights = "student"
    class_names: list[str] | None = None  # in the order of the logits


def open_classifier(
    name: str,
    weights: Weights | None,
    label: str,
    size: Sequence[int],
    num_heads: int | None,
    device: torch.device,
    num_classes: int,
    flag: str,
) -> NamedClassifier:
    """Open a fine-tuned model or linear probe of ours, MAE's fine-tuned, `timm:NAME` (random) or `timm:NAME=FILE`.

    Ours see images as fine-tuning evaluates them, timm's as timm does. Nothing is downloaded, no code in a file is run.

    Args:
        weights: the trained ones, or their EMA (main_finetune.py --model_ema); None: see `read_weights`.
        label: name of the model in tables; empty: made from the file's.
        size: of the images in pixels, one number or height and width; empty: the model's own.
        num_heads: attention heads of a ViT; None: as the file or its layout tells.
        num_classes: the number of classes that the model must have.
        flag: of the command line, which begins every message.

    Raises:
        UserError: the name is unknown, the file unreadable, no classifier, or has another number of classes.
    """
    if name.startswith(TIMM):
        if weights == "momentum":
            raise UserError(f"--weights {weights}: {name} has one set of weights, leave the flag out")
        return open_timm_classifier(name, label, size, device, num_classes, flag)
    vit = open_vit(name, weights, label, size, num_heads, device, flag)
    if not is_classifier(vit.model):
        raise UserError(
            f"{flag} {name}: holds an encoder without a classifier, fine-tune it first:"
            f" main_finetune.py --finetune {name}"
        )
    check_classes(vit.model.num_classes, num_classes, f"{flag} {name}")
    view = partial(centre_view, size=vit.size)
    return NamedClassifier(
        vit.label, vit.model, vit.size, vit.in_chans, view, vit.normalise, vit.origin, vit.weights, vit.class_names
    )


def check_classes(number: int, wanted: int, where: str) -> None:
    """Raise UserError if a classifier has another number of classes than it must have."""
    if number != wanted:
        raise UserError(f"{where}: has {number} classes, give a classifier of ImageNet-1k's {wanted}")


def open_timm_classifier(
    name: str, label: str, size: Sequence[int], device: torch.device, num_classes: int, flag: str
) -> NamedClassifier:
    """Open timm's model of that name, with the weights of a file or the initial ones of seed 0."""
    architecture, path = timm_name(name, flag)
    model = random_timm(architecture)
    check_classes(getattr(model, "num_classes", 0), num_classes, f"{flag} {name}")
    origin, class_names = f"{name}: random weights", None
    if path:
        model = fill_timm(model, architecture, read_weights(Path(path), flag=flag).state, f"{flag} {name}")
        overlay = overlay_beside(Path(path), model.pretrained_cfg["input_size"][0])
        model.pretrained_cfg.update(overlay)
        class_names = overlay.get(LABEL_NAMES)
        origin = f"{path} as timm's {architecture}"
    config = resolve_data_config(model=model, use_test_size=not size)
    config["input_size"] = (config["input_size"][0], *set_image_size(model, size or config["input_size"][1:]))
    transform = create_transform(**config, is_training=False, normalize=False)  # leaves pixels as uint8
    return NamedClassifier(
        label=label or default_label(name, "student"),
        model=model.requires_grad_(False).eval().to(device),
        size=tuple(config["input_size"][1:]),
        in_chans=config["input_size"][0],
        view=partial(pil_view, transform=transform),
        normalise=Normalise(tuple(config["mean"]), tuple(config["std"]), device),
        origin=origin,
        class_names=list(class_names) if class_names else None,
    )


def fill_timm(model: nn.Module, architecture: str, state: dict[str, Tensor], where: str) -> nn.Module:
    """Return the same model with the tensors of a file, under timm's names or those that timm converts.

    Raises:
        UserError: the tensors are not exactly those of the model.
    """
    heads = model.pretrained_cfg.get("classifier") or "head"
    for head in (heads,) if isinstance(heads, str) else heads:
        if f"{head}.weight" in state:
            check_classes(len(state[f"{head}.weight"]), model.num_classes, where)
    if isinstance(model, VisionTransformer):
        check_shapes(state, where)
    overlay: dict[str, Any] = dict(state_dict=dict(state), num_classes=model.num_classes)
    try:
        return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    except CONVERSION_ERRORS as error:  # each model reads files in its own way
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:300]} ..."
        raise UserError(f"{where}: does not fit timm's {architecture} ({type(error).__name__}: {reason})") from error


def set_image_size(model: nn.Module, size: Sequence[int]) -> Size:
    """Let a model whose input has a fixed size (a ViT) take images of `size`; return height and width.

    Args:
        size: in pixels, one number or two.

    Raises:
        UserError: the patches do not divide the size, or the model cannot take another one.
    """
    stem = getattr(model, "patch_embed", None)
    own = getattr(stem, "img_size", None)
    if own is None:  # convolutions take any size
        return size[0], size[-1]
    height, width = image_size(size, tuple(own), stem.patch_size[0])
    if (height, width) != tuple(own):
        try:
            model.set_input_size(img_size=(height, width))
        except (AttributeError, AssertionError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--input_size {height} {width}: this model takes {own[0]} {own[1]} alone ({reason})"
            ) from error
    return height, width


def pil_view(image: Tensor, transform: Callable[..., Tensor]) -> Tensor:
    """Apply a transform of PIL images to pixels: uint8 [C, h, w] to uint8 [C, H, W]."""
    return transform(to_pil_image(image))


def without_border(image: Tensor, view: View, border: int) -> Tensor:
    """Apply `view` to an image [C, h, w] after cutting off `border` pixels on each side.

    Raises:
        ValueError: the image has no pixels inside its border.
    """
    if min(image.shape[-2:]) <= 2 * border:
        raise ValueError(f"{image.shape[-1]} x {image.shape[-2]} pixels are all border")
    return view(image[..., border:-border, border:-border])
