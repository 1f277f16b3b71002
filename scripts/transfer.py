"""Transfer learning (Tables 2 and 3): fine-tuning on other data sets, a grid of learning rates and weight decays each.

    python scripts/transfer.py run  --finetune LUT.pth --label LUT --dataset cub200 flowers102 --data_path DATA
    python scripts/transfer.py show --picture grids.png                # the paper's rows, ours, and heat maps
    python scripts/transfer.py plan --finetune LUT.pth --dataset inat2018 --data_path INAT2018 --processes 8
    python scripts/transfer.py run  --finetune_recipe transfer_nano --finetune OUT/checkpoint-99.pth --data_path MINE
    python scripts/transfer.py run  --finetune LUT.pth --dataset dogs --data_path DOGS --submit -- --ngpus 1

`run` skips finished cells and resumes interrupted ones: run the same command again. --help after a command lists its
flags. Data sets, as their authors publish them: inat2018, inat2019, inat2021_mini, aircraft,
nabirds, cub200, cifar10, cifar100, dogs, flowers102; without --dataset, folders or .tar files of class folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.config.checks import check
from util.config.command_line import parse_command, split_like_shell
from util.runtime.errors import RunError, run_main
from util.tables.formats import Style, as_note, print_table
from util.tables.outcomes import share_done
from util.tables.plan import Run
from util.tables.transfer import (
    LRS,
    STAGE,
    WEIGHT_DECAYS,
    Search,
    Target,
    find_targets,
    grid_folder,
    make_cell_folders,
    plan_cells,
    prune,
    read_grid,
    read_values,
)
from util.tables.transfer_view import (
    choice_images,
    explanation,
    grid_notes,
    heat_maps,
    read_results_of_grids,
    tables_with_results,
    title_of,
)

if TYPE_CHECKING:
    from util.tables.cost import TimeEstimate

SCRATCH = "scratch"
TFLOPS = {"cuda": 14.0, "cpu": 0.03}  # per process: a V100 by tables/scales.yaml, one slow core
PICTURE = "grid.png"


@dataclass(frozen=True)
class GridFlags:
    """Say where the runs are, and how the best cell is chosen."""

    output_dir: str = "output/transfer"
    """folder of all grids; each is in LABEL/DATA SET below it"""
    holdout: float = 0.0
    """share of each class's training images that are held out to choose the best cell, which is then trained again on
    all of them. 0: the test images choose it, as in the paper's maximum over the grid"""

    def __post_init__(self) -> None:
        check(0 <= self.holdout < 1, "holdout", self.holdout, "must lie in [0, 1)")


@dataclass(frozen=True)
class ShowFlags(GridFlags):
    """Print best (mean ± std) of each grid beside the paper's Tables 2 and 3."""

    format: Style = "text"
    """text: columns under each other, or a block per row where these would pass 100 columns"""
    picture: str = ""
    """also draw the heat maps of all grids into this PNG"""


