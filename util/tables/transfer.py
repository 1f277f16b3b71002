"""Grids of fine-tuning runs over learning rate and weight decay: the cells as runs, and their accuracies.

Kornblith et al., "Do Better ImageNet Models Transfer Better?" (2019), search logarithmic grids of both, choose the best
cell on images held out of the training set, train it again on all training images, and evaluate it on the test images.
The paper (Tables 2 and 3) reports the maximum, mean and standard deviation over a grid, so that it evaluates all cells,
and chooses the best, on the test images. `Search.holdout` selects the protocol.

Folders: OUTPUT/LABEL/DATA SET/{test, holdout_SHARE, holdout_SHARE/chosen}/lr_LR-wd_WD/seed_N, one run of
main_finetune.py each; `chosen` holds the best cell of those beside it, trained again on all training images.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.config.checks import check
from util.config.classifier import FinetuneConfig
from util.config.command_line import as_flags, last_value
from util.data.datasets import published_names
from util.data.splits import split_kind
from util.runtime.errors import UserError
from util.tables.outcomes import check_outcomes, outcome_in
from util.tables.plan import Run, batch_changes, parse_flags
from util.tables.tables import STAGES, Score
from util.train.classification import open_labelled

STAGE = "finetune"
RECIPE = "transfer_vit_base"
RECIPES = {  # for data sets that need another one
    **dict.fromkeys(("cifar10", "cifar100"), "transfer_cifar_vit_base"),
    **dict.fromkeys(("inat2018", "inat2019", "inat2021_mini"), "transfer_inat_vit_base"),
}
LRS = ("1.25e-4", "2.5e-4", "5e-4", "1e-3")  # Table D's three are among them
WEIGHT_DECAYS = ("0.005", "0.016", "0.05", "0.16")  # Table D's .05 is among them
CHOSEN = "chosen"
CELL = re.compile(r"lr_(.+)-wd_(.+)")
Point = tuple[float, float]  # learning rate per 256 images, weight decay


# --------------------------------------------------------------------------------------------------------
# Data sets and values
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A data set to transfer to."""

    name: str  # of its folder, and of its column in the paper's tables
    dataset: str  # a reader's name; empty: plain files
    data_path: str
    recipe: str


@dataclass(frozen=True)
class Search:
    """A grid search: the settings that the runs on all data sets share."""

    folder: Path  # OUTPUT/LABEL
    finetune: str  # pre-trained weights; empty: from scratch
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    seeds: int
    holdout: float  # share of the training images that chooses the best cell; 0: the test images do
    extra: tuple[str, ...]  # flags of every run
    processes: int

    @property
    def points(self) -> list[Point]:
        """Return the learning rate and weight decay of each cell."""
        return list(itertools.product(self.lrs, self.weight_decays))


def find_targets(datasets: Sequence[str], data_paths: Sequence[str], recipe: str) -> list[Target]:
    """Return the data sets that --dataset and --data_path name; UserError if two would share a folder.

    Args:
        recipe: of all fine-tunings; empty: each data set has its own.
    """
    fix = f"give one folder for all, or one for each of --dataset {' '.join(datasets)}"
    check(not datasets or len(data_paths) in (0, 1, len(datasets)), "data_path", data_paths, fix)
    known = published_names()
    check(bool(datasets or data_paths), "dataset", "", f"name data sets ({', '.join(known)}) or --data_path")
    paths = list(data_paths) or [""]
    paths = paths * len(datasets) if len(paths) < len(datasets) else paths
    targets = []
    for dataset, path in itertools.zip_longest(datasets, paths, fillvalue=""):
        name = dataset or name_of(Path(path).resolve())
        if not dataset and name in known:  # class folders may hold a part of that set: they get no column of its table
            name += "-files"
        name = re.sub(r"[^\w.-]+", "_", name)
        targets.append(Target(name, dataset, path, recipe or RECIPES.get(dataset, RECIPE)))
    flag, values = ("dataset", datasets) if datasets else ("data_path", data_paths)
    check_unique(flag, values, [target.name for target in targets])
    return targets


def check_unique(flag: str, given: Sequence[str], values: Sequence[str | float]) -> None:
    """Raise UserError if a value comes twice."""
    repeated = next((value for value in values if values.count(value) > 1), None)
    check(repeated is None, flag, given, f"{repeated} comes twice, leave one out")


