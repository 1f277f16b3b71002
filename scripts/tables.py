"""The paper's tables beside our own runs: what a table takes, the runs one after the other, and the table itself.

    python scripts/tables.py plan 4c --scale tiny                       # the commands, their cost, what is done already
    python scripts/tables.py run  4c --scale tiny                       # digits on two CPU cores, minutes
    python scripts/tables.py show 4c --scale tiny --format markdown
    python scripts/tables.py run  4  --scale small --data_path CIFAR10 --seeds 3 --keep_going
    python scripts/tables.py run  4c --data_path IMAGENET --submit -- --partition gpu --account lab
    python scripts/tables.py keep study --scale cpu --into docs/results # what it is printed from, small files

Tables: 1, 2, 3, 4a to 4f (4: all of them), 5, A, B, C as in the paper; study, brief, parts and tuning are our own.
--help after a command lists its flags. `run` skips what has finished and goes on with what was interrupted: run the
same command again.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from scripts import submit
from util.config.command_line import parse_command, split_like_shell
from util.config.groups import check
from util.data.datasets import open_images
from util.results.results import RESULTS_FILE
from util.runtime.errors import UserError, run_main
from util.runtime.logs import LOG_FILE
from util.tables.curves import draw_curves
from util.tables.formats import commented
from util.tables.plan import Clock, Options, Run, check_outcomes, plan_runs, read_scale, share_done, work_behind
from util.tables.runner import print_plan, run_all
from util.tables.tables import PRETRAIN, PROBE, STAGES, TOOLS, Table, find_tables
from util.tables.view import draw, fill, render


@dataclass(frozen=True)
class TableFlags:
    """Which table, and where its runs are."""

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    """1, 2, 3, 4a to 4f, 4, 5, A, B, C, study, brief, parts or tuning"""
    scale: str = "paper"
    """paper, small, cpu or tiny: tables/scales.yaml says what they are"""
    output_dir: str = "output/tables"
    """folder of the runs of all tables and scales; another data set needs another one"""

    @property
    def options(self) -> Options:
        """For planning."""
        return Options(read_scale(self.scale), Path(self.output_dir))


@dataclass(frozen=True)
class ShowFlags(TableFlags):
    """Print a table: the paper's numbers, ours, their difference, and the seeds."""

    format: Literal["text", "markdown", "latex"] = "text"
    """what to print"""
    against: Literal["paper", "baseline"] | None = None
    """differences to the paper's numbers, or of the paper and of ours to their first rows; default: paper at its own
    scale, else baseline"""
    picture: str = ""
    """also draw it into this PNG"""
    curves: str = ""
    """also draw losses and kNN of its pre-trainings over epochs and cost into this PNG"""


@dataclass(frozen=True)
class PlanFlags(TableFlags):
    """Print the runs of a table: commands, cost, and what is done already."""

    seeds: int | None = None
    """runs per row, with seeds 0, 1, ...; default: 1, for `study` and `brief` 3"""
    data_path: str = ""
    """images with labels, as for main_pretrain.py; --scale tiny needs none"""
    dataset: str = ""
    """a reader's name, as for main_pretrain.py"""
    processes: int | None = None
    """of each run, one per GPU; the images per update stay the same. Default: 8 at --scale paper, else 1"""
    pretrain_flags: str = ""
    """more flags for every pre-training, in one string: --pretrain_flags="--num_workers 4" """
    finetune_flags: str = ""
    """more flags for every fine-tuning"""
    linprobe_flags: str = ""
    """more flags for every linear probing"""
    probe_flags: str = ""
    """more flags for every probing of frozen features"""
    tflops: float | None = None
    """10^12 FLOP/s of all processes of a run, for the time it takes; default: the speed of runs that have a log, else
    the scale's assumption"""

    def __post_init__(self) -> None:
        for flag in ("seeds", "processes"):
            value = getattr(self, flag)
            check(value is None or value >= 1, flag, value, "must be 1 or more")
        check(self.tflops is None or self.tflops > 0, "tflops", self.tflops, "must be above 0")

    @property
    def options(self) -> Options:
        """With data and flags."""
        options = super().options
        for flag, given in (("data_path", self.data_path), ("dataset", self.dataset)):
            fix = f"--scale {self.scale} has data of its own, leave it out or take --scale small"
            check(not given or bool(options.scale.data), flag, given, fix)
        named = {"data_path": self.data_path or ("" if self.dataset else options.scale.data), "dataset": self.dataset}
        data = [part for flag, value in named.items() if value for part in (f"--{flag}", value)]
        mains = {stage.main for stage in STAGES.values()}
        extra = {main: split_like_shell(f"{main}_flags", getattr(self, f"{main}_flags")) for main in mains}
        return dataclasses.replace(options, seeds=self.seeds, data=tuple(data), processes=self.processes, extra=extra)


