"""Transfer learning (Tables 2 and 3): fine-tuning on other data sets, a grid of learning rates and weight decays each.

    python scripts/transfer.py run  --finetune LUT.pth --label LUT --dataset cub200 flowers102 --data_path DATA
    python scripts/transfer.py show --picture grids.png                # the paper's rows, ours, and heat maps
    python scripts/transfer.py plan --finetune LUT.pth --dataset inat2018 --data_path INAT2018 --processes 8
    python scripts/transfer.py run  --finetune_recipe transfer_nano --finetune OUT/checkpoint-99.pth --data_path MINE
    python scripts/transfer.py run  --finetune LUT.pth --dataset dogs --data_path DOGS --submit -- --ngpus 1

`run` skips cells that have finished and goes on with those that were interrupted: run the same command again. --help
after a command lists its flags. Data sets, as their authors publish them: inat2018, inat2019, inat2021_mini, aircraft,
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
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts import submit
from util.config.command_line import parse_command, split_like_shell
from util.config.groups import check
from util.data.published import DATASETS, download
from util.figures.figure import save_figure
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import writable_folder
from util.tables.formats import commented
from util.tables.plan import Clock, Run, share_done
from util.tables.runner import print_plan, run_all
from util.tables.tables import Table, load_tables
from util.tables.transfer import (
    LRS,
    STAGE,
    WEIGHT_DECAYS,
    Result,
    Search,
    Target,
    grid_folder,
    note_cells,
    plan_cells,
    prune,
    read_grid,
    read_values,
    result_of,
    targets,
)
from util.tables.transfer_view import alone, beside_paper, heat_maps
from util.weights.checkpoint import check_file, lock_folder

TABLES = ("2", "3")
SCRATCH = "scratch"
TFLOPS = {"cuda": 14.0, "cpu": 0.03}  # of a process: a V100 by tables/scales.yaml, one slow core
PICTURE = "grid.png"


@dataclass(frozen=True)
class GridFlags:
    """Where the runs are, and how the best cell is chosen."""

    output_dir: str = "output/transfer"
    """folder of all grids; each is in LABEL/DATA SET below it"""
    holdout: float = 0.0
    """share of the training images, of each class alike, by which the best cell is chosen; it is then trained again on
    all of them. 0: by the images of the test, as the paper's maximum over the grid is"""

    def __post_init__(self) -> None:
        check(0 <= self.holdout < 1, "holdout", self.holdout, "must lie in [0, 1)")


@dataclass(frozen=True)
class ShowFlags(GridFlags):
    """Print best (mean ± std) of each grid beside the paper's Tables 2 and 3."""

    format: Literal["text", "markdown", "latex"] = "text"
    """what to print"""
    picture: str = ""
    """also draw the heat maps of all grids into this PNG"""


@dataclass(frozen=True)
class PlanFlags(GridFlags):
    """Print the runs: commands, cost, and what is done already."""

    finetune: str = ""
    """pre-trained weights (MAE's, the release's, timm's or ours), or `scratch`"""
    label: str = "ours"
    """what to call them; MAE, LUT, ... are compared with the paper's row of that name"""
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
    """of each run, one per GPU; the images per update stay the same. Default: 1"""
    finetune_flags: str = ""
    """more flags for every run, in one string: --finetune_flags="--weights momentum --num_workers 4" """
    tflops: float | None = None
    """10^12 FLOP/s of a run, for the time it takes; default: the speed of runs that have a log, else 14 per GPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(re.fullmatch(r"\w[\w.+-]*", self.label)), "label", self.label, "letters, digits and . + - _ only")
        check(self.seeds >= 1, "seeds", self.seeds, "must be 1 or more")
        check(self.processes is None or self.processes >= 1, "processes", self.processes, "must be 1 or more")
        check(self.tflops is None or self.tflops > 0, "tflops", self.tflops, "must be above 0")
        for flag, given, zero in (("lrs", self.lrs, False), ("weight_decays", self.weight_decays, True)):
            read_values(flag, given, zero)

    @property
    def search(self) -> Search:
        """For planning.

        Raises:
            UserError: there is no such checkpoint.
        """
        start = "" if self.finetune == SCRATCH else self.finetune
        fix = f"give the pre-trained weights, or {SCRATCH}"
        check(bool(self.finetune), "finetune", "", fix)
        if start:
            check_file(Path(start), "--finetune")
        return Search(
            folder=Path(self.output_dir) / self.label,
            finetune=start,
            lrs=read_values("lrs", self.lrs, zero=False),
            weight_decays=read_values("weight_decays", self.weight_decays, zero=True),
            seeds=self.seeds,
            holdout=self.holdout,
            extra=tuple(split_like_shell("finetune_flags", self.finetune_flags)),
            processes=self.processes or 1,
        )

    @property
    def targets(self) -> list[Target]:
        """The data sets."""
        return targets(self.dataset, self.data_path, self.finetune_recipe)


@dataclass(frozen=True)
class RunFlags(PlanFlags):
    """Do the runs, one after the other, or submit them; then show what they came to."""

    download: bool = False
    """first fetch into --data_path what is not there, by torchvision: aircraft, cifar10, cifar100, flowers102 and
    inat2021_mini"""
    keep_going: bool = False
    """after a failed cell, as one that diverges, go on with the others, and choose among those"""
    keep_checkpoints: Literal["best", "all", "none"] = "best"
    """of the cells that have finished; each has the weights and the optimiser's two moments. With --submit the next
    call of the same command deletes the others, for nothing does while the jobs run"""
    submit: bool = False
    """submit the cells to SLURM, those of each data set as a job array; after `--` come flags of scripts/submit.py"""
    dry_run: bool = False
    """do nothing: print the plan, with --submit the batch scripts and commands"""

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "give the names of what to fetch by --dataset, and the folder by --data_path"
        named = bool(self.dataset) and all(name in DATASETS for name in self.dataset) and bool(self.data_path)
        check(not self.download or named, "download", self.dataset, fix)


COMMANDS = {"plan": PlanFlags, "run": RunFlags, "show": ShowFlags}


def main() -> None:
    """The command's flags, then the command."""
    flags, launcher_flags = parse_command(COMMANDS, sys.argv[1:], Path(__file__).name, __doc__)
    if isinstance(flags, ShowFlags):
        show(flags)
        return
    if isinstance(flags, RunFlags) and flags.download and not flags.dry_run:
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