def name_of(path: Path) -> str:
    """Return the name of a folder or .tar, or that of the folder around it if it is train/ or train.tar."""
    named = path.parent if split_kind(path.name.removesuffix(".tar")) == "train" else path
    return named.name.removesuffix(".tar")


def read_values(flag: str, given: Sequence[str], allow_zero: bool) -> tuple[float, ...]:
    """Return the numbers of a flag, sorted; LOW:HIGH:NUMBER stands for NUMBER values at equal ratios, to three digits.

    Raises:
        UserError: none is given, one is no number, negative, or comes twice.
    """
    check(bool(given), flag, "", "give one value or more, or LOW:HIGH:NUMBER")
    values: list[float] = []
    for text in given:
        numbers = parse_value(text)
        check(bool(numbers), flag, text, "give a number or LOW:HIGH:NUMBER")
        if len(numbers) == 3:
            low, high, count = numbers
            check(0 < low < high < math.inf, flag, text, "LOW must be above 0 and below HIGH")
            numbers = [float(f"{low * (high / low) ** (i / (count - 1)):.3g}") for i in range(int(count))]
        for number in numbers:
            valid = 0 <= number < math.inf if allow_zero else 0 < number < math.inf
            check(valid, flag, text, f"must be {'0 or more' if allow_zero else 'above 0'}, and finite")
        values += numbers
    check_unique(flag, given, values)
    return tuple(sorted(values))


def parse_value(text: str) -> list[float]:
    """Return [number], or [low, high, count] of LOW:HIGH:NUMBER; an empty list for anything else."""
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts[:2]] + [int(part) for part in parts[2:]]
    except ValueError:
        return []
    return numbers if len(numbers) == 1 or (len(numbers) == 3 and numbers[2] >= 2) else []


# --------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------


def grid_folder(folder: Path, name: str, holdout: float) -> Path:
    """Return the folder of a data set's cells among which the best is chosen."""
    return folder / name / (f"holdout_{holdout:g}" if holdout else "test")


def reported_folder(folder: Path, name: str, holdout: float) -> Path:
    """Return the folder of the cells that are trained on all training images and evaluated on the test images."""
    grid = grid_folder(folder, name, holdout)
    return grid / CHOSEN if holdout else grid


def cell_folder(grid: Path, point: Point) -> Path:
    """Return the folder of a cell's runs, one per seed."""
    lr, weight_decay = point
    return grid / f"lr_{lr!r}-wd_{weight_decay!r}"


def plan_cells(search: Search, target: Target, points: Sequence[Point], chosen: bool = False) -> list[Run]:
    """Return a run for each point and seed. The data set is opened, as the runs will open it.

    Args:
        chosen: True for points that held-out images have chosen, to be trained on all training images.

    Raises:
        UserError: a flag, recipe or data set is wrong, or other runs have finished in these folders.
    """
    holdout = 0.0 if chosen else search.holdout
    grid = (reported_folder if chosen else grid_folder)(search.folder, target.name, search.holdout)
    shared, config = grid_settings(search, target)
    changes = batch_changes(config, search.extra, 1, search.processes)
    images = len(open_labelled(dataclasses.replace(config, holdout=holdout, eval=False)).train)
    runs = []
    for (lr, weight_decay), seed in itertools.product(points, range(search.seeds)):
        folder = cell_folder(grid, (lr, weight_decay)) / f"seed_{seed}"
        own = changes | ({"finetune": search.finetune} if search.finetune else {})
        own |= {"blr": lr, "weight_decay": weight_decay, "seed": seed, "output_dir": str(folder)}
        own |= {"holdout": holdout} if holdout else {}
        flags = (*shared, *as_flags(own), "--auto_resume")
        title = f"{search.folder.name}, {target.name}, lr {lr:g}, weight decay {weight_decay:g}, seed {seed}"
        settings = dataclasses.replace(config, **own)
        runs.append(Run(title, STAGE, seed, folder, flags, settings, search.processes, images=images))
    check_outcomes(runs)
    check_same_start(runs)
    return runs