@dataclass(frozen=True)
class RunFlags(PlanFlags):
    """Do the runs of a table, one after the other, or submit them."""

    keep_going: bool = False
    """after a failed run go on with those that do not depend on it"""
    submit: bool = False
    """submit them to SLURM, each stage as a job array; after `--` come flags of scripts/submit.py"""
    dry_run: bool = False
    """do nothing: print the plan, with --submit the batch scripts and commands"""


@dataclass(frozen=True)
class KeepFlags(TableFlags):
    """Copy the results of a table's runs, and the logs of its pre-trainings, into a folder that can be kept."""

    into: str = "docs/results"
    """folder; --output_dir of `show` prints the same table from it"""


COMMANDS = {"plan": PlanFlags, "run": RunFlags, "show": ShowFlags, "keep": KeepFlags}


def main() -> None:
    """The command's flags, then the command."""
    flags, launcher_flags = parse_command(COMMANDS, sys.argv[1:], Path(__file__).name, __doc__, ", then the table")
    tables = find_tables(flags.table)
    if isinstance(flags, ShowFlags):
        show(tables, flags)
    elif isinstance(flags, KeepFlags):
        keep(tables, flags)
    elif isinstance(flags, RunFlags) and flags.submit:
        submit_all(tables, flags, launcher_flags)
    elif isinstance(flags, RunFlags) and not flags.dry_run:
        run(tables, flags)
    else:
        plan(tables, flags)


# --------------------------------------------------------------------------------------------------------
# plan
# --------------------------------------------------------------------------------------------------------


def plan(tables: Sequence[Table], flags: PlanFlags) -> None:
    """What is run, what is not, and the commands."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    options = flags.options
    runs = plan_runs(tables, options)
    clock = clock_for(runs, flags)
    for table in tables:
        print(f"# {table.heading}")
    print(f"# scale {options.scale.name}: {options.scale.about}")
    for line in left_out(tables, options):
        print(f"# {line}")
    print_plan(runs, clock)


def left_out(tables: Sequence[Table], options: Options) -> list[str]:
    """What of the tables is not run, and why, in words."""
    lines = []
    for table in tables:
        needed: dict[str, list[str]] = {}
        for column in table.columns:
            if column.needs:
                needed.setdefault(column.needs, []).append(column.title)
        for tool, titles in needed.items():
            lines.append(f"table {table.name}: ours by {TOOLS[tool]}: {', '.join(titles)}")
        others = [row.labels[0] for row in table.rows if not row.recipes]
        if others:
            lines.append(f"table {table.name}: shown from the paper, not run: {', '.join(others)}")
        absent = {
            f"{row.labels[0]} {column.title}": None
            for row in table.rows
            for column in table.columns
            if column.stage and column.key in row.recipes and work_behind(row, column, options.scale) is None
        }
        if absent:
            lines.append(f"table {table.name}: no counterpart at --scale {options.scale.name}: {', '.join(absent)}")
    return lines


def count_images(flags: PlanFlags, options: Options) -> int:
    """In an epoch: counted where that is quick, else the scale's.

    Raises:
        UserError: there is nothing at --data_path.
    """
    scale = options.scale
    if not (flags.data_path or flags.dataset) or scale.name == "paper":
        return scale.images
    return len(open_images(flags.data_path, flags.dataset, "train"))


def clock_for(runs: Sequence[Run], flags: PlanFlags) -> Clock:
    """By what is known of the speed."""
    options = flags.options
    clock = Clock(1e12 * (flags.tflops or options.scale.tflops), count_images(flags, options))
    for run in runs if flags.tflops is None else ():
        clock.look_at(run)
    return clock


# --------------------------------------------------------------------------------------------------------
# run
# --------------------------------------------------------------------------------------------------------


def run(tables: Sequence[Table], flags: RunFlags) -> None:
    """What is not done yet, then the table."""
    options = flags.options
    runs = plan_runs(tables, options)
    check_input(runs, flags, options)
    for line in left_out(tables, options):
        print(line)
    run_all(runs, clock_for(runs, flags), flags.keep_going)
    print()
    show(tables, ShowFlags(flags.table, flags.scale, flags.output_dir))


def check_input(runs: Sequence[Run], flags: PlanFlags, options: Options) -> None:
    """What is wrong before anything is started.

    Raises:
        UserError: no data, or a run of another kind has finished where one of these would.
    """
    scale = options.scale
    if scale.data and runs and not (flags.data_path or flags.dataset):
        raise UserError(f"--data_path: is missing, --scale {scale.name} needs {scale.data} ({scale.about})")
    if flags.data_path and not Path(flags.data_path).exists():
        raise UserError(f"--data_path {flags.data_path}: there is no such file or folder")
    check_outcomes(runs)


# --------------------------------------------------------------------------------------------------------
# run --submit
# --------------------------------------------------------------------------------------------------------


def submit_all(tables: Sequence[Table], flags: RunFlags, launcher_flags: Sequence[str]) -> None:
    """An array for each stage of what is not done; each task waits for the pre-training that it starts from."""
    config = submit.config_of_arrays(PRETRAIN, launcher_flags, flags.processes)
    size = config.nodes * config.processes_per_node
    options = dataclasses.replace(flags.options, folder=Path(flags.output_dir).absolute(), processes=size)
    runs = plan_runs(tables, options)
    check_input(runs, flags, options)
    if not flags.dry_run:
        submit.check_sbatch()
    todo = [run for run in runs if share_done(run) < 1]
    job_dir = Path(config.job_dir).absolute() if config.job_dir else options.folder / options.scale.name / "jobs"
    pretrainings, number = [run for run in todo if run.stage == PRETRAIN], "JOB"
    for stage in STAGES:
        arrays = ([], [])  # what can start at once, and what waits for a pre-training above
        for run in todo:
            if run.stage == stage:
                arrays[run.after in pretrainings].append(run)
        for waits, array in enumerate(arrays):
            if array:
                after = dependency(array, pretrainings, number) if waits else ""
                submitted = submit_stage(config, stage, array, job_dir, after, flags.dry_run)
                number = submitted if stage == PRETRAIN else number
    if not todo:
        print(f"{len(runs)} runs, all done")


def dependency(array: Sequence[Run], pretrainings: Sequence[Run], number: str) -> str:
    """In sbatch's words: each task after the one with its number, or all after all where the arrays differ."""
    paired = len(array) > 1 and [run.after for run in array] == list(pretrainings)
    return f"{'aftercorr' if paired else 'afterok'}:{number}"


