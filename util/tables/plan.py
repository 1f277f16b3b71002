"""From the rows of a table to runs: which recipe and flags at which scale, what they cost, and what is done already."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models_vit import Classifier, LinearProbe
from util.config.command_line import MAINS, as_flags, parse_config, recipe_chain
from util.config.groups import as_dict, check_choice
from util.config.pretrain import PretrainConfig
from util.config.same_run import MAY_CHANGE
from util.results.results import read_results
from util.runtime.errors import UserError
from util.runtime.logs import LOG_FILE
from util.tables.tables import (
    ALL_STAGES,
    FOLDER,
    PRETRAIN,
    PROBE,
    STAGES,
    Column,
    Row,
    Table,
    expect,
    mapping,
    read_yaml,
)
from util.train.cost import classifier_flops, features_flops, pretrain_cost
from util.train.resume import share_batch
from util.weights.checkpoint import complete_checkpoints

Settings = Mapping[str, Any]  # a recipe's name under `recipe`, and fields on top of it


# --------------------------------------------------------------------------------------------------------
# Scales
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Data set, models and machine that a table is run with; tables/scales.yaml describes the fields."""

    name: str
    about: str
    data: str
    images: int
    processes: int
    tflops: float
    bases: Mapping[str, Mapping[str, Settings]]


def read_scale(name: str, path: Path = FOLDER / "scales.yaml") -> Scale:
    """One of tables/scales.yaml.

    Raises:
        UserError: there is none of that name, or the file holds a mistake.
    """
    scales = read_yaml(path)
    check_choice("scale", name, list(scales))
    where = f"{path.name}, scale {name}"
    known = [field.name for field in dataclasses.fields(Scale)][1:]
    plain = mapping(where, scales[name], known, required=known)
    for key in ("images", "processes", "tflops"):
        expect(isinstance(plain[key], int | float) and plain[key] > 0, where, f"{key} {plain[key]} must be above 0")
    for base, stages in mapping(f"{where}, bases", plain["bases"], known=None).items():
        here = f"{where}, base {base}"
        for stage, settings in mapping(here, stages, (PRETRAIN, "finetune", "linprobe")).items():
            mapping(f"{here}, {stage}", settings, known=None, required=["recipe"])
    return Scale(name, **plain)


@dataclass(frozen=True)
class Work:
    """A pre-training at some scale and what is done with it, seeds aside."""

    name: str  # of its folder: the same work in two tables is done once
    stages: Mapping[str, Settings]  # by the names in STAGES
    epochs_times: float


def work_behind(row: Row, column: Column, scale: Scale) -> Work | None:
    """What gives our number in this cell; None: nothing does at this scale."""
    if not column.stage or column.key not in row.recipes:
        return None
    recipe, changes = row.recipes[column.key], {}
    for base, own in recipe_chain(recipe):
        if base in scale.bases:
            break
        changes = own | changes
    else:
        return None
    settings = dict(scale.bases[base])
    name = recipe
    if PRETRAIN in settings:
        if not changes:  # bases that mean the same share their runs
            name = next(other for other in scale.bases if scale.bases[other] == scale.bases[base])
        settings[PRETRAIN] = {**settings[PRETRAIN], **changes, **row.flags}
    else:
        settings[PRETRAIN] = {"recipe": recipe, **row.flags}
    parts = [name, *(f"{key}_{value}" for key, value in row.flags.items())]
    if row.epochs_times != 1:
        parts.append(f"epochs_x{row.epochs_times:g}")
    stages = {
        stage: {**settings.get(kind.main, {}), **kind.flags}
        for stage, kind in STAGES.items()
        if kind.main in (*settings, PROBE)  # which has no recipe
    }
    if column.stage not in stages:
        return None
    return Work(re.sub(r"[^\w.-]+", "_", "-".join(parts)), stages, row.epochs_times)


# --------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What is the same for all runs of a plan."""

    scale: Scale
    folder: Path  # of all scales
    seeds: int | None = None  # runs per row; None: as many as the table says
    data: tuple[str, ...] = ()  # flags that name the data set
    processes: int | None = None  # of each run; None: those that the recipes are meant for
    extra: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # flags by main


@dataclass(frozen=True)
class Run:
    """A stage of a row with one seed: a call of a main, in a folder of its own."""

    title: str
    stage: str  # of STAGES
    seed: int
    folder: Path
    flags: tuple[str, ...]
    config: Any  # what the main will make of the flags
    processes: int
    after: Run | None = None  # the pre-training whose checkpoint it starts from
    images: int | None = None  # per epoch; None: as many as the plan's data set has

    @property
    def main(self) -> str:
        """See Stage."""
        return STAGES[self.stage].main

    @property
    def command(self) -> list[str]:
        """As one would type it beside the main."""
        launcher = ["python"] if self.processes == 1 else ["torchrun", f"--nproc_per_node={self.processes}"]
        return [*launcher, STAGES[self.stage].program, *self.flags]

    @property
    def checkpoint(self) -> Path:
        """What a finished pre-training leaves."""
        return self.folder / f"checkpoint-{self.config.epochs - 1}.pth"


