"""What training on labels shares beside the run: where a model's weights come from, and --eval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from util.config.checks import check
from util.config.command_line import as_flags, last_value, parse_config
from util.config.groups import DownstreamConfig, PixelConfig
from util.config.same_run import KIND, kind_of
from util.runtime.errors import UserError
from util.train.resume import resumes
from util.weights.checkpoint import load_checkpoint
from util.weights.classes import HEADS, class_permutation, has_other_classes, mapping_remark, reorder_classes
from util.weights.interop import load_weights, read_weights, resampling_note, weights_in
from util.weights.layouts import check_shapes
from util.weights.run_state import run_settings

Config = TypeVar("Config")

# what --eval takes over from the run that it evaluates, where neither flags nor a recipe say otherwise
SETTINGS_OF_THE_MODEL = (
    *("model", "patch_size", "input_size", "in_chans", "mean", "std", "exif"),
    *("pool", "attentive_queries", "attentive_projections"),
    *("global_pool", "cls_token", "head_width", "num_heads", "auxiliary_width", "rel_pos_bias", "layer_scale"),
)


def parse_downstream(config_type: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Parse the command line like `parse_config`; with --eval the checkpoint's own settings are the defaults.

    These are the settings that make the model and its input, in the checkpoint of --resume or --finetune. Where that
    run had --model_ema, its accuracy is that of the averaged weights, so these are evaluated.

    Raises:
        UserError: also where the checkpoint is of another kind of training.
    """
    defaults: list[str] = []
    checkpoints = {flag: path for flag in ("resume", "finetune") if (path := last_value(flag, arguments))}
    if "--eval" in arguments and len(checkpoints) == 1:
        ((flag, path),) = checkpoints.items()
        defaults = settings_of_checkpoint(config_type, path, flag)
    return parse_config(config_type, arguments, program, defaults)


def settings_of_checkpoint(config_type: type, path: str, flag: str) -> list[str]:
    """Return the flags that make the model and its input, as a checkpoint of ours has them; none for other files."""
    checkpoint = load_checkpoint(Path(path), f"--{flag}")
    stage, own_stage = (checkpoint.get("binding_settings") or {}).get(KIND), kind_of(config_type)
    if stage not in (None, own_stage):
        fix = "train one from it first" if stage == "pretrain" else f"evaluate it by main_{stage}.py"
        raise UserError(f"--{flag} {path}: is of {stage}, and --eval here wants a model of {own_stage}; {fix}")
    where = f"--{flag} {path}"
    check_shapes(weights_in(checkpoint, None, where).state, where)  # before a model is built
    saved = run_settings(checkpoint)
    if saved is None:
        return []
    fields = {field.name for field in dataclasses.fields(config_type)}
    settings = {name: saved.get(name) for name in SETTINGS_OF_THE_MODEL if name in fields}
    if saved.get("model_ema") is True:
        settings["weights"] = "momentum"
    return as_flags({name: value for name, value in settings.items() if value not in (None, [])})


def load_initial_weights(model: nn.Module, config: DownstreamConfig, class_names: Sequence[str] | None = None) -> str:
    """Load the encoder of --finetune, or with --eval the whole model; return a line that says what was loaded.

    Args:
        class_names: of the data; the logits of a classifier that was trained on these names are put into their order,
            and the head of one that was trained on others is not taken.

    Raises:
        UserError: the file does not fit the model, or with --eval has other classes than the data.
    """
    if config.eval:
        flag, path = ("--resume", config.resume) if config.resume else ("--finetune", config.finetune)
        where = f"{flag} {path}"
        file = read_weights(Path(path), config.weights, flag)
        permutation = class_permutation(file.class_names, class_names, where)
        report = load_weights(model, Path(path), flag=flag, strict=True, file=file, num_heads=config.num_heads)
        reorder_classes(model, permutation)
        return f"{where}: {report}{mapping_remark(permutation, file.class_names)}"
    if not config.finetune:
        check(config.weights == "student", "weights", config.weights, "is of --finetune, which is not given")
        return "no --finetune: from scratch"
    if resumes(config):
        return f"--finetune {config.finetune}: not read, a checkpoint of this run takes its place"
    where = f"--finetune {config.finetune}"
    file = read_weights(Path(config.finetune), config.weights, "--finetune")
    remark = ""
    if has_other_classes(file.class_names, class_names):  # of equal number, its head would be loaded all the same
        file = file._replace(state={n: x for n, x in file.state.items() if n.split(".")[0] not in HEADS})
        remark = "; its head, for other classes than the data has, is not used"
    report = load_weights(model, Path(config.finetune), flag="--finetune", file=file, num_heads=config.num_heads)
    permutation = None if remark else class_permutation(file.class_names, class_names, where)
    if permutation and not any(name.split(".")[0] in HEADS for name in report.missing):
        reorder_classes(model, permutation)
        remark = mapping_remark(permutation, file.class_names)
    return f"{where}: {report}{remark}{other_normalisation(report.settings, config)}{resampling_note(report)}"


def other_normalisation(run: Mapping[str, Any], config: PixelConfig) -> str:
    """Return a warning where the run that wrote the weights normalised pixels with other numbers; else nothing.

    Args:
        run: the settings of that run; empty for other programs' files.
    """
    if run.get("in_chans") != config.in_chans:
        return ""  # not a run of ours, or the first layer was resampled, which the report says
    before = PixelConfig(in_chans=config.in_chans, **{name: tuple(run.get(name) or ()) for name in ("mean", "std")})
    if (before.resolved_mean, before.resolved_std) == (config.resolved_mean, config.resolved_std):
        return ""
    flags = as_flags({"mean": list(before.resolved_mean), "std": list(before.resolved_std)})
    return f"; pixels were normalised by other numbers there, {' '.join(flags)}: give the same here"
