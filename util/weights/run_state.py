"""What a checkpoint of a run of ours must hold: types of its settings, and of all that a resumed run takes from it."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.runtime.errors import UserError
from util.weights.reader import short_name, shortened

RESUME_SETTINGS = "binding_settings"  # only runs of ours write this key
CLASS_NAMES = "class_names"
PARTS_OF_BLOCKS = ("blocks", "decoder_blocks")
MOST_UPDATES = 10**12
MOST_CLASSES = 100_000

# key -> type and what to call it; a key that is missing is reported when it is needed
STATE_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "model": ((dict,), "a dict of tensors"),
    "model_ema": ((dict,), "a dict of tensors"),
    "optimizer": ((dict,), "a dict"),
    "scaler": ((dict,), "a dict"),
    "config": ((dict,), "a dict of settings"),
    "updates": ((int,), "a number of updates"),
    "best_metric": ((int, float, type(None)), "a number"),
}


def check_run_state(state: Mapping[str, Any], where: str) -> None:
    """Check the types of what is there in a checkpoint of a run of ours; files of other programs pass.

    Raises:
        UserError: a part has the wrong type, or a setting has.
    """
    if RESUME_SETTINGS not in state:
        return
    for key, (allowed, description) in STATE_TYPES.items():
        if key in state and (not isinstance(state[key], allowed) or isinstance(state[key], bool)):
            raise UserError(f"{where}: its {key} is {shown(state[key])}, not {description}; the file is damaged")
    if not 0 <= state.get("updates", 0) <= MOST_UPDATES:
        raise UserError(f"{where}: its updates are {shown(state['updates'])}, not a number of updates")
    shared = state[RESUME_SETTINGS]
    if not (isinstance(shared, dict) and all(is_plain(value) for value in shared.values())):
        raise UserError(f"{where}: its {RESUME_SETTINGS} are {shown(shared)}, not plain settings; the file is damaged")
    batch = shared.get("effective batch", 1)
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"{where}: its effective batch is {shown(batch)}, not a number of images")
    wrong = [f"{name} {shown(value)}" for name, value in state.get("config", {}).items() if not is_setting(name, value)]
    if wrong:
        raise UserError(f"{where}: settings of the wrong type: {shortened(wrong)}; the file is damaged")


def check_resumable(state: Mapping[str, Any], where: str, start_flag: str) -> None:
    """Raise UserError unless a run can resume from the checkpoint.

    Args:
        start_flag: takes the weights alone, `--init_from` or `--finetune`.
    """
    if RESUME_SETTINGS not in state:
        raise UserError(
            f"{where}: holds {contents(state)}, but not the state of a run of this program;"
            f" start from its weights by {start_flag}"
        )
    lacking = [key for key in ("model", "optimizer", "scaler", "updates") if key not in state]
    if lacking:
        raise UserError(f"{where}: lacks {', '.join(lacking)}; start from its weights by {start_flag}")
    for key in ("model", "model_ema"):
        tensors = state.get(key) or {}
        integers = [
            str(name)
            for name, x in tensors.items()
            if not (isinstance(x, Tensor) and (x.is_floating_point() or str(name).endswith("num_batches_tracked")))
        ]
        if integers:
            raise UserError(f"{where}: weights that are no floating-point numbers: {shortened(integers)}")
        check_finite(tensors, f"{where}: {key}")


def check_sizes(run: PretrainConfig, state: Mapping[str, Tensor], where: str) -> None:
    """Compare the sizes that a run's settings give with those of its tensors, before a model of these sizes is built.

    Args:
        run: settings that the checkpoint carries, perhaps with flags over them.
        state: the student's tensors.

    Raises:
        UserError: with the names of the settings and both values.
    """
    blocks, decoder = (len({n.split(".")[1] for n in state if n.startswith(f"{part}.")}) for part in PARTS_OF_BLOCKS)
    matrices = {name: x for name, x in state.items() if x.ndim == 2 and x.numel()}
    head, predictor = ([x for n, x in matrices.items() if n.startswith(part)] for part in ("head.", "predictor."))
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    pairs: dict[str, tuple[int, int]] = {"model (blocks)": (run.architecture["depth"], blocks)}
    if kernel is not None and kernel.ndim == 4:
        pairs["model (width)"] = (run.architecture["embed_dim"], len(kernel))
        pairs["patch_size"] = (run.resolved_patch_size, kernel.shape[-1])
    if positions is not None and positions.ndim == 3:
        pairs["input_size (patches)"] = (run.num_patches, positions.shape[1] - 1)
    if run.method == "mae" and run.w_mim > 0:
        pairs["decoder_depth"] = (run.model_arguments["decoder_depth"], decoder)
    if run.has_momentum_encoder:
        pairs |= {"head_depth": (run.head_depth, len(head)), "predictor_depth": (run.predictor_depth, len(predictor))}
        pairs |= {"head_mlp_dim": (run.head_mlp_dim, len(head[0]))} if len(head) > 1 else {}
    wrong = [f"{name} {setting}, in the tensors {own}" for name, (setting, own) in pairs.items() if setting != own]
    if wrong:
        raise UserError(f"{where}: settings and weights do not belong together: {shortened(wrong)}")


def check_moments(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Raise UserError if a moment of the optimiser has another shape than its parameter."""
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.ndim and moment.shape != parameter.shape:
                shapes = f"{list(moment.shape)} for a parameter {list(parameter.shape)}"
                raise UserError(
                    f"{where}: the optimizer's {short_name(name)} is {shapes}; the file is of another model"
                )