def folder_of(options: Options, work: Work, seed: int, stage: str) -> Path:
    """Where a run lies."""
    return options.folder / options.scale.name / work.name / f"seed_{seed}" / stage


def plan_runs(tables: Sequence[Table], options: Options) -> list[Run]:
    """The runs behind all cells of the tables that something gives, each once, a seed of all rows after the other.

    Raises:
        UserError: a recipe or flag is wrong; the message names the row.
    """
    runs: dict[Path, Run] = {}
    for seed in range(max(seeds_of(table, options) for table in tables)):
        for table in tables:
            for row in table.rows if seed < seeds_of(table, options) else ():
                try:
                    add_row(runs, table, row, seed, options)
                except UserError as error:
                    raise UserError(f"table {table.name}, {row.name}: {error}") from error
    return list(runs.values())


def seeds_of(table: Table, options: Options) -> int:
    """Runs per row."""
    return options.seeds or table.seeds


def add_row(runs: dict[Path, Run], table: Table, row: Row, seed: int, options: Options) -> None:
    """The runs behind the cells of a row."""
    for column in table.columns:
        work = work_behind(row, column, options.scale)
        if work is not None:
            add_run(runs, work, column.stage, seed, options)


def add_run(runs: dict[Path, Run], work: Work, stage: str, seed: int, options: Options) -> Run:
    """The run of this stage and seed, made and added after its pre-training unless it is there already."""
    folder = folder_of(options, work, seed, stage)
    if folder in runs:
        return runs[folder]
    after = None if stage == PRETRAIN else add_run(runs, work, PRETRAIN, seed, options)
    shared, config = shared_flags(work, stage, options)
    title, processes = f"{work.name}, seed {seed}, {stage}", processes_of(options)
    if STAGES[stage].main == PROBE:
        config = dataclasses.replace(config, checkpoint=str(after.checkpoint), output_dir=str(folder))
        flags, processes = (config.checkpoint, *shared, *as_flags({"output_dir": folder})), 1
    else:
        own = {"finetune": str(after.checkpoint)} if after else {}
        own |= {"seed": seed, "output_dir": str(folder)}
        config = dataclasses.replace(config, **own)
        flags = (*shared, *as_flags(own), "--auto_resume")
    runs[folder] = Run(title, stage, seed, folder, flags, config, processes, after)
    return runs[folder]


def processes_of(options: Options) -> int:
    """Of each run."""
    return options.processes or options.scale.processes


def shared_flags(work: Work, stage: str, options: Options) -> tuple[tuple[str, ...], Any]:
    """Flags of a stage but for seed, folder and checkpoint, and the settings that they stand for."""
    kind = STAGES[stage]
    given = list(options.extra.get(kind.main, ()))
    flags = [*as_flags(work.stages[stage]), *options.data, *given]
    config = parse(kind.main, tuple(flags))
    if kind.main == PROBE:
        return tuple(flags), config
    changes = cut_batch(config, given, options.scale.processes, processes_of(options))
    if stage == PRETRAIN and work.epochs_times != 1:
        changes["epochs"] = round(work.epochs_times * config.epochs)
    flags = (*flags, *as_flags(changes))
    return flags, parse(kind.main, flags)


def cut_batch(config: Any, given: Sequence[str], meant: int, processes: int) -> dict[str, Any]:
    """What keeps the images of an update where a run has other processes than its recipe is `meant` for.

    Nothing where the flags `given` by hand cut the batch themselves.
    """
    if processes == meant or any(flag.startswith(("--batch_size", "--accum_iter")) for flag in given):
        return {}
    images = config.batch_size * config.accum_iter * meant
    batch_size, accum_iter = share_batch(images, processes, config.batch_size, f"--processes {processes}")
    return {"batch_size": batch_size, "accum_iter": accum_iter}


@functools.cache
def parse(main: str, flags: tuple[str, ...]) -> Any:
    """As the main will read them; a checkpoint that has no flag is `add_run`'s to fill in."""
    given = ("CHECKPOINT", *flags) if main == PROBE else flags
    return parse_config(MAINS[main].settings, given, MAINS[main].program)


# --------------------------------------------------------------------------------------------------------
# What is done
# --------------------------------------------------------------------------------------------------------

# of which the numbers do not depend: where things lie, how the batch is cut, what is looked at on the way
ANYWHERE = (MAY_CHANGE - {"blr", "lr", "input_size", "mean", "std"}) | {
    *("monitor_freq", "monitor_images", "eval_freq", "dist_eval", "per_class", "finetune", "seed"),
    *("check_data", "pictures", "checkpoint"),
}


@dataclass(frozen=True)
class Outcome:
    """The line of a finished run in its `results.jsonl`."""

    metrics: Mapping[str, float]
    config: Mapping[str, Any]


