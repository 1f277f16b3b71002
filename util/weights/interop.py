"""Weights of other programs and of our own runs, loaded into models: strictly, with a report of what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models_lut import Student
from models_position_bias import SHARED, TABLE, transfer_part
from util.runtime.errors import UserError
from util.weights.checkpoint import load_checkpoint
from util.weights.layouts import (
    CLASSIFIER,
    DINOV2,
    ENCODER_NAME,
    Weights,
    check_shapes,
    choose_network,
    dinov2_description,
    heads_of,
    layout_of,
    part_of,
)
from util.weights.reader import short_name, shortened
from util.weights.resampling import resample_to_model
from util.weights.run_state import check_finite, class_names_in, run_settings

# tokens pass through these: features differ if the file has more of them than the model
PASSED_THROUGH = ("blocks", "patch_embed", "norm_pre", "reg_token", "dist_token", SHARED)


@dataclass(frozen=True)
class LoadReport:
    """The tensors of a file that were loaded, resampled, missing or not used; names as in our models."""

    layout: str  # which program wrote the file, and which of its networks was taken
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]  # among the loaded, changed to the model's shape: `name: change`
    missing: tuple[str, ...]  # of the model, left as initialised: not in the file, or their part is incomplete there
    mismatched: tuple[str, ...]  # among the missing, in the file with another shape: `name: shape instead of shape`
    unexpected: tuple[str, ...]  # in the file, not used
    settings: Mapping[str, Any]  # of the run that wrote it; empty for another program's file
    remarks: tuple[str, ...] = ()  # what the file does not say, and what was taken for it

    def __str__(self) -> str:
        """Return one line; a part that is wholly missing or unused is named as one."""
        lists = {
            "left as initialised": by_part(self.missing),
            "of another shape": shortened(list(self.mismatched)),
            "not used": by_part(self.unexpected),
            "resampled": ", ".join(self.resampled),
        }
        shown = [f"{title}: {names}" for title, names in lists.items() if names]
        return "; ".join([f"{self.layout}, {len(self.loaded)} tensors loaded", *shown, *self.remarks])


def resampling_note(report: LoadReport) -> str:
    """Return a further line that says which sizes of the checkpoint differ from the model's; empty if none do."""
    if not report.resampled:
        return ""
    return f"\nNOTE: the checkpoint has another patch, image size or number of channels: {', '.join(report.resampled)}"


def by_part(names: tuple[str, ...]) -> str:
    """Return the names of the encoder's tensors, and the number of tensors of each other part."""
    count = Counter(part_of(name) for name in names)
    encoder = [name for name in names if part_of(name) == "encoder"]
    others = [f"{part} ({n} tensors)" for part, n in count.items() if part != "encoder"]
    return ", ".join([shortened(encoder, most=12)] * bool(encoder) + others)


# --------------------------------------------------------------------------------------------------------
# Reading a file under our names
# --------------------------------------------------------------------------------------------------------


class WeightsFile(NamedTuple):
    """The contents of a checkpoint."""

    state: dict[str, Tensor]  # under MAE's names, which are ours
    layout: str  # which program wrote it, and which of its networks was taken
    config: dict[str, Any] | None  # the settings of the run, if a run of ours wrote it
    weights: Weights  # which of the file's
    num_heads: int | None  # None: neither the file nor its layout tells
    class_names: list[str] | None  # of a classifier, in the order of its logits


def read_weights(path: Path, weights: Weights | None = "student", flag: str = "--init_from") -> WeightsFile:
    """Read the weights in a checkpoint of ours, MAE, LUT's release, timm, DINO, iBOT or MoCo v3; code is refused.

    Args:
        weights: None: those by which the run was judged, which for a classifier with --model_ema is its EMA.

    Raises:
        UserError: the file is unreadable, holds no weights or unusable ones, or no momentum encoder if that is asked
            for.
    """
    return weights_in(load_checkpoint(path, flag), weights, f"{flag} {path}")


def weights_in(checkpoint: dict[str, Any], weights: Weights | None, where: str) -> WeightsFile:
    """Return the weights in a checkpoint that is loaded already; see `read_weights`.

    Args:
        where: flag and path, which begin every message.
    """
    config = run_settings(checkpoint)
    if weights is None:
        trained, _, _ = choose_network(checkpoint, "student", where)
        is_classifier = "head.weight" in trained or "fc_norm.weight" in trained
        averaged = is_classifier and config is not None and config.get("model_ema") is True
        weights = "momentum" if averaged else "student"
    state, key, others = choose_network(checkpoint, weights, where)
    if not state:
        raise UserError(f"{where}: holds no tensors, is it a checkpoint?")
    raw_names = checkpoint[key] if isinstance(checkpoint.get(key), dict) else checkpoint
    layout = layout_of(state, key, list(raw_names))
    num_heads = heads_of(checkpoint, state, layout, config)
    check_parameters(state, where)
    if key == "model_ema":
        layout = "ViT, EMA" if layout == CLASSIFIER else "LUT, momentum encoder"
    elif key in ("teacher", "momentum_encoder", "state_dict_ema") or "state_dict_ema" in others:
        unused = [other for other in others if other in ("student", "state_dict", "state_dict_ema", "teacher")]
        layout += f" ({key}" + (f"; {', '.join(unused)} not used" if unused else "") + ")"
    return WeightsFile(state, layout, config, weights, num_heads, class_names_in(checkpoint, where))


