"""Settings of the benchmarks. The settings of the measured run are those of main_pretrain.py."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from models_lut import Steering
from util.config.checks import check, check_choice
from util.config.command_line import flag_values, parse_config
from util.config.pretrain import PretrainConfig
from util.runtime.distributed import world_size

Form = Literal["mae", "asymmetric", "symmetric"]
Kind = Literal["ours", "plain"]
SWEEPS = {  # short name -> flag and its default values
    "batch": ("batch_size", "8,16,32,64"),
    "img_size": ("input_size", "96,160,224,288,384"),
    "depth": ("depth", "3,6,12,24"),
}
PAPER_STEERING = {field.name: field.default for field in dataclasses.fields(Steering)}
PLAIN_METHOD = {"method": "mae", "parallel": "ddp"} | PAPER_STEERING  # the choices that util/bench/baseline.py knows


@dataclass(frozen=True)
class BenchConfig(PretrainConfig):
    """Flags of main_pretrain.py that say what is measured, and how often it is measured."""

    model: str = "lut_vit_small_patch16"
    batch_size: int = 8
    """images per update and forward pass"""
    depth: int | None = None
    """number of encoder blocks; default: that of the model"""
    vary: tuple[str, ...] = ()
    """compare all combinations of these values, for example compile=none,block amp=fp32,bf16"""
    rounds: int = 7
    """number of turns of each variant"""
    json: str = ""
    """JSON file for all results, with command, versions and machine"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth is None or self.depth >= 1, "depth", self.depth, "must be 1 or more")
        check(self.rounds >= 1, "rounds", self.rounds, "must be 1 or more")
        check_report(self.json)
        check(world_size() == 1, "nproc_per_node", world_size(), "the bench runs in one process")
        for axis in self.vary:
            check_choice("vary", axis.partition("=")[0], measured_settings())

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the architecture of --model, with the number of blocks that --depth sets."""
        default = super().architecture
        return default | {"depth": self.depth or default["depth"]}

    def in_form(self, form: Form) -> BenchConfig:
        """Return these settings for MAE, or for one of the two forms of LUT."""
        if form == "mae":
            return dataclasses.replace(self, alpha=0.0, **PAPER_STEERING)
        fix = f"alpha is 0 with --model {self.model}: give a lut_* model, or --alpha"
        check(self.has_momentum_encoder, "forms", form, fix)
        return dataclasses.replace(self, views=form)


@dataclass(frozen=True)
class StepConfig(BenchConfig):
    """Measure the update without a data loader: images/s, time of its parts, memory, arithmetic."""

    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0"""
    lr: float | None = 1e-4
    """learning rate; it must be high enough for a wrong update to show in the losses that are compared"""
    forms: tuple[Form, ...] = ("mae", "asymmetric", "symmetric")
    """mae; asymmetric: LUT as in the paper; symmetric: LUT as released"""
    variants: tuple[Kind, ...] = ("ours", "plain")
    """ours: this code; plain: the same step in plain eager PyTorch (util/bench/baseline.py)"""
    steps: int = 5
    """updates per turn"""
    warmup_steps: int = 3
    """updates between the comparison of the losses and the first turn"""
    check_steps: int = 5
    """updates over which the losses of all variants must agree, from the same weights and images"""
    profile: str = ""
    """folder for a trace of each variant (chrome://tracing, ui.perfetto.dev); prints the most expensive operators"""
    sweep: str = ""
    """measure each value of a flag: batch, img_size, depth, or a flag with its values, for example batch_size=8,16"""
    plot: str = ""
    """PNG file of the sweep; default: beside --json, else bench-FLAG.png"""
    find_batch: bool = False
    """find the largest batch of each variant that fits into the memory of the GPU, or into --memory_gib"""
    memory_gib: float | None = None
    """memory limit of a process for --find_batch on a CPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("forms", "variants"):
            values = getattr(self, flag)
            check(len(values) > 0, flag, "", "give at least one")
            check(len(set(values)) == len(values), flag, values, "give each once")
        if "plain" in self.variants:
            for flag, value in PLAIN_METHOD.items():
                fix = f"the plain variant computes {value} only, add --variants ours"
                check(getattr(self, flag) == value, flag, getattr(self, flag), fix)
            fix = "the plain variant always reconstructs, add --variants ours"
            check(self.w_mim > 0, "w_mim", self.w_mim, fix)
        for flag in ("steps", "check_steps"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        limit = self.memory_gib
        check(limit is None or limit > 0, "memory_gib", limit, "must be above 0")
        check(limit is None or self.find_batch, "memory_gib", limit, "works with --find_batch only, add it")
        if self.sweep:
            _ = self.sweep_axis
        conflict = bool(self.sweep) and (self.find_batch or bool(self.profile))
        check(not conflict, "sweep", self.sweep, "leave out --find_batch and --profile beside it")
        check(not self.plot or bool(self.sweep), "plot", self.plot, "works with --sweep only, add it")

    @property
    def sweep_axis(self) -> str:
        """The value of --sweep as flag=value,value, with short names and default values filled in."""
        name, equals, values = self.sweep.partition("=")
        flag, default = SWEEPS.get(name, (name, ""))
        check_choice("sweep", name, [*SWEEPS, *(measured_settings() if equals else [])])
        return f"{flag}={values if equals else default}"


@dataclass(frozen=True)
class LoaderConfig(BenchConfig):
    """Measure the data loader alone: images/s per core."""

    batch_size: int = 64
    """images per batch"""
    num_workers: int | None = 0
    """data loader workers (0: none); images/s are divided by their number"""
    pipelines: tuple[Literal["ours", "pil"], ...] = ("ours", "pil")
    """ours: this code; pil: Pillow decodes the file for each view, and the worker normalises to fp32"""
    images: int = 256
    """images per turn"""
    scale_to: str = ""
    """WIDTHxHEIGHT: re-encode the images in memory at this size first (JPEG, quality 90)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.pipelines) > 0, "pipelines", "", "give at least one")
        batch, images = self.batch_size, self.images
        check(batch <= images, "batch_size", batch, f"must not exceed --images {images}")
        fix = "must be 1 or 3 for the pil pipeline, or add --pipelines ours"
        check("pil" not in self.pipelines or self.in_chans != 4, "in_chans", 4, fix)
        _ = self.scaled_size

    @property
    def scaled_size(self) -> tuple[int, int] | None:
        """Return --scale_to as width and height in pixels."""
        if not self.scale_to:
            return None
        sides = self.scale_to.lower().split("x")
        valid = len(sides) == 2 and all(side.isdecimal() and int(side) >= 8 for side in sides)
        check(valid, "scale_to", self.scale_to, "write WIDTHxHEIGHT, as 500x375")
        return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class EpochConfig(BenchConfig):
    """Measure whole runs of main_pretrain.py: images/s, and shares of data wait, saving and evaluation."""

    epochs: int = 1
    """epochs per run"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0"""
    rounds: int = 3
    """runs per variant"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth is None, "depth", self.depth, "main_pretrain.py has no such flag, choose another --model")
        check(not self.resume, "resume", self.resume, "every measured run starts fresh, leave it out")


@dataclass(frozen=True)
class LimitsConfig:
    """Measure the machine alone: matrix products, memory, disk, JPEG decoding."""

    device: str = "auto"
    """auto: the GPU if there is one, else the CPU"""
    numbers: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ()
    """number formats of the matrices; default: all that the device supports"""
    sides: tuple[int, ...] = ()
    """sides of the square matrices; default: 1024 and 2048, on a GPU 4096 to 16384"""
    seconds: float = 1.0
    """seconds per measurement"""
    array_mib: int = 256
    """MiB of each array that is copied; must exceed the caches"""
    folder: str = "."
    """folder in which a file is written"""
    file_mib: int = 256
    """MiB of that file"""
    data_path: str = ""
    """images to decode; default: two photographs that come with scikit-learn, at 500x375"""
    json: str = ""
    """JSON file for all results, with command, versions and machine"""

    def __post_init__(self) -> None:
        check(all(side >= 1 for side in self.sides), "sides", self.sides, "must be 1 or more")
        check(self.seconds > 0, "seconds", self.seconds, "must be above 0")
        for flag in ("array_mib", "file_mib"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check_report(self.json)


@dataclass(frozen=True)
class SavingConfig:
    """Measure what saving checkpoints costs."""

    model: str = "lut_vit_base_patch16"
    """model name of main_pretrain.py"""
    folder: str = ""
    """folder for the checkpoints, two at a time; default: the system's temporary folder"""
    device: str = "auto"
    """device of the state and the updates; auto: the GPU if there is one, else the CPU"""
    device_seconds: float = 0.0
    """seconds that an update on a CPU sleeps, as it would wait for a GPU; 0: the CPU computes the update"""
    repeats: int = 3
    """saves of each kind; the medians are shown"""
    epoch_minutes: float = 5.0
    """length of the epoch whose share is shown"""
    limit_percent: float | None = None
    """exit with an error if a save in the background costs more of an epoch; default: no limit"""

    def __post_init__(self) -> None:
        check(0 <= self.device_seconds < 1, "device_seconds", self.device_seconds, "must lie in [0, 1)")
        check(self.repeats >= 1, "repeats", self.repeats, "must be 1 or more")
        check(self.epoch_minutes > 0, "epoch_minutes", self.epoch_minutes, "must be above 0")