def check_finite(state: Mapping[str, Any], where: str) -> None:
    """Raise UserError with the names of the tensors that hold NaN or infinity."""
    floating = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.is_floating_point()}
    broken = [str(name) for name, x in floating.items() if not torch.isfinite(x).all()]
    if broken:
        raise UserError(f"{where}: NaN or infinity in {len(broken)} tensors: {shortened(broken)}; take another file")


def contents(state: Mapping[str, Any]) -> str:
    """Return the keys of a checkpoint of another program, with the epoch that it says."""
    epoch = state.get("epoch")
    after = f" after epoch {epoch}" if isinstance(epoch, int) else ""
    return shortened([str(key) for key in state], most=8) + after if state else "nothing"


def run_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the run that wrote a checkpoint, None if there are none.

    In a file of another program, entries that share a name with a setting of ours but not its type are left out.
    """
    config = checkpoint.get("config")
    if not isinstance(config, dict):
        return None
    return {name: value for name, value in config.items() if is_setting(name, value)}


def class_names_in(checkpoint: Mapping[str, Any], where: str) -> list[str] | None:
    """Return the names of a classifier's classes in the order of its logits, None if the file has none.

    Raises:
        UserError: they are not a list of texts.
    """
    names = checkpoint.get(CLASS_NAMES)
    if names is None:
        return None
    if not (isinstance(names, list) and len(names) <= MOST_CLASSES and all(isinstance(name, str) for name in names)):
        raise UserError(f"{where}: its {CLASS_NAMES} are {shown(names)}, not a list of names")
    return names


# --------------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------------


@functools.cache
def setting_types() -> dict[str, tuple[Any, ...]]:
    """Name of each setting of any kind of training -> the types that it has there."""
    types_of: dict[str, tuple[Any, ...]] = {}
    for config in (PretrainConfig, FinetuneConfig, LinprobeConfig, SegmentConfig):
        for name, hint in get_type_hints(config, include_extras=True).items():
            types_of[name] = (*types_of.get(name, ()), hint)
    return types_of


def is_setting(name: object, value: object) -> bool:
    """True if a value has a type that the setting of this name may have; plain values of unknown names pass too."""
    if not isinstance(name, str):
        return False
    hints = setting_types().get(name)
    return is_plain(value) if hints is None else any(has_type(value, hint) for hint in hints)


def has_type(value: object, hint: Any) -> bool:
    """True if a value, as YAML or a checkpoint holds it, has the annotated type of a setting."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return has_type(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(has_type(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) for each in inner)  # values of older versions pass
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) <= 64 and all(has_type(each, inner[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def is_plain(value: object, depth: int = 0) -> bool:
    """True for None, texts, numbers, and lists and dicts of them."""
    if isinstance(value, list | tuple | dict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return depth < 4 and all(is_plain(each, depth + 1) for each in inner)
    return value is None or isinstance(value, str | int | float)


def shown(value: object) -> str:
    """Return a value from a file as a message shows it."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, str | int | float | None):
        digits = isinstance(value, int) and value.bit_length() > 200
        return "a huge number" if digits else short_name(repr(value))
    return f"a {type(value).__name__}"