def check_parameters(state: dict[str, Tensor], where: str) -> None:
    """Raise UserError with the names of weights that are not floating-point numbers, or not finite."""
    kinds = {name: str(x.dtype).removeprefix("torch.") for name, x in state.items()}
    usable = ("float16", "bfloat16", "float32", "float64")
    wrong = [f"{n} ({kind})" for n, kind in kinds.items() if kind not in usable and ENCODER_NAME.match(n)]
    if wrong:
        raise UserError(f"{where}: weights that are no floating-point numbers: {shortened(wrong)}; take another file")
    check_finite({name: x for name, x in state.items() if kinds[name] in usable}, where)


# --------------------------------------------------------------------------------------------------------
# Loading into a model
# --------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    path: Path,
    weights: Weights = "student",
    flag: str = "--init_from",
    strict: bool = False,
    file: WeightsFile | None = None,
    num_heads: int | None = None,
) -> LoadReport:
    """Load a file into LUT, MomentumEncoder, Classifier, LinearProbe or UperNet.

    The encoder must match tensor by tensor, and the file's may have no layer that the model lacks. Decoder, heads and
    `fc_norm` are loaded if the file holds the whole of them, and stay as they are otherwise. Positions of another grid,
    patches of another size and other numbers of channels are resampled.

    Args:
        strict: every tensor of the model must match, not only those of the encoder.
        file: what `read_weights` returned for the path, so that it is not read again.
        num_heads: the value of --num_heads, which overrides what the file tells.

    Raises:
        UserError: a tensor that must match is missing, has a shape that cannot be resampled, or has no counterpart; or
            the file's attention heads are of another number.
    """
    file = file or read_weights(path, weights, flag)
    own, where = model.state_dict(), f"{flag} {path}"
    if file.layout.startswith(DINOV2):
        raise UserError(f"{where}: {dinov2_description(file.state)}")
    check_shapes(file.state, where)
    positions_are_fixed = isinstance(model, Student)
    state, resampled = resample_to_model(
        file.state, own, model.patch_embed.grid_size, file.config, computes_positions=positions_are_fixed
    )
    wrong = differences(state, own)
    check_match(file, state, own, wrong, strict, where)
    remark = check_heads(model, file, num_heads, where)
    incomplete = {part_of(name) for name in wrong}
    loaded = {name: state[name] for name in own if part_of(name) not in incomplete}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        layout=file.layout,
        loaded=tuple(loaded),
        resampled=tuple(f"{name}: {change}" for name, change in resampled.items() if name in loaded),
        missing=tuple(name for name in own if name not in loaded),
        mismatched=tuple(f"{name}: {shapes}" for name, shapes in wrong.items() if name in state),
        unexpected=tuple(name for name in state if name not in loaded),
        settings=file.config or {},
        remarks=(remark,) if remark else (),
    )


def differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the reason for each tensor of `own` that `state` lacks or has in another shape."""
    return {
        name: "missing" if name not in state else f"{list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name not in state or state[name].shape != tensor.shape
    }


def check_heads(model: nn.Module, file: WeightsFile, num_heads: int | None, where: str) -> str:
    """Compare the model's attention heads with the file's; what to say if the file does not tell.

    Raises:
        UserError: they differ, and --num_heads does not ask for it.
    """
    own = model.blocks[0].attn.num_heads
    if file.num_heads is None:
        return "" if num_heads else f"the file does not tell its attention heads, {own} taken as the model has them"
    if file.num_heads == own:
        return ""
    if num_heads:
        return f"{own} attention heads, as --num_heads says; those of {file.layout} have {file.num_heads}"
    raise UserError(
        f"{where}: was trained with {file.num_heads} attention heads ({file.layout}), and the model has {own}:"
        f" add --num_heads {file.num_heads}"
    )


def check_match(
    file: WeightsFile,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    wrong: Mapping[str, str],
    strict: bool,
    where: str,
) -> None:
    """Raise UserError if the encoder (or with `strict` the model) lacks tensors, or passes tokens through fewer layers.

    Args:
        state: the file's, resampled to the model.
        own: the model's state.
        wrong: name of each tensor of the model that is not in `state` with its shape -> the reason.
    """
    refused = [f"{name} ({reason})" for name, reason in wrong.items() if strict or part_of(name) == "encoder"]
    if refused:
        plain = any(transfer_part(name) for name in wrong if name not in state)
        pooled = "norm.weight" in wrong and "fc_norm.weight" in state and "fc_norm.weight" not in own
        run_model = (file.config or {}).get("model")
        raise UserError(
            f"{where}: {len(refused)} tensors of the {'model' if strict else 'encoder'} do not fit:"
            f" {shortened(refused)};"
            f" the file ({file.layout}) has besides: {shortened(sorted(set(state) - set(own))) or 'nothing'}"
            + "; fine-tuned on the mean of the tokens it has no last norm: take the pre-training's file" * pooled
            + "; it has none of the layers that --rel_pos_bias and --layer_scale add: set them to none and 0" * plain
            + (f"; the run that wrote it had --model {short_name(run_model)}" if run_model else "")
        )
    surplus = [name for name in state if name not in own and name.split(".")[0] in PASSED_THROUGH]
    if surplus:
        raise UserError(
            f"{where}: another encoder ({file.layout}), {len(surplus)} of its tensors have no place in the model's:"
            f" {shortened(surplus)}; take a model of that depth, if there is one with such layers"
            + "; fine-tuning and segmentation have --rel_pos_bias"
            * any(name.endswith(TABLE) for name in surplus)
        )
    integers = [
        name for name, x in own.items() if name in state and x.is_floating_point() != state[name].is_floating_point()
    ]
    if integers:
        raise UserError(f"{where}: tensors of integers for weights, or the reverse: {shortened(integers)}")