def outcome_in(folder: Path, stage: str) -> Outcome | None:
    """Of the run of one of ALL_STAGES in this folder; None: it has not finished."""
    lines = [line for line in read_results(folder) if line.get("stage") == ALL_STAGES[stage].main]
    return Outcome(lines[-1]["metrics"], lines[-1]["config"]) if lines else None


def deviations(config: Any, outcome: Outcome) -> list[str]:
    """The settings in which a finished run is another than the planned one, each as `epochs 2 (planned: 20)`."""
    planned = as_dict(config)
    return [
        f"{name} {found} (planned: {planned[name]})"
        for name, found in outcome.config.items()
        if name in planned and name not in ANYWHERE and planned[name] != found
    ]


def check_outcomes(runs: Sequence[Run]) -> None:
    """UserError where a run with other settings has finished in the folder of one of these."""
    for run in runs:
        outcome = outcome_in(run.folder, run.stage)
        others = deviations(run.config, outcome) if outcome is not None else []
        if others:
            raise UserError(f"--output_dir {run.folder}: has finished with {', '.join(others)}, choose another folder")


def share_done(run: Run) -> float:
    """Of the epochs of a run, by its newest checkpoint or its result."""
    if outcome_in(run.folder, run.stage) is not None:
        return 1.0
    found = complete_checkpoints(run.folder)
    if not found:
        return 0.0
    path, manifest = found[-1]
    return min(1.0, (manifest.epoch + ("-step" not in path.name)) / run.config.epochs)


# --------------------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------------------


def flops(run: Run, images: int) -> float:
    """Matrix products of a whole run, forward and backward; no evaluation.

    Args:
        images: per epoch, unless the run has a number of its own.
    """
    config = run.config
    if run.main == PROBE:
        return flops_per_image(run) * (run.images or images)
    seen = (run.images or images) * config.epochs
    if config.max_steps is not None:
        seen = min(seen, config.max_steps * config.batch_size * config.accum_iter * run.processes)
    return flops_per_image(run) * seen


def flops_per_image(run: Run) -> int:
    """As the mains' --dry_run counts them; of a probe the passes of all patches through each encoder."""
    if run.main == PROBE:
        return len(run.config.encoders) * _encoder_flops(flops_config(run.after))
    return _flops_per_image(run.main, flops_config(run))


def flops_config(run: Run) -> Any:
    """The settings without those that leave the count as it is, so that it is made once for all such runs."""
    alike = {"seed": 0, "output_dir": "", "finetune": "", "blr": 0.0, "weight_decay": 0.0, "holdout": 0.0}
    known = {name: value for name, value in alike.items() if hasattr(run.config, name)}
    return dataclasses.replace(run.config, **known)


@functools.cache
def _flops_per_image(main: str, config: Any) -> int:
    if main == PRETRAIN:
        return pretrain_cost(config.model_arguments, config.views == "symmetric", config.student_type).flops_per_image
    with torch.device("meta"):
        classifier = Classifier if main == "finetune" else LinearProbe
        model = classifier(**config.model_arguments(1000))  # classes: no matter
    return classifier_flops(model, (config.in_chans, *config.resolved_input_size))


@functools.cache
def _encoder_flops(config: PretrainConfig) -> int:
    with torch.device("meta"):
        student = config.student_type(**config.model_arguments)
    return features_flops(student, (config.in_chans, *config.resolved_input_size))


class Clock:
    """Estimates how long runs take: by what runs of the same stage have reached, else by an assumed speed.

    Args:
        flops_per_second: assumed, of all processes of a run together.
    """

    def __init__(self, flops_per_second: float, images: int):
        self.assumed, self.images = flops_per_second, images
        self.seen: dict[str, list[float]] = {}  # main -> FLOP/s

    def look_at(self, run: Run) -> None:
        """Learn from the log of a run, finished or not."""
        if speed := images_per_second(run.folder):
            self.seen.setdefault(run.main, []).append(speed * flops_per_image(run))

    def learn(self, run: Run, share: float, seconds: float) -> None:
        """Learn from what a share of a run has taken just now, all included."""
        if share > 0:
            self.seen.setdefault(run.main, []).append(share * flops(run, self.images) / seconds)

    def seconds(self, run: Run, share: float = 1.0) -> float:
        """What a share of a run will take."""
        speed = statistics.median(self.seen[run.main]) if run.main in self.seen else self.assumed
        return share * flops(run, self.images) / speed


def images_per_second(folder: Path) -> float | None:
    """The median over the lines of a run's log; None: it has none."""
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        try:
            found.append(float(json.loads(line)["images_per_second"]))
        except (ValueError, KeyError, TypeError):  # an evaluation's, or one that is being written
            continue
    found = [speed for speed in found if math.isfinite(speed) and speed > 0]
    return statistics.median(found) if found else None
