"""Settings of the benchmarks; those of what is measured are main_pretrain.py's own."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from models_lut import Steering
from util.config.command_line import flag_values, parse_config
from util.config.groups import check, check_choice
from util.config.pretrain import PretrainConfig
from util.runtime.distributed import world_size

Form = Literal["mae", "asymmetric", "symmetric"]
Kind = Literal["ours", "plain"]
SWEEPS = {  # short name -> flag, and its values where none are given
    "batch": ("batch_size", "8,16,32,64"),
    "img_size": ("input_size", "96,160,224,288,384"),
    "depth": ("depth", "3,6,12,24"),
}
PAPER_STEERING = {field.name: field.default for field in dataclasses.fields(Steering)}
PLAIN_METHOD = {"method": "mae", "parallel": "ddp"} | PAPER_STEERING  # what util/bench/baseline.py computes


@dataclass(frozen=True)
class BenchConfig(PretrainConfig):
    """What is measured, by the flags of main_pretrain.py, and how often."""

    model: str = "lut_vit_small_patch16"
    batch_size: int = 8
    """images per update and forward pass"""
    depth: int | None = None
    """blocks of the encoder; default: the model's own"""
    vary: tuple[str, ...] = ()
    """flags to compare values of, as compile=none,block amp=fp32,bf16; all combinations"""
    rounds: int = 7
    """times that each variant takes its turn"""
    json: str = ""
    """file for all that was measured, with command, versions and machine"""

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
        """That of the model, with --depth."""
        own = super().architecture
        return own | {"depth": self.depth or own["depth"]}

    def in_form(self, form: Form) -> BenchConfig:
        """These settings for MAE, or one of the two forms of LUT."""
        if form == "mae":
            return dataclasses.replace(self, alpha=0.0, **PAPER_STEERING)
        fix = f"alpha is 0 with --model {self.model}: give a lut_* model, or --alpha"
        check(self.has_momentum_encoder, "forms", form, fix)
        return dataclasses.replace(self, views=form)


