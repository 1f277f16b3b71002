"""What runs cost in FLOP, and how long they will take."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from util.config.pretrain import PretrainConfig
from util.runtime.logs import LOG_FILE
from util.tables.outcomes import as_mapping, read_text
from util.tables.plan import Run
from util.tables.tables import PRETRAIN, PROBE


def flops(run: Run, images: int) -> float:
    """Return the FLOP of a run's matrix products, forward and backward, without evaluations.

    Args:
        images: per epoch, for runs that have no number of their own.
    """
    config = run.config
    if run.main == PROBE:
        return flops_per_image(run) * (run.images or images)
    trained = (run.images or images) * config.epochs
    if config.max_steps is not None:
        trained = min(trained, config.max_steps * config.batch_size * config.accum_iter * run.processes)
    return flops_per_image(run) * trained


def flops_per_image(run: Run) -> int:
    """Return the FLOP per image, as --dry_run of the mains counts them; a probe passes it through each encoder."""
    if run.main == PROBE:
        return len(run.config.encoders) * _encoder_flops(cacheable_config(run.after))
    return _flops_per_image(run.main, cacheable_config(run))


def cacheable_config(run: Run) -> Any:
    """Return the settings with fixed values where these do not change the count, so that runs share one."""
    fixed = {"seed": 0, "output_dir": "", "finetune": "", "blr": 0.0, "weight_decay": 0.0, "holdout": 0.0}
    return dataclasses.replace(run.config, **{key: fixed[key] for key in fixed if hasattr(run.config, key)})


@functools.cache
def _flops_per_image(main: str, config: Any) -> int:
    from models_vit import Classifier, LinearProbe
    from util.train.cost import classifier_flops, pretrain_cost

    if main == PRETRAIN:
        return pretrain_cost(config.model_arguments, config.views == "symmetric", config.student_type).flops_per_image
    with torch.device("meta"):
        classifier = Classifier if main == "finetune" else LinearProbe
        model = classifier(**config.model_arguments(1000))  # the number of classes hardly changes the count
    return classifier_flops(model, (config.in_chans, *config.resolved_input_size))


@functools.cache
def _encoder_flops(config: PretrainConfig) -> int:
    from util.train.cost import features_flops

    with torch.device("meta"):
        student = config.student_type(**config.model_arguments)
    return features_flops(student, (config.in_chans, *config.resolved_input_size))


class TimeEstimate:
    """Estimate how long runs take: by the speed of other runs of the same main, else by an assumed one.

    Args:
        flops_per_second: assumed speed of all processes of a run together.
        images: per epoch, for runs that have no number of their own.
    """

    def __init__(self, flops_per_second: float, images: int):
        self.assumed, self.images = flops_per_second, images
        self.measured: dict[str, list[float]] = {}  # main -> FLOP/s

    def add_log(self, run: Run) -> None:
        """Take the speed from the log of a run, finished or not."""
        if speed := images_per_second(run.folder):
            self.measured.setdefault(run.main, []).append(speed * flops_per_image(run))

    def add_run(self, run: Run, share: float, seconds: float) -> None:
        """Take the speed from a share of a run that has just taken these seconds, start and evaluations included."""
        if share > 0:
            self.measured.setdefault(run.main, []).append(share * flops(run, self.images) / seconds)

    def seconds(self, run: Run, share: float = 1.0) -> float:
        """Return the seconds that a share of a run will take."""
        speed = statistics.median(self.measured[run.main]) if run.main in self.measured else self.assumed
        return share * flops(run, self.images) / speed


def images_per_second(folder: Path) -> float | None:
    """Return the median speed over the lines of a run's log; None if it has none."""
    values = [as_mapping(line).get("images_per_second") for line in read_text(folder / LOG_FILE).splitlines()]
    speeds = [value for value in values if isinstance(value, int | float) and math.isfinite(value) and value > 0]
    return statistics.median(speeds) if speeds else None
