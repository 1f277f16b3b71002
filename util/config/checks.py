"""Checks of settings: a wrong value is a UserError that names the flag, the value and the fix."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from util.runtime.distributed import world_size
from util.runtime.errors import UserError, nearest

LARGEST = 2**31 - 1  # of all whole numbers but the seed
LIMITS = {  # what no machine trains with today: refused before memory is asked for
    **dict.fromkeys(("input_size", "patch_size", "mask_unit", "eval_stride"), 2**14),
    **dict.fromkeys(("head_depth", "predictor_depth", "decoder_depth"), 100),
    **dict.fromkeys(("head_mlp_dim", "head_width", "nb_classes"), 2**20),
    "num_workers": 256,
    **dict.fromkeys(("seed", "attentive_seed"), 2**32 - 1),
}
PATHS = ("recipe", "output_dir", "log_dir", "data_path", "val_path", "resume", "finetune", "init_from")
LONGEST_NAME = 255  # bytes of a file's name


def check(holds: bool, flag: str, value: object, fix: str) -> None:
    """Raise UserError `--flag value: fix` unless `holds` (a comparison with nan never does)."""
    if not holds:
        shown = " ".join(map(str, value if isinstance(value, tuple | list) else [value]))
        raise UserError(f"--{flag} {shown}".rstrip() + f": {fix}")


def check_limits(config: Any) -> None:
    """Raise UserError for whole numbers beyond `LIMITS`, and for paths that no file system takes."""
    for field in dataclasses.fields(config):
        value, limit = getattr(config, field.name), LIMITS.get(field.name, LARGEST)
        numbers = [n for n in (value if isinstance(value, tuple) else [value]) if type(n) is int]
        check(all(n <= limit for n in numbers), field.name, value, f"must be at most {limit}")
        if field.name in PATHS and value:
            fits = all(len(os.fsencode(part)) <= LONGEST_NAME for part in value.split("/"))
            check(fits, field.name, f"{value[:40]}...", f"names of files have at most {LONGEST_NAME} bytes")


def check_image_size(size: Sequence[int], least: int = 1) -> None:
    """Raise UserError unless the size is empty, one number of pixels, or height and width."""
    check(len(size) <= 2, "input_size", size, "give one number, or height and width")
    check(all(n >= least for n in size), "input_size", size, f"must be {least} pixels or more")


def check_loader_timeout(seconds: float) -> None:
    """Raise UserError unless the timer of the data loader takes it."""
    check(0 <= seconds <= 1e9, "loader_timeout", seconds, "must lie in 0 (never) .. 1000000000 seconds")


def check_batch_norm(config: Any) -> None:
    """Raise UserError if BatchNorm would be trained on a single image."""
    fix = "BatchNorm needs two images at a time, over all processes"
    check(config.eval or config.batch_size * world_size() >= 2, "batch_size", config.batch_size, fix)


def check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    """Raise UserError with the nearest name unless `value` is known."""
    check(value in known, flag, value, f"unknown{nearest(value, known)} (one of {', '.join(known)})")
