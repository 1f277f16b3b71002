"""Grids of fine-tuning runs over learning rate and weight decay: the cells as runs, and what they came to.

After Kornblith et al., "Do Better ImageNet Models Transfer Better?" (2019), who search logarithmic grids of both,
choose the best cell on images held out of the training set, train it again on all of them and judge it on the test
images. The paper (Tables 2 and 3) reports the maximum, mean and standard deviation of the accuracies of a grid, so that
its cells are judged, and the best is chosen, on the test images. Both ways are here: see `Search.holdout`.

Folders: OUTPUT/LABEL/DATA SET/{test, holdout_SHARE, holdout_SHARE/chosen}/lr_LR-wd_WD/seed_N, one main_finetune.py
each; `chosen` has the best cell of those beside it, trained again on all training images.
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

from util.config.classifier import FinetuneConfig
from util.config.command_line import as_flags, last_value
from util.config.groups import check
from util.data.datasets import published_names
from util.data.splits import split_kind
from util.runtime.errors import UserError
from util.tables.plan import Run, check_outcomes, cut_batch, outcome_in, parse
from util.tables.tables import STAGES, Score
from util.train.classification import open_labelled

STAGE = "finetune"
RECIPE = "transfer_vit_base"
RECIPES = {  # of the data sets that want another one
    **dict.fromkeys(("cifar10", "cifar100"), "transfer_cifar_vit_base"),
    **dict.fromkeys(("inat2018", "inat2019", "inat2021_mini"), "transfer_inat_vit_base"),
}
LRS = ("1.25e-4", "2.5e-4", "5e-4", "1e-3")  # with the three of Table D
WEIGHT_DECAYS = ("0.005", "0.016", "0.05", "0.16")  # with Table D's
CHOSEN = "chosen"
CELL = re.compile(r"lr_(.+)-wd_(.+)")
Point = tuple[float, float]  # learning rate per 256 images, weight decay


# --------------------------------------------------------------------------------------------------------
# What is searched
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
    """What is the same for all data sets."""

    folder: Path  # OUTPUT/LABEL
    finetune: str  # pre-trained weights; empty: from scratch
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    seeds: int
    holdout: float  # share of the training images by which the best cell is chosen; 0: by the images of the test
    extra: tuple[str, ...]  # flags of every run
    processes: int

    @property
    def points(self) -> list[Point]:
        """All cells."""
        return list(itertools.product(self.lrs, self.weight_decays))


def targets(datasets: Sequence[str], data_paths: Sequence[str], recipe: str) -> list[Target]:
    """The data sets that --dataset and --data_path name.

    Raises:
        UserError: they do not go together, or two would share a folder.
    """
    fix = f"give one folder for all, or one for each of --dataset {' '.join(datasets)}"
    check(not datasets or len(data_paths) in (0, 1, len(datasets)), "data_path", data_paths, fix)
    known = published_names()
    check(bool(datasets or data_paths), "dataset", "", f"name data sets ({', '.join(known)}) or --data_path")
    paths = list(data_paths) or [""]
    paths = paths * len(datasets) if len(paths) < len(datasets) else paths
    pairs = list(itertools.zip_longest(datasets, paths, fillvalue=""))
    found = []
    for dataset, path in pairs:
        name = dataset or name_of(Path(path).resolve())
        if not dataset and name in known:  # class folders may hold another part of it: no column of its own
            name += "-files"
        chosen = recipe or RECIPES.get(dataset, RECIPE)
        found.append(Target(re.sub(r"[^\w.-]+", "_", name), dataset, path, chosen))
    names = [target.name for target in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, "dataset" if datasets else "data_path", datasets or data_paths, f"{twice} comes twice")
    return found


def name_of(path: Path) -> str:
    """What plain files are called: as their folder or .tar, above train/ or train.tar."""
    named = path.parent if split_kind(path.name.removesuffix(".tar")) == "train" else path
    return named.name.removesuffix(".tar")


def read_values(flag: str, given: Sequence[str], zero: bool) -> tuple[float, ...]:
    """Numbers as they are, and LOW:HIGH:NUMBER as so many at equal ratios, to three digits.

    Args:
        zero: whether 0 is allowed too.

    Raises:
        UserError: none is given, one is no number, negative or there twice.
    """
    check(bool(given), flag, "", "give one value or more, or LOW:HIGH:NUMBER")
    found: list[float] = []
    for text in given:
        parts = text.split(":")
        try:
            numbers = [float(part) for part in parts[:2]]
            count = int(parts[2]) if len(parts) == 3 else len(parts)
        except ValueError:
            count = 0
        right = count == len(parts) == 1 or (len(parts) == 3 and count >= 2)
        check(right, flag, text, "give a number or LOW:HIGH:NUMBER")
        if len(parts) == 3:
            low, high = numbers
            check(0 < low < high < math.inf, flag, text, "LOW must be above 0 and below HIGH")
            numbers = [float(f"{low * (high / low) ** (i / (count - 1)):.3g}") for i in range(count)]
        for number in numbers:
            right = 0 <= number < math.inf if zero else 0 < number < math.inf
            check(right, flag, text, f"must be {'0 or more' if zero else 'above 0'}, and finite")
        found += numbers
    twice = next((number for number in found if found.count(number) > 1), None)
    check(twice is None, flag, given, f"{twice} comes twice")
    return tuple(sorted(found))


# --------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------


def grid_folder(folder: Path, name: str, holdout: float) -> Path:
    """Of the cells of a data set that are judged in the same way."""
    return folder / name / (f"holdout_{holdout:g}" if holdout else "test")


def judged_folder(folder: Path, name: str, holdout: float) -> Path:
    """Of the cells that were trained on all training images, whose accuracy on the test images is reported."""
    grid = grid_folder(folder, name, holdout)
    return grid / CHOSEN if holdout else grid


def cell_folder(grid: Path, point: Point) -> Path:
    """Of a cell's runs, one per seed."""
    lr, weight_decay = point
    return grid / f"lr_{lr!r}-wd_{weight_decay!r}"


