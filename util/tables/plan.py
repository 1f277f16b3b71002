"""Turn the rows of a table into runs: the recipe and flags of each stage at a scale."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.config.checks import check_choice
from util.config.command_line import MAINS, as_flags, parse_config, recipe_chain
from util.runtime.errors import UserError
from util.tables.schema import Key, check_mapping, read_yaml
from util.tables.tables import FOLDER, PRETRAIN, PROBE, STAGES, Column, Row, Table
from util.train.resume import share_batch

Settings = Mapping[str, Any]  # a recipe's name under `recipe`, and fields on top of it


# --------------------------------------------------------------------------------------------------------
# Scales
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Data set, models and machine for the runs of a table; tables/scales.yaml describes the fields."""

    name: str
    description: str
    data: str
    images: int
    processes: int
    tflops: float
    bases: Mapping[str, Mapping[str, Settings]]


_POSITIVE = Key((int, float), "must be above 0", accepts=lambda number: number > 0)
SCALE_KEYS = {
    **dict.fromkeys(("description", "data"), Key(str, "must be text")),
    **dict.fromkeys(("images", "processes", "tflops"), _POSITIVE),
    "bases": Key(dict, "must be a mapping"),
}
BASE_KEYS = dict.fromkeys((PRETRAIN, "finetune", "linprobe"), Key(dict, "must be a mapping", default=None))


def read_scale(name: str, path: Path = FOLDER / "scales.yaml") -> Scale:
    """Return a scale of tables/scales.yaml; UserError if there is none of that name or the file holds a mistake."""
    scales = read_yaml(path)
    check_choice("scale", name, list(scales))
    where = f"{path.name}, scale {name}"
    values = check_mapping(where, scales[name], SCALE_KEYS)
    for base, stages in values["bases"].items():
        check_mapping(f"{where}, base {base}", stages, BASE_KEYS)
        for stage, settings in stages.items():
            if "recipe" not in settings:
                raise UserError(f"{where}, base {base}, {stage}: recipe is missing")
    return Scale(name, **values)


@dataclass(frozen=True)
class Work:
    """A pre-training at some scale and the stages that start from it, for any seed."""

    name: str  # of its folder: two tables that need the same work share it
    stages: Mapping[str, Settings]  # by the names in STAGES
    epochs_times: float


def work_behind(row: Row, column: Column, scale: Scale) -> Work | None:
    """Return the work that gives our number in this cell; None if nothing gives one at this scale."""
    if not column.stage or column.key not in row.recipes:
        return None
    recipe = row.recipes[column.key]
    base, changes = changes_to_base(recipe, scale)
    if base is None:
        return None
    settings = dict(scale.bases[base])
    name = recipe
    if PRETRAIN in settings:
        if not changes:  # equal bases share their runs, under the name of the first
            name = next(other for other in scale.bases if scale.bases[other] == scale.bases[base])
        settings[PRETRAIN] = {**settings[PRETRAIN], **changes, **row.flags}
    else:
        settings[PRETRAIN] = {"recipe": recipe, **row.flags}
    stages = {
        stage: {**settings.get(kind.main, {}), **kind.flags}
        for stage, kind in STAGES.items()
        if kind.main in (*settings, PROBE)  # a probe has no recipe
    }
    if column.stage not in stages:
        return None
    parts = [name, *(f"{key}_{value}" for key, value in row.flags.items())]
    if row.epochs_times != 1:
        parts.append(f"epochs_x{row.epochs_times:g}")
    return Work(re.sub(r"[^\w.-]+", "_", "-".join(parts)), stages, row.epochs_times)


def changes_to_base(recipe: str, scale: Scale) -> tuple[str | None, dict[str, Any]]:
    """Return the base of the scale that a recipe extends, and the settings that it changes on the way from there."""
    changes: dict[str, Any] = {}
    for base, own in recipe_chain(recipe):
        if base in scale.bases:
            return base, changes
        changes = own | changes
    return None, changes


# --------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The settings that all runs of a plan share."""

    scale: Scale
    folder: Path  # of all scales
    seeds: int | None = None  # runs per row; None: the table's number
    data: tuple[str, ...] = ()  # flags that name the data set
    processes: int | None = None  # of each run; None: the scale's
    extra: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # flags by main