def measured_settings() -> list[str]:
    """Return the flags that say what is measured, without those that say how."""
    return [*(field.name for field in dataclasses.fields(PretrainConfig)), "depth"]


def check_report(path: str) -> None:
    """Raise UserError before the measurement if --json cannot be written."""
    folder = Path(path).absolute().parent
    writable = not path or (os.access(folder, os.W_OK) and not os.path.isdir(path))
    check(writable, "json", path, "cannot be written, name a file in an existing folder")


Config = TypeVar("Config", bound=BenchConfig)


def vary(config_type: type[Config], arguments: Sequence[str], axes: Sequence[str], program: str) -> dict[str, Config]:
    """Return the settings of each combination of `axes` by its name; without axes, one with an empty name.

    Args:
        arguments: the command line, which the flags of each combination override.
        axes: strings like `flag=value,value`.

    Raises:
        UserError: a value is wrong.
    """
    points = [[(axis.partition("=")[0], *point) for point in flag_values(axis, config_type, "vary")] for axis in axes]
    settings = {}
    for combination in itertools.product(*points):
        flags = [flag for _, _, flags in combination for flag in flags]
        title = " ".join(f"{name}={point[len(name) + 1 :]}" for name, point, _ in combination)
        settings[title] = parse_config(config_type, [*arguments, *flags], program)
    return settings


def titled(kind: str, title: str, known: Collection[str] | None = None) -> str:
    """Return the name of a variant: its kind, then the parts of the title from `vary` whose flag is in `known`.

    Args:
        known: flags that this kind reads; None means all.
    """
    parts = [part for part in title.split() if known is None or part.partition("=")[0] in known]
    return " ".join([kind, *parts])