def grid_settings(search: Search, target: Target) -> tuple[list[str], FinetuneConfig]:
    """Return the flags that all cells share, and the settings that they stand for.

    Raises:
        UserError: --finetune_flags set what the grid sets.
    """
    data = {key: value for key, value in (("dataset", target.dataset), ("data_path", target.data_path)) if value}
    shared = ["--recipe", target.recipe, *as_flags(data), *search.extra]
    config: FinetuneConfig = parse_flags(STAGES[STAGE].main, tuple(shared))
    check(config.lr is None, "lr", config.lr, "leave it out, the grid sets --blr")
    for flag in ("blr", "weight_decay", "seed", "output_dir", "finetune"):
        value = last_value(flag, search.extra)
        check(not value, flag, value, "is set for each cell, it does not belong to --finetune_flags")
    check(not config.holdout, "holdout", config.holdout, "belongs to this script, not to --finetune_flags")
    return shared, config


def check_same_start(runs: Sequence[Run]) -> None:
    """Raise UserError if a finished run started from another checkpoint or was trained on other data."""
    for run in runs:
        outcome = outcome_in(run.folder, run.stage)
        if outcome is None:
            continue
        for flag in ("finetune", "dataset", "data_path"):
            if flag == "data_path" and run.config.dataset:
                continue  # it may have moved
            before, now = outcome.config.get(flag, ""), getattr(run.config, flag)
            if before != now and (flag == "dataset" or os.path.abspath(before) != os.path.abspath(now)):
                raise UserError(
                    f"--output_dir {run.folder}: has finished with --{flag} {before or 'none'}, not {now or 'none'};"
                    " choose another --label or folder"
                )


def make_cell_folders(runs: Sequence[Run]) -> None:
    """Make the folders of all cells; they tell how many cells the grid has."""
    for run in runs:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {run.folder}: cannot be written ({error.strerror})") from error


# --------------------------------------------------------------------------------------------------------
# Accuracies
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Accuracies of every cell in % at the last epoch, one per seed that has finished."""

    cells: Mapping[Point, tuple[float, ...]]

    @property
    def means(self) -> dict[Point, float]:
        """Return the mean over the seeds of each cell that has finished."""
        return {point: statistics.mean(values) for point, values in self.cells.items() if values}

    @property
    def best(self) -> Point | None:
        """Return the cell with the highest mean, on a tie the lowest learning rate; None if none has finished."""
        means = self.means
        return max(sorted(means), key=means.__getitem__, default=None)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Return mean and standard deviation (n - 1) over the cells; None if fewer than two have finished."""
        means = list(self.means.values())
        return (statistics.mean(means), statistics.stdev(means)) if len(means) > 1 else None


def read_grid(folder: Path) -> Grid:
    """Return the accuracies in a folder of cells; no cells if there is no such folder."""
    return Grid({point: tuple(accuracies(path)) for point, path in cell_folders(folder)})


def cell_folders(folder: Path) -> Iterator[tuple[Point, Path]]:
    """Yield each cell and its folder, in the order of learning rates."""
    cells = []
    for path in folder.glob("lr_*-wd_*"):
        if match := CELL.fullmatch(path.name):
            cells.append(((float(match[1]), float(match[2])), path))
    yield from sorted(cells)


def accuracies(cell: Path) -> Iterator[float]:
    """Yield the top-1 accuracy in % of each seed that has finished."""
    for folder in sorted(cell.glob("seed_*")):
        outcome = outcome_in(folder, STAGE)
        if outcome is not None:
            yield outcome.metrics[STAGES[STAGE].metric]


@dataclass(frozen=True)
class GridResult:
    """A grid, and the results that a table shows."""

    grid: Grid  # the cells among which the best is chosen
    score: Score | None  # best cell's accuracy on the test images, and the spread of the grid; None: not evaluated yet


def read_result(folder: Path, name: str, holdout: float) -> GridResult:
    """Return the result of a data set, from the runs that have finished in OUTPUT/LABEL."""
    grid = read_grid(grid_folder(folder, name, holdout))
    if grid.best is None:
        return GridResult(grid, None)
    reported = list(accuracies(cell_folder(reported_folder(folder, name, holdout), grid.best)))
    mean, std = grid.spread or (None, None)
    return GridResult(grid, Score(statistics.mean(reported), "", mean, std) if reported else None)


def prune(folder: Path, keep_best: bool) -> None:
    """Delete the checkpoints of finished cells; `keep_best` spares those of the best or chosen cell."""
    best = read_grid(folder.parent if folder.name == CHOSEN else folder).best
    for point, cell in cell_folders(folder):
        for run in cell.glob("seed_*") if not (keep_best and point == best) else ():
            if outcome_in(run, STAGE) is not None:
                for path in run.glob("checkpoint-*"):
                    path.unlink(missing_ok=True)