@dataclass(frozen=True)
class Run:
    """A stage of a row with one seed: a call of a main, in a folder of its own."""

    title: str
    stage: str  # of STAGES
    seed: int
    folder: Path
    flags: tuple[str, ...]
    config: Any  # the settings that the main will read from the flags
    processes: int
    after: Run | None = None  # the pre-training whose checkpoint it starts from
    images: int | None = None  # per epoch; None: as many as the plan's data set has

    @property
    def main(self) -> str:
        """Return the name of the main in MAINS."""
        return STAGES[self.stage].main

    @property
    def command(self) -> list[str]:
        """Return the command as one would type it beside the main."""
        launcher = ["python"] if self.processes == 1 else ["torchrun", f"--nproc_per_node={self.processes}"]
        return [*launcher, STAGES[self.stage].program, *self.flags]

    @property
    def checkpoint(self) -> Path:
        """Return the checkpoint that a finished pre-training leaves."""
        return self.folder / f"checkpoint-{self.config.epochs - 1}.pth"


def plan_runs(tables: Sequence[Table], options: Options) -> list[Run]:
    """Return the runs behind all cells of the tables, each once; all rows of a seed come before the next seed.

    Raises:
        UserError: a recipe or flag is wrong; the message names the row.
    """
    runs: dict[Path, Run] = {}
    seeds = {table.name: options.seeds or table.seeds for table in tables}
    for seed in range(max(seeds.values())):
        for table in tables:
            for row in table.rows if seed < seeds[table.name] else ():
                try:
                    add_row(runs, table.columns, row, seed, options)
                except UserError as error:
                    raise UserError(f"table {table.name}, {row.name}: {error}") from error
    return list(runs.values())


def add_row(runs: dict[Path, Run], columns: Sequence[Column], row: Row, seed: int, options: Options) -> None:
    """Add the runs behind the cells of a row."""
    for column in columns:
        work = work_behind(row, column, options.scale)
        if work is not None:
            add_run(runs, work, column.stage, seed, options)


def add_run(runs: dict[Path, Run], work: Work, stage: str, seed: int, options: Options) -> Run:
    """Return the run of this stage and seed; unless it is planned already, add it behind its pre-training."""
    folder = options.folder / options.scale.name / work.name / f"seed_{seed}" / stage
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
    """Return the number of processes of each run."""
    return options.processes or options.scale.processes


def shared_flags(work: Work, stage: str, options: Options) -> tuple[tuple[str, ...], Any]:
    """Return the flags of a stage without seed, folder and checkpoint, and the settings that they stand for."""
    kind = STAGES[stage]
    extra = list(options.extra.get(kind.main, ()))
    flags = [*as_flags(work.stages[stage]), *options.data, *extra]
    config = parse_flags(kind.main, tuple(flags))
    if kind.main == PROBE:
        return tuple(flags), config
    changes = batch_changes(config, extra, options.scale.processes, processes_of(options))
    if stage == PRETRAIN and work.epochs_times != 1:
        changes["epochs"] = round(work.epochs_times * config.epochs)
    flags = (*flags, *as_flags(changes))
    return flags, parse_flags(kind.main, flags)


def batch_changes(config: Any, extra: Sequence[str], planned: int, processes: int) -> dict[str, Any]:
    """Return the batch_size and accum_iter that keep the images of an update with another number of processes.

    Args:
        extra: flags given by hand; nothing changes if they set the batch themselves.
        planned: number of processes that the recipe's batch is meant for.
    """
    if processes == planned or any(flag.startswith(("--batch_size", "--accum_iter")) for flag in extra):
        return {}
    images = config.batch_size * config.accum_iter * planned
    batch_size, accum_iter = share_batch(images, processes, config.batch_size, f"--processes {processes}")
    return {"batch_size": batch_size, "accum_iter": accum_iter}


@functools.cache
def parse_flags(main: str, flags: tuple[str, ...]) -> Any:
    """Return the settings that a main will read from the flags; a probe's checkpoint is filled in by `add_run`."""
    given = ("CHECKPOINT", *flags) if main == PROBE else flags
    return parse_config(MAINS[main].settings, given, MAINS[main].program)