def plan_cells(search: Search, target: Target, points: Sequence[Point], chosen: bool = False) -> list[Run]:
    """A run for each point and seed; the data set is opened, as the runs will.

    Args:
        chosen: whether held-out images have chosen the points, which are now trained on all training images.

    Raises:
        UserError: a flag, recipe or data set is wrong, or other runs have finished in these folders.
    """
    kind, holdout = STAGES[STAGE], 0.0 if chosen else search.holdout
    grid = (judged_folder if chosen else grid_folder)(search.folder, target.name, search.holdout)
    data = {key: value for key, value in (("dataset", target.dataset), ("data_path", target.data_path)) if value}
    shared = ["--recipe", target.recipe, *as_flags(data), *search.extra]
    config: FinetuneConfig = parse(kind.main, tuple(shared))
    check(config.lr is None, "lr", config.lr, "leave it out, the grid sets --blr")
    for flag in ("blr", "weight_decay", "seed", "output_dir", "finetune"):
        given = last_value(flag, search.extra)
        check(not given, flag, given, "is set for each cell, it does not belong to --finetune_flags")
    check(not config.holdout, "holdout", config.holdout, "belongs to this script, not to --finetune_flags")
    changes = cut_batch(config, search.extra, 1, search.processes)
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


def check_same_start(runs: Sequence[Run]) -> None:
    """UserError where what has finished began at another checkpoint, or saw other data."""
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


def note_cells(runs: Sequence[Run]) -> None:
    """Make the folders of all cells, by which it is known how many are meant."""
    for run in runs:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {run.folder}: cannot be written ({error.strerror})") from error


# --------------------------------------------------------------------------------------------------------
# What they came to
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Accuracies in % at the last epoch, per seed, of every cell; none of one that has not finished."""

    cells: Mapping[Point, tuple[float, ...]]

    @property
    def means(self) -> dict[Point, float]:
        """Over the seeds, of the cells that have finished."""
        return {point: statistics.mean(found) for point, found in self.cells.items() if found}

    @property
    def best(self) -> Point | None:
        """The cell with the highest mean, of equal ones that of the lowest learning rate; None: none has finished."""
        means = self.means
        return max(sorted(means), key=means.__getitem__, default=None)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Mean and standard deviation (n - 1) over the cells; None: there are not two."""
        means = list(self.means.values())
        return (statistics.mean(means), statistics.stdev(means)) if len(means) > 1 else None


def read_grid(folder: Path) -> Grid:
    """What is in a folder of cells; empty where there is none."""
    return Grid({point: tuple(accuracies(path)) for point, path in cell_folders(folder)})


def cell_folders(folder: Path) -> Iterator[tuple[Point, Path]]:
    """Each cell and its folder, from the lowest learning rate on."""
    found = []
    for path in folder.glob("lr_*-wd_*"):
        if match := CELL.fullmatch(path.name):
            found.append(((float(match[1]), float(match[2])), path))
    yield from sorted(found)


def accuracies(cell: Path) -> Iterator[float]:
    """Top-1 in % of the seeds that have finished."""
    for folder in sorted(cell.glob("seed_*")):
        outcome = outcome_in(folder, STAGE)
        if outcome is not None:
            yield outcome.metrics[STAGES[STAGE].metric]


@dataclass(frozen=True)
class Result:
    """What a table shows of a data set."""

    grid: Grid  # of the cells by which the best was chosen
    score: Score | None  # accuracy of the best cell on the test images, and the spread of the grid; None: not yet


def result_of(folder: Path, name: str, holdout: float) -> Result:
    """From the runs that have finished in OUTPUT/LABEL."""
    grid = read_grid(grid_folder(folder, name, holdout))
    if grid.best is None:
        return Result(grid, None)
    judged = list(accuracies(cell_folder(judged_folder(folder, name, holdout), grid.best)))
    mean, std = grid.spread or (None, None)
    return Result(grid, Score(statistics.mean(judged), "", mean, std) if judged else None)


def prune(folder: Path, keep_best: bool) -> None:
    """Delete the checkpoints of finished cells, but those of the best one so far, or of the chosen one."""
    best = read_grid(folder.parent if folder.name == CHOSEN else folder).best
    for point, cell in cell_folders(folder):
        for run in cell.glob("seed_*") if not (keep_best and point == best) else ():
            if outcome_in(run, STAGE) is not None:
                for path in run.glob("checkpoint-*"):
                    path.unlink(missing_ok=True)