def cells_of(search: Search, chosen_from: Sequence[Target]) -> dict[Target, list[Run]]:
    """The grid of each data set."""
    return {target: plan_cells(search, target, search.points) for target in chosen_from}


def chosen_of(search: Search, chosen_from: Sequence[Target]) -> dict[Target, list[Run]]:
    """With --holdout, the best cell of each data set on all training images, once it is known; else nothing."""
    found = {}
    for target in chosen_from if search.holdout else ():
        best = read_grid(grid_folder(search.folder, target.name, search.holdout)).best
        if best is not None:
            found[target] = plan_cells(search, target, [best], chosen=True)
    return found


def clock_for(runs: Sequence[Run], flags: PlanFlags) -> Clock:
    """By what is known of the speed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = Clock(1e12 * (flags.tflops or TFLOPS[device] * (flags.processes or 1)), images=0)  # each run has its own
    for run in runs if flags.tflops is None else ():
        clock.look_at(run)
    return clock


def plan(flags: PlanFlags) -> None:
    """All commands in their order."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    search = flags.search
    runs = [run for cells in cells_of(search, flags.targets).values() for run in cells]
    for line in explained(flags):
        print(f"# {line}")
    if search.holdout:
        print(f"# then the best cell of each data set again, on all training images: {search.seeds} runs each")
    print_plan(runs, clock_for(runs, flags))


def run(flags: RunFlags) -> None:
    """What is not done yet, then the tables and the heat maps."""
    search, chosen_from = flags.search, flags.targets
    cells = cells_of(search, chosen_from)
    with locked(search.folder / target.name for target in chosen_from):
        failed = do(cells, flags)
        if search.holdout:
            print("\nthe best cell of each data set, on all training images", flush=True)
            failed = do(chosen_of(search, chosen_from), flags) or failed
    for target in chosen_from:
        folder = grid_folder(search.folder, target.name, search.holdout)
        figure = heat_maps({title_of(target.name): read_grid(folder)}, f"Grid of {flags.label}", judged(flags))
        save_figure(figure, folder / PICTURE)
        print(f"heat map: {folder / PICTURE}")
    print()
    show(ShowFlags(flags.output_dir, flags.holdout))
    if failed is not None:
        raise failed


def do(planned: dict[Target, list[Run]], flags: RunFlags) -> RunError | None:
    """The runs of all data sets; what failed, with --keep_going."""
    runs = [run for cells in planned.values() for run in cells]
    note_cells(runs)
    for cells in planned.values():  # also of those that were done elsewhere
        tidy(flags, cells[0])
    try:
        run_all(runs, clock_for(runs, flags), flags.keep_going, partial(tidy, flags))
    except RunError as error:
        if not flags.keep_going:
            raise
        return error
    return None


