"""The paper's tables beside our own runs: plan a table's runs, do them, and show the table.

    python scripts/tables.py plan 4c --scale tiny                       # the commands, their cost, what is done already
    python scripts/tables.py run  4c --scale tiny                       # digits on two CPU cores, minutes
    python scripts/tables.py show 4c --scale tiny --format markdown
    python scripts/tables.py run  4  --scale small --data_path CIFAR10 --seeds 3 --keep_going
    python scripts/tables.py run  4c --data_path IMAGENET --submit -- --partition gpu --account lab
    python scripts/tables.py keep study --scale cpu --into docs/results # copy the small files that it is printed from

Tables: 1, 2, 3, 4a to 4f (4: all of them), 5, A, B, C as in the paper; study, brief, parts and tuning are our own.
--help after a command lists its flags. `run` skips finished runs and resumes interrupted ones: run the same command
again.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.checks import check
from util.config.command_line import parse_command, split_like_shell
from util.runtime.errors import UserError, run_main
from util.tables.formats import Style, as_note, print_table
from util.tables.outcomes import check_outcomes, copy_results, share_done
from util.tables.plan import Options, Run, plan_runs, read_scale
from util.tables.tables import PRETRAIN, PROBE, STAGES, Table, find_tables
from util.tables.view import Against, explanations, fill, not_run, text_table

if TYPE_CHECKING:
    from scripts.submit import SubmitConfig
    from util.tables.cost import TimeEstimate


@dataclass(frozen=True)
class TableFlags:
    """Name the table and the folder of its runs."""

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    """1, 2, 3, 4a to 4f, 4, 5, A, B, C, study, brief, parts or tuning"""
    scale: str = "paper"
    """paper, small, cpu or tiny, described in tables/scales.yaml"""
    output_dir: str = "output/tables"
    """folder of the runs of all tables and scales; another data set needs another one"""

    @property
    def options(self) -> Options:
        """Return what all runs share."""
        return Options(read_scale(self.scale), Path(self.output_dir))


@dataclass(frozen=True)
class ShowFlags(TableFlags):
    """Print a table: the paper's numbers, ours, their difference, and the seeds."""

    format: Style = "text"
    """text: columns under each other, or a block per row where these would pass 100 columns"""
    against: Against | None = None
    """paper: our difference to the paper's number. baseline: differences of the paper's numbers, and of ours, to their
    first row. Default: paper at --scale paper, else baseline"""
    picture: str = ""
    """also draw it into this PNG"""
    curves: str = ""
    """also draw losses and kNN of its pre-trainings, over epochs and over cost, into this PNG"""


@dataclass(frozen=True)
class PlanFlags(TableFlags):
    """Print the runs of a table: commands, cost, and how much is done already."""

    seeds: int | None = None
    """runs per row, with seeds 0, 1, ...; default: 1, for `study` and `brief` 3"""
    data_path: str = ""
    """images with labels, as for main_pretrain.py; --scale tiny needs none"""
    dataset: str = ""
    """a reader's name, as for main_pretrain.py"""
    processes: int | None = None
    """processes of each run, one per GPU; the images per update stay the same. Default: 8 at --scale paper, else 1"""
    pretrain_flags: str = ""
    """more flags for every pre-training, in one string: --pretrain_flags="--num_workers 4" """
    finetune_flags: str = ""
    """more flags for every fine-tuning"""
    linprobe_flags: str = ""
    """more flags for every linear probing"""
    probe_flags: str = ""
    """more flags for every probing of frozen features"""
    tflops: float | None = None
    """10^12 FLOP/s of all processes of a run, to estimate its time; default: the speed of runs that have a log, else
    the scale's assumption"""

    def __post_init__(self) -> None:
        for flag in ("seeds", "processes"):
            value = getattr(self, flag)
            check(value is None or value >= 1, flag, value, "must be 1 or more")
        check(self.tflops is None or self.tflops > 0, "tflops", self.tflops, "must be above 0")

    @property
    def options(self) -> Options:
        """Return what all runs share, with data and flags."""
        options = super().options
        for flag, given in (("data_path", self.data_path), ("dataset", self.dataset)):
            fix = f"--scale {self.scale} has its own data, leave the flag out or take --scale small"
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
    """after a failed run, continue with those that do not depend on it"""
    submit: bool = False
    """submit them to SLURM, each stage as a job array; after `--` come flags of scripts/submit.py"""
    dry_run: bool = False
    """only print the plan, with --submit the batch scripts and commands"""


@dataclass(frozen=True)
class KeepFlags(TableFlags):
    """Copy the results of a table's runs, and the logs of its pre-trainings, into a folder that can be kept."""

    into: str = "docs/results"
    """folder to copy into; `show --output_dir` prints the same table from it"""


COMMANDS = {"plan": PlanFlags, "run": RunFlags, "show": ShowFlags, "keep": KeepFlags}


def main() -> None:
    """Read the command and its flags, then do it."""
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
# plan, run
# --------------------------------------------------------------------------------------------------------


def plan(tables: Sequence[Table], flags: PlanFlags) -> None:
    """Print the commands, and what of the tables is not run."""
    from util.tables.runner import print_plan

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    options = flags.options
    runs = plan_runs(tables, options)
    estimate = estimate_time(runs, flags)
    scale = f"scale {options.scale.name}: {options.scale.description}"
    for line in [*(table.heading for table in tables), scale, *not_run(tables, options)]:
        print(f"# {line}")
    print_plan(runs, estimate)


