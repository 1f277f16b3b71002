"""What a resumed run must share with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from util.config.groups import as_dict
from util.runtime.distributed import world_size
from util.runtime.errors import UserError

# Settings of downstream runs that may differ: training does not depend on them, or their resolved form is compared.
DOWNSTREAM_MAY_CHANGE = {"model", "patch_size", "finetune", "weights", "eval", "eval_freq", "dist_eval", "per_class"}

# Settings that may differ, or whose resolved form is compared; any other change would make it another run.
MAY_CHANGE = {
    *("recipe", "output_dir", "log_dir", "device", "compile", "resume", "auto_resume", "start_epoch"),
    *("max_steps", "save_periods", "save_freq", "keep_last", "print_freq", "dist_backend", "dry_run", "print_config"),
    *("num_workers", "pin_mem", "cache", "max_minutes", "on_nonfinite", "elastic", "save_in_background"),
    *("parallel", "checkpoint_activations", "data_path", "val_path", "loader_timeout", "dataset", "batch_size"),
    *("accum_iter", "lr", "blr", "warmup_epochs", "input_size", "mean", "std", "on_bad_image"),
}


def resume_settings(
    config: Any, num_images: int, image_size: tuple[int, int], may_change: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the settings that a resumed run must share with its checkpoint, defaults filled in.

    Folders may have moved; with --elastic the effective batch may be divided in another way.

    Args:
        may_change: fields of this kind of training that may differ too.
    """
    resolved = {
        KIND: kind_of(type(config)),
        "number of images": num_images,
        "data set": config.dataset or "files",
        "effective batch": config.effective_batch,
        "processes": world_size(),
        "batch_size": config.batch_size,
        "accum_iter": config.accum_iter,
        "peak lr": config.peak_lr,
        "input_size": list(image_size),
        "mean": list(config.resolved_mean),
        "std": list(config.resolved_std),
    }
    free = MAY_CHANGE | set(may_change)
    return resolved | {name: value for name, value in as_dict(config).items() if name not in free}


def kind_of(config_type: type) -> str:
    """Return the main's name for a config: pretrain, finetune, linprobe or segment."""
    return config_type.__name__.removesuffix("Config").lower()


# what runs did before a setting existed, which their checkpoints do not name
BEFORE = {
    **{"rel_pos_bias": "none", "layer_scale": 0.0, "exif": "ignore", "holdout": 0.0},
    **{"attentive_queries": 1, "attentive_projections": True},
}
KIND = "kind of training"
NAMES = "names of the images"  # from util.data.sources.fingerprint, added by the mains
ELASTIC = ("processes", "batch_size", "accum_iter")


def check_same_run(settings: dict[str, Any], checkpoint: dict[str, Any], elastic: bool) -> None:
    """Raise UserError with both values for the first of the `resume_settings` that differs from the checkpoint's.

    Args:
        elastic: the effective batch may be divided in another way.
    """
    saved = checkpoint.get("binding_settings")
    if saved is None:
        raise UserError(
            "--resume: the file holds weights but not the state of a run; start from them by --init_from or --finetune"
        )
    if KIND in saved and saved[KIND] != settings[KIND]:
        raise UserError(
            f"--resume: the checkpoint is of {saved[KIND]}, this run is {settings[KIND]}; start from its weights by"
            " --finetune, in pre-training by --init_from"
        )
    for name, value in settings.items():
        before = saved.get(name, BEFORE.get(name))
        if name not in (KIND, NAMES) and before != value and not (elastic and name in ELASTIC):
            fix = "make them equal, or add --elastic" if name in ELASTIC else "make them equal"
            raise UserError(f"--resume: {name} is {value} here but {before} in the checkpoint, {fix}")
    if saved.get(NAMES, settings.get(NAMES)) != settings.get(NAMES):  # older files have none
        raise UserError(
            "--resume: the names of images or classes differ from the checkpoint's; give the same images, or start from"
            " its weights by --finetune, in pre-training by --init_from"
        )