def tidy(flags: RunFlags, run: Run) -> None:
    """Delete what --keep_checkpoints does not keep of the grid that has this run."""
    if flags.keep_checkpoints != "all":
        prune(run.folder.parent.parent, flags.keep_checkpoints == "best")


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """No other command writes to these data sets' folders meanwhile."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(lock_folder(writable_folder(folder, "output_dir")))
        yield


def submit_all(flags: RunFlags, launcher_flags: Sequence[str]) -> None:
    """An array for each data set of what is not done; with --holdout, the chosen cells once all others are."""
    config = submit.config_of_arrays(STAGE, launcher_flags, flags.processes)
    flags = dataclasses.replace(flags, output_dir=str(Path(flags.output_dir).absolute()))
    search = dataclasses.replace(flags.search, processes=config.nodes * config.processes_per_node)
    cells = cells_of(search, flags.targets)
    ready = [t for t in flags.targets if all(share_done(run) == 1 for run in cells[t])]
    chosen = chosen_of(search, ready)
    planned = [*cells.items(), *chosen.items()]
    if not flags.dry_run:
        submit.check_sbatch()
        for _, runs in planned:
            tidy(flags, runs[0])
    job_dir = Path(config.job_dir).absolute() if config.job_dir else search.folder / "jobs"
    waiting = 0
    for target, runs in planned:
        todo = [run for run in runs if share_done(run) < 1]
        if not todo:
            continue
        waiting += len(todo)
        if not flags.dry_run:
            note_cells(runs)
        named = dataclasses.replace(config, job_name=config.job_name or f"lut-transfer-{target.name}")
        submit.submit_array(named, [submit.Run(run.title, run.flags) for run in todo], job_dir, "", flags.dry_run)
    if not (waiting and flags.dry_run):
        print(f"{waiting} runs submitted" if waiting else "all done")
    if search.holdout and len(ready) < len(cells):
        print("once they have ended, the same command submits the best cell of each data set, on all training images")


# --------------------------------------------------------------------------------------------------------
# show
# --------------------------------------------------------------------------------------------------------


def collect(flags: GridFlags) -> dict[str, dict[str, Result]]:
    """By label and data set, in alphabetical order.

    Raises:
        UserError: there is none.
    """
    root, found = Path(flags.output_dir), {}
    for folder in sorted(root.glob(f"*/*/{grid_folder(Path(), '', flags.holdout).name}")):
        label, name = folder.parts[-3:-1]
        found.setdefault(label, {})[name] = result_of(root / label, name, flags.holdout)
    if not found:
        raise UserError(
            f"--output_dir {root}: holds no grid of --holdout {flags.holdout:g} (LABEL/DATA SET), see `run`"
        )
    return found


def show(flags: ShowFlags) -> None:
    """Each table of the paper that has one of the data sets, then the others, and what a reader must know."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    results = collect(flags)
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    tables = [table for name, table in load_tables().items() if name in TABLES]
    parts = [(table.heading, beside_paper(table, results)) for table in tables if set(names) & keys_of(table)]
    others = [name for name in names if not any(name in keys_of(table) for table in tables)]
    if others:
        parts.append(("Data sets that the paper has not", alone(others, results)))
    for heading, comparison in parts:
        print(f"{commented(heading, flags.format)}\n\n{comparison.render(flags.format)}\n")
    for line in [*explained(flags), *details(results)]:
        print(commented(line, flags.format))
    if flags.picture:
        several = len(results) > 1
        grids = {
            f"{title_of(name)}{f', {label}' if several else ''}": found[name].grid
            for label, found in results.items()
            for name in found
        }
        save_figure(heat_maps(grids, f"Grids of {', '.join(results)}", judged(flags)), Path(flags.picture))
        print(commented(f"picture: {flags.picture}", flags.format))


def keys_of(table: Table) -> set[str]:
    """Names of the data sets in a table."""
    return {column.key for column in table.columns}


def title_of(name: str) -> str:
    """What a data set is called in full."""
    return DATASETS[name].title if name in DATASETS else name


def judged(flags: GridFlags) -> str:
    """On which images the cells are compared, in words."""
    return f"{flags.holdout:.0%} of the training images, held out" if flags.holdout else "the test images"


def explained(flags: GridFlags) -> list[str]:
    """What our numbers are."""
    spread = "mean ± standard deviation (n - 1) of the grid's accuracies"
    if flags.holdout:
        return [
            f"ours: the cell that is best on {judged(flags)}, trained again on all of them, on the test images"
            f" ({spread} on those held out); top-1 in % at the last epoch"
        ]
    return [
        f"ours: best ({spread}), top-1 in % at the last epoch on the test images, which choose the best too, as the"
        " paper's maximum does; --holdout 0.2 chooses on training images"
    ]


def details(results: dict[str, dict[str, Result]]) -> list[str]:
    """For each grid how much of it there is, and where its best cell lies."""
    lines = []
    for label, found in results.items():
        for name, result in found.items():
            grid, best = result.grid, result.grid.best
            line = f"{label}, {name}: {len(grid.means)} of {len(grid.cells)} cells"
            if best is not None:
                line += f", best at learning rate {best[0]:g}, weight decay {best[1]:g}"
                line += edge(best, grid.means)
            if best is not None and result.score is None:
                line += "; not yet trained on all training images"
            lines.append(line)
    return lines


def edge(best: tuple[float, float], cells: dict[tuple[float, float], float]) -> str:
    """A remark where the best learning rate is the lowest or highest of several: the best may lie beyond."""
    lrs = sorted({lr for lr, _ in cells})
    if len(lrs) < 3 or best[0] not in (lrs[0], lrs[-1]):
        return ""
    return f" (the {'lowest' if best[0] == lrs[0] else 'highest'} learning rate: widen --lrs)"


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