@dataclass(frozen=True)
class StepConfig(BenchConfig):
    """The bare update, without a loader: images/s, the time of its parts, memory, arithmetic."""

    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0"""
    lr: float | None = 1e-4
    """learning rate; high enough for the updates to show in the losses that are compared"""
    forms: tuple[Form, ...] = ("mae", "asymmetric", "symmetric")
    """mae; asymmetric: LUT as in the paper; symmetric: LUT as released"""
    variants: tuple[Kind, ...] = ("ours", "plain")
    """ours, and the same in plain eager PyTorch (util/bench/baseline.py)"""
    steps: int = 5
    """updates in each turn"""
    warmup_steps: int = 3
    """updates before the first turn, after those whose losses are compared"""
    check_steps: int = 5
    """updates from the same weights and images over which the losses of variants must agree"""
    profile: str = ""
    """folder for a trace of each variant (chrome://tracing, ui.perfetto.dev); prints its dearest operators"""
    sweep: str = ""
    """cost as the work grows: batch, img_size, depth, or any flag with values as batch_size=8,16"""
    plot: str = ""
    """PNG of the sweep; default: beside --json, else bench-FLAG.png"""
    find_batch: bool = False
    """the largest batch of each variant that fits into the memory of the GPU, or into --memory_gib"""
    memory_gib: float | None = None
    """for --find_batch on a CPU: what a process may use"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("forms", "variants"):
            values = getattr(self, flag)
            check(len(values) > 0, flag, "", "give at least one")
            check(len(set(values)) == len(values), flag, values, "give each once")
        if "plain" in self.variants:
            for flag, value in PLAIN_METHOD.items():
                fix = "util/bench/baseline.py knows the paper's choice alone: add --variants ours"
                check(getattr(self, flag) == value, flag, getattr(self, flag), fix)
            check(self.w_mim > 0, "w_mim", self.w_mim, "util/bench/baseline.py reconstructs: add --variants ours")
        for flag in ("steps", "check_steps"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        limit = self.memory_gib
        check(limit is None or limit > 0, "memory_gib", limit, "must be above 0")
        check(limit is None or self.find_batch, "memory_gib", limit, "is for --find_batch, add it")
        if self.sweep:
            _ = self.sweep_axis
        both = bool(self.sweep) and (self.find_batch or bool(self.profile))
        check(not both, "sweep", self.sweep, "leave out --find_batch and --profile beside it")
        check(not self.plot or bool(self.sweep), "plot", self.plot, "is for --sweep, add it")

    @property
    def sweep_axis(self) -> str:
        """--sweep as flag=value,value, short names and default values filled in."""
        name, equals, values = self.sweep.partition("=")
        flag, default = SWEEPS.get(name, (name, ""))
        check_choice("sweep", name, [*SWEEPS, *(measured_settings() if equals else [])])
        return f"{flag}={values if equals else default}"


@dataclass(frozen=True)
class LoaderConfig(BenchConfig):
    """The loader alone: images/s and core."""

    batch_size: int = 64
    """images per batch"""
    num_workers: int | None = 0
    """loader processes, 0: none; images/s are divided by their number"""
    pipelines: tuple[Literal["ours", "pil"], ...] = ("ours", "pil")
    """ours, and that of released code: Pillow, each view decoded anew, normalised to fp32 in the loader"""
    images: int = 256
    """images in each turn"""
    scale_to: str = ""
    """WIDTHxHEIGHT: first re-encode the images at that size (JPEG, quality 90), in memory"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.pipelines) > 0, "pipelines", "", "give at least one")
        batch, images = self.batch_size, self.images
        check(batch <= images, "batch_size", batch, f"more than the --images {images} of a turn")
        check("pil" not in self.pipelines or self.in_chans != 4, "in_chans", 4, "the PIL pipeline knows 1 and 3")
        _ = self.scaled_size

    @property
    def scaled_size(self) -> tuple[int, int] | None:
        """--scale_to as width and height in pixels."""
        if not self.scale_to:
            return None
        sides = self.scale_to.lower().split("x")
        right = len(sides) == 2 and all(side.isdecimal() and int(side) >= 8 for side in sides)
        check(right, "scale_to", self.scale_to, "write WIDTHxHEIGHT, as 500x375")
        return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class EpochConfig(BenchConfig):
    """Whole runs of main_pretrain.py: images/s, and the shares of data wait, saving and evaluation."""

    epochs: int = 1
    """epochs of each run"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0"""
    rounds: int = 3
    """runs of each variant"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth is None, "depth", self.depth, "main_pretrain.py has no such flag, choose another --model")
        check(not self.resume, "resume", self.resume, "each run begins anew, leave it out")


@dataclass(frozen=True)
class LimitsConfig:
    """The machine alone: matrix products, memory, disk, JPEG decoding."""

    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    numbers: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ()
    """types of the matrices; default: all that the device knows"""
    sides: tuple[int, ...] = ()
    """sizes of the square matrices; default: 1024 and 2048, on a GPU 4096 to 16384"""
    seconds: float = 1.0
    """for each measurement"""
    array_mib: int = 256
    """size of the arrays that are copied: more than caches hold"""
    folder: str = "."
    """where a file is written to"""
    file_mib: int = 256
    """its size"""
    data_path: str = ""
    """images to decode; default: two photographs that come with scikit-learn, at 500x375"""
    json: str = ""
    """file for all that was measured, with command, versions and machine"""

    def __post_init__(self) -> None:
        check(all(side >= 1 for side in self.sides), "sides", self.sides, "must be 1 or more")
        check(self.seconds > 0, "seconds", self.seconds, "must be above 0")
        for flag in ("array_mib", "file_mib"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check_report(self.json)


def measured_settings() -> list[str]:
    """The flags that say what is measured, and not how."""
    return [*(field.name for field in dataclasses.fields(PretrainConfig)), "depth"]


def check_report(path: str) -> None:
    """UserError unless --json could be written: found before the measurement, not after it."""
    folder = Path(path).absolute().parent
    writable = not path or (os.access(folder, os.W_OK) and not os.path.isdir(path))
    check(writable, "json", path, "cannot be written, name a file in a folder that is there")


Config = TypeVar("Config", bound=BenchConfig)


def vary(config_type: type[Config], arguments: Sequence[str], axes: Sequence[str], program: str) -> dict[str, Config]:
    """Name -> settings of each combination of `axes`, each `flag=value,value`; one nameless where there are none.

    Args:
        arguments: the command line, on top of which the flags of each combination come.

    Raises:
        UserError: a value is wrong.
    """
    points = [[(axis.partition("=")[0], *point) for point in flag_values(axis, config_type, "vary")] for axis in axes]
    found = {}
    for combination in itertools.product(*points):
        flags = [flag for _, _, flags in combination for flag in flags]
        title = " ".join(f"{name}={said[len(name) + 1 :]}" for name, said, _ in combination)
        found[title] = parse_config(config_type, [*arguments, *flags], program)
    return found


def titled(kind: str, title: str, known: Collection[str] | None = None) -> str:
    """Name of a variant: its kind, and of a title that `vary` gave the flags that are `known` to it (None: all)."""
    said = [word for word in title.split() if known is None or word.partition("=")[0] in known]
    return " ".join([kind, *said])