def run(tables: Sequence[Table], flags: RunFlags) -> None:
    """Do the runs that are not done yet, then show the tables."""
    from util.tables.runner import run_all

    options = flags.options
    runs = plan_runs(tables, options)
    check_input(runs, flags, options)
    for line in not_run(tables, options):
        print(line)
    run_all(runs, estimate_time(runs, flags), flags.keep_going)
    print()
    show(tables, ShowFlags(flags.table, flags.scale, flags.output_dir))


def estimate_time(runs: Sequence[Run], flags: PlanFlags) -> TimeEstimate:
    """Return an estimate by --tflops, else by the logs of the runs, else by the scale's assumption."""
    from util.data.datasets import open_images
    from util.tables.cost import TimeEstimate

    scale = flags.options.scale
    images = scale.images
    if (flags.data_path or flags.dataset) and scale.name != "paper":  # counting is quick there
        images = len(open_images(flags.data_path, flags.dataset, "train"))
    estimate = TimeEstimate(1e12 * (flags.tflops or scale.tflops), images)
    for run in runs if flags.tflops is None else ():
        estimate.add_log(run)
    return estimate


def check_input(runs: Sequence[Run], flags: PlanFlags, options: Options) -> None:
    """Raise UserError if there is no data, or if a run with other settings has finished in the folder of one."""
    scale = options.scale
    if scale.data and runs and not (flags.data_path or flags.dataset):
        raise UserError(f"--data_path: is missing, --scale {scale.name} needs {scale.data} ({scale.description})")
    if flags.data_path and not Path(flags.data_path).exists():
        raise UserError(f"--data_path {flags.data_path}: there is no such file or folder")
    check_outcomes(runs)


# --------------------------------------------------------------------------------------------------------
# run --submit
# --------------------------------------------------------------------------------------------------------


def submit_all(tables: Sequence[Table], flags: RunFlags, launcher_flags: Sequence[str]) -> None:
    """Submit an array for each stage of what is not done; each task waits for the pre-training that it starts from."""
    from scripts import submit

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
        ready = [run for run in todo if run.stage == stage and run.after not in pretrainings]
        waiting = [run for run in todo if run.stage == stage and run.after in pretrainings]
        for array in filter(None, (ready, waiting)):
            after = dependency(array, pretrainings, number) if array is waiting else ""
            submitted = submit_stage(config, stage, array, job_dir, after, flags.dry_run)
            number = submitted if stage == PRETRAIN else number
    if not todo:
        print(f"{len(runs)} runs, all done")


def dependency(array: Sequence[Run], pretrainings: Sequence[Run], number: str) -> str:
    """Return sbatch's --dependency: each task after the one with its number, or after all where the arrays differ."""
    paired = len(array) > 1 and [run.after for run in array] == list(pretrainings)
    return f"{'aftercorr' if paired else 'afterok'}:{number}"


def submit_stage(
    config: SubmitConfig, stage: str, array: Sequence[Run], job_dir: Path, after: str, dry_run: bool
) -> str:
    """Submit or print the runs of one stage, and return the number of the job."""
    from scripts import submit

    main = STAGES[stage].main
    one = dict(nodes=1, ngpus=min(1, config.ngpus), tasks_per_node=None) if main == PROBE else {}
    config = dataclasses.replace(config, stage=main, job_name=config.job_name or f"lut-{stage}", **one)
    return submit.submit_array(config, [submit.Run(run.title, run.flags) for run in array], job_dir, after, dry_run)


# --------------------------------------------------------------------------------------------------------
# show, keep
# --------------------------------------------------------------------------------------------------------


def show(tables: Sequence[Table], flags: ShowFlags) -> None:
    """Print the tables and their notes, and draw the pictures."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    options = flags.options
    against: Against = flags.against or ("paper" if options.scale.name == "paper" else "baseline")
    if flags.output_dir != TableFlags.output_dir and not Path(flags.output_dir).is_dir():
        raise UserError(f"--output_dir {flags.output_dir}: there is no such folder of runs")
    for flag, path in (("picture", flags.picture), ("curves", flags.curves)):
        if path and len(tables) > 1:
            raise UserError(f"--{flag} {path}: draws one table, {flags.table} is {len(tables)}")
    all_filled = [fill(table, options) for table in tables]  # warnings of damaged files come before any table
    for number, (table, filled) in enumerate(zip(tables, all_filled, strict=True)):
        notes = [*explanations(table, options, against), *filled.remarks, *table.notes]
        print("\n" if number else "", end="")
        print_table(table.heading, text_table(filled, against), notes, flags.format)
    if flags.picture or flags.curves:
        from util.tables.pictures import draw_curves, draw_points

        if flags.picture:
            draw_points(filled, against, Path(flags.picture))
            print(as_note(f"picture: {flags.picture}", flags.format))
        if flags.curves:
            draw_curves(table, options, Path(flags.curves))
            print(as_note(f"curves: {flags.curves}", flags.format))


def keep(tables: Sequence[Table], flags: KeepFlags) -> None:
    """Copy the results of all seeds, so that `show` prints the same tables from the copy."""
    source, target = Path(flags.output_dir), Path(flags.into)
    if source.resolve() == target.resolve():
        raise UserError(f"--into {target}: is --output_dir itself, choose another folder")
    seeds = [int(folder.name.removeprefix("seed_")) for folder in source.glob("*/*/seed_[0-9]*")]
    runs = plan_runs(tables, dataclasses.replace(flags.options, seeds=1 + max(seeds, default=0)))
    copied = copy_results(runs, source, target)
    if not copied:
        raise UserError(f"--output_dir {source}: no run of table {flags.table} has finished there")
    print(f"{copied} files copied into {target}")


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