@dataclass(frozen=True)
class PlanFlags(GridFlags):
    """Print the runs: commands, cost, and how much is done already."""

    finetune: str = ""
    """pre-trained weights (MAE's, the release's, timm's or ours), or `scratch`"""
    label: str = "ours"
    """name of these weights; MAE, LUT, ... are compared with the paper's row of that name"""
    dataset: tuple[str, ...] = ()
    """data sets by name, see above; or as for main_finetune.py"""
    data_path: tuple[str, ...] = ()
    """a folder for each --dataset, or one that holds them all; without --dataset, class folders or .tar files"""
    finetune_recipe: str = ""
    """settings of the fine-tuning; default: transfer_vit_base, transfer_cifar_vit_base or transfer_inat_vit_base"""
    lrs: tuple[str, ...] = LRS
    """learning rates per 256 images; LOW:HIGH:NUMBER stands for so many at equal ratios"""
    weight_decays: tuple[str, ...] = WEIGHT_DECAYS
    """weight decays of AdamW, likewise; 0 may be among them"""
    seeds: int = 1
    """runs per cell, with seeds 0, 1, ...; a cell counts by their mean"""
    processes: int | None = None
    """processes of each run, one per GPU; the images per update stay the same. Default: 1"""
    finetune_flags: str = ""
    """more flags for every run, in one string: --finetune_flags="--weights momentum --num_workers 4" """
    tflops: float | None = None
    """10^12 FLOP/s of a run, to estimate its time; default: the speed of runs that have a log, else 14 per GPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(re.fullmatch(r"\w[\w.+-]*", self.label)), "label", self.label, "letters, digits and . + - _ only")
        check(self.seeds >= 1, "seeds", self.seeds, "must be 1 or more")
        check(self.processes is None or self.processes >= 1, "processes", self.processes, "must be 1 or more")
        check(self.tflops is None or self.tflops > 0, "tflops", self.tflops, "must be above 0")
        read_values("lrs", self.lrs, allow_zero=False)
        read_values("weight_decays", self.weight_decays, allow_zero=True)

    @property
    def search(self) -> Search:
        """Return the grid search; UserError if there is no such checkpoint."""
        from util.weights.checkpoint import check_file

        start = "" if self.finetune == SCRATCH else self.finetune
        fix = f"give the pre-trained weights, or {SCRATCH}"
        check(bool(self.finetune), "finetune", "", fix)
        if start:
            check_file(Path(start), "--finetune")
        return Search(
            folder=Path(self.output_dir) / self.label,
            finetune=start,
            lrs=read_values("lrs", self.lrs, allow_zero=False),
            weight_decays=read_values("weight_decays", self.weight_decays, allow_zero=True),
            seeds=self.seeds,
            holdout=self.holdout,
            extra=tuple(split_like_shell("finetune_flags", self.finetune_flags)),
            processes=self.processes or 1,
        )

    @property
    def targets(self) -> list[Target]:
        """Return the data sets."""
        return find_targets(self.dataset, self.data_path, self.finetune_recipe)


@dataclass(frozen=True)
class RunFlags(PlanFlags):
    """Do the runs one after the other, then show the tables; or submit the runs."""

    download: bool = False
    """first fetch missing data sets into --data_path; torchvision has aircraft, cifar10, cifar100, flowers102 and
    inat2021_mini"""
    keep_going: bool = False
    """after a failed cell, such as one that diverges, continue with the others and choose among those"""
    keep_checkpoints: Literal["best", "all", "none"] = "best"
    """which finished cells keep their checkpoints (weights and the optimiser's two moments). With --submit, the next
    call of the same command deletes the others"""
    submit: bool = False
    """submit the cells to SLURM, those of each data set as a job array; after `--` come flags of scripts/submit.py"""
    dry_run: bool = False
    """only print the plan, with --submit the batch scripts and commands"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.download:
            from util.data.published import DATASETS

            named = bool(self.dataset and self.data_path) and all(name in DATASETS for name in self.dataset)
            fix = "give the names of what to fetch by --dataset, and the folder by --data_path"
            check(named, "download", self.dataset, fix)


COMMANDS = {"plan": PlanFlags, "run": RunFlags, "show": ShowFlags}


def main() -> None:
    """Read the command and its flags, then do it."""
    flags, launcher_flags = parse_command(COMMANDS, sys.argv[1:], Path(__file__).name, __doc__)
    if isinstance(flags, ShowFlags):
        show(flags)
        return
    if isinstance(flags, RunFlags) and flags.download and not flags.dry_run:
        from util.data.published import download

        for target in flags.targets:
            download(target.dataset, target.data_path)
    if isinstance(flags, RunFlags) and flags.submit:
        submit_all(flags, launcher_flags)
    elif isinstance(flags, RunFlags) and not flags.dry_run:
        run(flags)
    else:
        plan(flags)


# --------------------------------------------------------------------------------------------------------
# plan, run
# --------------------------------------------------------------------------------------------------------


def cells_of(search: Search, targets: Sequence[Target]) -> dict[Target, list[Run]]:
    """Return the runs of each data set's grid."""
    return {target: plan_cells(search, target, search.points) for target in targets}


def chosen_cells(search: Search, targets: Sequence[Target]) -> dict[Target, list[Run]]:
    """Return, with --holdout, the runs of each best cell on all training images, where the best is known."""
    chosen = {}
    for target in targets if search.holdout else ():
        best = read_grid(grid_folder(search.folder, target.name, search.holdout)).best
        if best is not None:
            chosen[target] = plan_cells(search, target, [best], chosen=True)
    return chosen


def estimate_time(runs: Sequence[Run], flags: PlanFlags) -> TimeEstimate:
    """Return an estimate by --tflops, else by the logs of the runs, else by TFLOPS."""
    import torch

    from util.tables.cost import TimeEstimate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tflops = flags.tflops or TFLOPS[device] * (flags.processes or 1)
    estimate = TimeEstimate(1e12 * tflops, images=0)  # each run has its own number of images
    for run in runs if flags.tflops is None else ():
        estimate.add_log(run)
    return estimate


def plan(flags: PlanFlags) -> None:
    """Print all commands in their order."""
    from util.tables.runner import print_plan

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    search = flags.search
    runs = [run for cells in cells_of(search, flags.targets).values() for run in cells]
    print(f"# {explanation(flags.holdout)}")
    if search.holdout:
        print(f"# then the best cell of each data set again, on all training images: {search.seeds} runs each")
    print_plan(runs, estimate_time(runs, flags))


def run(flags: RunFlags) -> None:
    """Do the runs that are not done yet, then draw the heat maps and show the tables."""
    from util.tables.pictures import save_picture

    search, targets = flags.search, flags.targets
    cells = cells_of(search, targets)
    with locked(search.folder / target.name for target in targets):
        failure = run_cells(cells, flags)
        if search.holdout:
            print("\nthe best cell of each data set, on all training images", flush=True)
            failure = run_cells(chosen_cells(search, targets), flags) or failure
    for target in targets:
        folder = grid_folder(search.folder, target.name, search.holdout)
        grids = {title_of(target.name): read_grid(folder)}
        save_picture(heat_maps(grids, f"Grid of {flags.label}", choice_images(flags.holdout)), folder / PICTURE)
        print(f"heat map: {folder / PICTURE}")
    print()
    show(ShowFlags(flags.output_dir, flags.holdout))
    if failure is not None:
        raise failure


def run_cells(planned: dict[Target, list[Run]], flags: RunFlags) -> RunError | None:
    """Do the runs of all data sets; with --keep_going, return the error that names those that failed."""
    from util.tables.runner import run_all

    runs = [run for cells in planned.values() for run in cells]
    make_cell_folders(runs)
    for cells in planned.values():  # jobs may have left checkpoints
        delete_checkpoints(flags, cells[0])
    try:
        run_all(runs, estimate_time(runs, flags), flags.keep_going, partial(delete_checkpoints, flags))
    except RunError as error:
        if not flags.keep_going:
            raise
        return error
    return None


def delete_checkpoints(flags: RunFlags, run: Run) -> None:
    """Delete what --keep_checkpoints does not keep of the grid that this run belongs to."""
    if flags.keep_checkpoints != "all":
        prune(run.folder.parent.parent, flags.keep_checkpoints == "best")


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other commands from writing to these data sets' folders meanwhile."""
    from util.runtime.files import writable_folder
    from util.weights.checkpoint import lock_folder

    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(lock_folder(writable_folder(folder, "output_dir")))
        yield


# --------------------------------------------------------------------------------------------------------
# run --submit
# --------------------------------------------------------------------------------------------------------


def submit_all(flags: RunFlags, launcher_flags: Sequence[str]) -> None:
    """Submit an array for each data set of what is not done; with --holdout the best cells, once all others are."""
    from scripts import submit

    config = submit.config_of_arrays(STAGE, launcher_flags, flags.processes)
    flags = dataclasses.replace(flags, output_dir=str(Path(flags.output_dir).absolute()))
    search = dataclasses.replace(flags.search, processes=config.nodes * config.processes_per_node)
    cells = cells_of(search, flags.targets)
    finished = [target for target, runs in cells.items() if all(share_done(run) == 1 for run in runs)]
    planned = [*cells.items(), *chosen_cells(search, finished).items()]
    if not flags.dry_run:
        submit.check_sbatch()
        for _, runs in planned:
            delete_checkpoints(flags, runs[0])
    job_dir = Path(config.job_dir).absolute() if config.job_dir else search.folder / "jobs"
    submitted = 0
    for target, runs in planned:
        todo = [run for run in runs if share_done(run) < 1]
        if not todo:
            continue
        submitted += len(todo)
        if not flags.dry_run:
            make_cell_folders(runs)
        named = dataclasses.replace(config, job_name=config.job_name or f"lut-transfer-{target.name}")
        submit.submit_array(named, [submit.Run(run.title, run.flags) for run in todo], job_dir, "", flags.dry_run)
    if not (submitted and flags.dry_run):
        print(f"{submitted} runs submitted" if submitted else "all done")
    if search.holdout and len(finished) < len(cells):
        print("once they have ended, the same command submits the best cell of each data set, on all training images")


# --------------------------------------------------------------------------------------------------------
# show
# --------------------------------------------------------------------------------------------------------


def show(flags: ShowFlags) -> None:
    """Print each table of the paper that has one of the data sets, one of all other sets, and notes below them."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    results = read_results_of_grids(Path(flags.output_dir), flags.holdout)
    for heading, table in tables_with_results(results):
        print_table(heading, table, [], flags.format)
    for line in [explanation(flags.holdout), *grid_notes(results)]:
        print(as_note(line, flags.format))
    if flags.picture:
        from util.tables.pictures import save_picture

        grids = {
            f"{title_of(name)}{f', {label}' if len(results) > 1 else ''}": result.grid
            for label, by_name in results.items()
            for name, result in by_name.items()
        }
        figure = heat_maps(grids, f"Grids of {', '.join(results)}", choice_images(flags.holdout))
        save_picture(figure, Path(flags.picture))
        print(as_note(f"picture: {flags.picture}", flags.format))


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