def submit_stage(
    config: submit.SubmitConfig, stage: str, array: Sequence[Run], job_dir: Path, after: str, dry_run: bool
) -> str:
    """Submit or print the runs of one stage; the number of the job."""
    main = STAGES[stage].main
    one = dict(nodes=1, ngpus=min(1, config.ngpus), tasks_per_node=None) if main == PROBE else {}
    config = dataclasses.replace(config, stage=main, job_name=config.job_name or f"lut-{stage}", **one)
    return submit.submit_array(config, [submit.Run(run.title, run.flags) for run in array], job_dir, after, dry_run)


# --------------------------------------------------------------------------------------------------------
# show
# --------------------------------------------------------------------------------------------------------


def show(tables: Sequence[Table], flags: ShowFlags) -> None:
    """Print the tables, and beside each what a reader must know."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    options = flags.options
    against = flags.against or ("paper" if options.scale.name == "paper" else "baseline")
    if flags.output_dir != TableFlags.output_dir and not Path(flags.output_dir).is_dir():
        raise UserError(f"--output_dir {flags.output_dir}: there is no such folder of runs")
    for flag, path in (("picture", flags.picture), ("curves", flags.curves)):
        if path and len(tables) > 1:
            raise UserError(f"--{flag} {path}: draws one table, {flags.table} is {len(tables)}")
    for i, table in enumerate(tables):
        filled = fill(table, options)
        print(("\n" if i else "") + commented(table.heading, flags.format) + "\n")
        print(render(filled, against, flags.format) + "\n")
        for line in [*explained(table, options, against), *filled.remarks, *table.notes]:
            print(commented(line, flags.format))
        if flags.picture:
            draw(filled, against, Path(flags.picture))
            print(commented(f"picture: {flags.picture}", flags.format))
        if flags.curves:
            draw_curves(table, options, Path(flags.curves))
            print(commented(f"curves: {flags.curves}", flags.format))


def explained(table: Table, options: Options, against: str) -> list[str]:
    """What the columns mean."""
    lines = []
    if any(column.stage for column in table.columns):
        lines.append(
            f"ours: --scale {options.scale.name} ({options.scale.about}); accuracy of the last epoch in %, mean ±"
            " standard deviation over the seeds; –: not run or not to its end"
        )
        if against == "baseline":
            lines.append("Δ: points above the first row of ours (and of the paper's numbers in that row)")
    return lines + left_out([table], options)


# --------------------------------------------------------------------------------------------------------
# keep
# --------------------------------------------------------------------------------------------------------


def keep(tables: Sequence[Table], flags: KeepFlags) -> None:
    """Copy what there is of all seeds, as `show` prints them."""
    source, target, copied = Path(flags.output_dir), Path(flags.into), 0
    if source.resolve() == target.resolve():
        raise UserError(f"--into {target}: is --output_dir itself")
    numbers = [int(folder.name.removeprefix("seed_")) for folder in source.glob("*/*/seed_[0-9]*")]
    for run in plan_runs(tables, dataclasses.replace(flags.options, seeds=1 + max(numbers, default=0))):
        for name in (RESULTS_FILE, LOG_FILE) if run.stage == PRETRAIN else (RESULTS_FILE,):
            if (run.folder / name).is_file() and share_done(run) == 1:
                copy = target / (run.folder / name).relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run.folder / name, copy)
                copied += 1
    if not copied:
        raise UserError(f"--output_dir {source}: no run of table {flags.table} has finished there")
    print(f"{copied} files copied into {target}")


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
