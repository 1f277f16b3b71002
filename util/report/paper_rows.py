"""The paper's tables in a report: which rows the runs belong to, and these tables with the runs' results."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.config.command_line import as_flags, parse_config, recipe_chain
from util.data.datasets import published_names
from util.report.summary import data_of
from util.results.run_folder import RunFolder, read_run
from util.runtime.errors import UserError
from util.runtime.reading import as_number
from util.tables.outcomes import Outcome, deviations, outcome_in
from util.tables.plan import Options, read_scale, work_behind
from util.tables.schema import read_yaml
from util.tables.tables import ALL_STAGES, FOLDER, PRETRAIN, SEGMENT, STAGES, Column, Row, Table, load_tables
from util.tables.view import MISSING, Against, Cell, Filled, fill, grid

SEGMENT_RECIPES = ("segment_vit_small", "segment_vit_base", "segment_vit_large")  # on ADE20K
TRANSFER_RECIPES = ("transfer_vit_base", "transfer_inat_vit_base", "transfer_cifar_vit_base", "transfer_nano")
# settings of a segmentation that name its data, without which they are not valid
SEGMENT_DATA = ("data_path", "train_images", "train_masks", "val_images", "val_masks")


@dataclass(frozen=True)
class ShownTable:
    """A table as the page shows it."""

    heading: str
    rows: list[list[str]]  # the first one is the head
    marked: list[int]  # rows of the runs, counted without the head
    remarks: tuple[str, ...]
    notes: tuple[str, ...]  # of the table itself


@dataclass(frozen=True)
class Place:
    """A run that may belong to the tables."""

    run: RunFolder
    stage: str  # of ALL_STAGES
    pretraining: RunFolder  # the run itself, or the one whose checkpoint it started from


def paper_tables(runs: Sequence[RunFolder]) -> tuple[list[ShownTable], list[str]]:
    """Return every table that a run belongs to, by its recipe or as one of the runs of scripts/tables.py.

    The second value names the runs that belong to none, with the reason.
    """
    tables = load_tables()
    paper = [with_segmentation(table) for table in tables.values() if table.from_paper]
    studies: dict[tuple[str, Path], set[str]] = {}  # scale and folder of scripts/tables.py -> names of work
    places: list[Place] = []
    homeless: list[str] = []
    for run in runs:
        if (study := study_of(run)) is not None:
            studies.setdefault(study[:2], set()).add(study[2])
            continue
        place = place_of(run)
        if place is not None and any(cells_of(table, place) for table in paper):
            places.append(place)
        else:
            recipe = f"recipe {place.pretraining.recipe}" if place else "no known recipe"
            homeless.append(f"{run.label} ({measured_elsewhere(run) or recipe})")
    shown = [table for key, names in studies.items() for table in study_tables(tables, *key, names)]
    shown += [fill_by_recipe(table, places) for table in paper if any(cells_of(table, place) for place in places)]
    return shown, homeless


# --------------------------------------------------------------------------------------------------------
# Runs of scripts/tables.py, known by their folders
# --------------------------------------------------------------------------------------------------------


def study_of(run: RunFolder) -> tuple[str, Path, str] | None:
    """Return scale, folder of all scales and name of the work, if the run lies where scripts/tables.py puts it."""
    parts = run.path.resolve().parts
    if len(parts) < 5 or parts[-1] not in STAGES or not re.fullmatch(r"seed_\d+", parts[-2]):
        return None
    scale, work = parts[-4], parts[-3]
    return (scale, Path(*parts[:-4]), work) if scale in read_yaml(FOLDER / "scales.yaml") else None


def study_tables(tables: dict[str, Table], scale_name: str, folder: Path, names: set[str]) -> list[ShownTable]:
    """Return the tables that have the named work in a cell, with all runs of the folder."""
    options = Options(read_scale(scale_name), folder)

    def is_ours(row: Row, column: Column) -> bool:
        work = work_behind(row, column, options.scale)
        return work is not None and work.name in names

    shown = []
    for table in tables.values():
        marked = [i for i, row in enumerate(table.rows) if any(is_ours(row, column) for column in table.columns)]
        if marked:
            against: Against = "paper" if scale_name == "paper" and table.from_paper else "baseline"
            shown.append(as_strings(fill(table, options), against, marked, f", scale {scale_name}"))
    return shown


# --------------------------------------------------------------------------------------------------------
# Single runs, known by their recipe
# --------------------------------------------------------------------------------------------------------


def with_segmentation(table: Table) -> Table:
    """Return the table with the columns that need `segmentation` as columns of that stage."""
    columns = [
        dataclasses.replace(column, stage=SEGMENT) if column.needs == "segmentation" else column
        for column in table.columns
    ]
    return dataclasses.replace(table, columns=tuple(columns))


def measured_elsewhere(run: RunFolder) -> str:
    """Return why a run's number is not one of its stage's columns; empty if it may be.

    Transfer learning has tables of its own, and a share held out of the training images is no test.
    """
    if run.stage == SEGMENT:
        recipe = f"recipe {run.recipe}" if run.recipe else "no recipe"
        return "" if run.recipe in SEGMENT_RECIPES else f"segmentation of {data_of(run)}, {recipe}"
    if run.stage not in ("finetune", "linprobe"):
        return ""
    held_out = as_number(run.config.get("holdout")) or 0
    if held_out > 0:
        return f"judged by a share of {held_out:g} of the training images of {data_of(run)}"
    transfer = run.recipe in TRANSFER_RECIPES or str(run.config.get("dataset")) in published_names()
    return f"transfer to {data_of(run)}" if transfer else ""


def place_of(run: RunFolder) -> Place | None:
    """Return the run with its pre-training; None if that has no recipe, or the run was measured elsewhere."""
    if measured_elsewhere(run):
        return None
    if run.stage == PRETRAIN:
        place = Place(run, PRETRAIN, run)
    elif run.stage in ("finetune", "linprobe", SEGMENT) and run.config.get("finetune"):
        pooled = run.config.get("global_pool") and not run.config.get("cls_token")
        stage = "linprobe_pooled" if run.stage == "linprobe" and pooled else run.stage
        place = Place(run, stage, read_run(Path(str(run.config["finetune"])).parent, "pre-training"))
    else:
        return None
    return place if place.pretraining.recipe else None


def cells_of(table: Table, place: Place) -> list[tuple[int, Column]]:
    """Return the cells that a run belongs to: those of its stage, or for a pre-training all that start from it."""
    return [
        (number, column)
        for number, row in enumerate(table.rows)
        if not row.flags and row.epochs_times == 1
        for column in table.columns
        if row.recipes.get(column.key) == place.pretraining.recipe and place.stage in (PRETRAIN, column.stage)
    ]


def fill_by_recipe(table: Table, places: Sequence[Place]) -> ShownTable:
    """Return a table with the results of these runs."""
    results: dict[tuple[int, str], list[float]] = {}
    marked: set[int] = set()
    remarks: dict[str, None] = {}
    for place in places:
        cells = cells_of(table, place)
        marked |= {number for number, _ in cells}
        outcome = outcome_in(place.run.path, place.stage)
        for number, column in cells:
            metric = column.metric or ALL_STAGES[place.stage].metric
            if column.stage == place.stage and outcome is not None and metric in outcome.metrics:
                results.setdefault((number, column.key), []).append(outcome.metrics[metric])
        if cells:
            remarks |= dict.fromkeys(differences(place))
    filled = tuple(
        {
            column.key: Cell(
                row.paper.get(column.key),
                tuple(results.get((number, column.key), ())),
                MISSING if number in marked and column.stage else "",
            )
            for column in table.columns
        }
        for number, row in enumerate(table.rows)
    )
    return as_strings(Filled(table, filled, tuple(remarks)), "paper", sorted(marked), "")


def differences(place: Place) -> list[str]:
    """Return how the run and its pre-training differ from their recipes, and which data the run was measured on."""
    run = place.run
    remarks = [] if run.finished else [f"{run.label} has not finished"]
    stages = [(PRETRAIN, "pre-training", place.pretraining)]
    if place.stage != PRETRAIN:
        stages.append((place.stage, place.stage.partition("_")[0], run))
    for stage, name, done in stages:
        kind = ALL_STAGES[stage]
        if not done.recipe:
            remarks.append(f"{run.label}, {name}: has no recipe of the paper")
            continue
        try:
            recipe_chain(done.recipe)
            data = {key: done.config[key] for key in SEGMENT_DATA if stage == SEGMENT and done.config.get(key)}
            planned = parse_config(kind.settings, ["--recipe", done.recipe, *as_flags(data)], kind.program)
        except UserError as error:
            remarks.append(f"{run.label}, {name}: {error}")
            continue
        others = deviations(planned, Outcome({}, done.config))
        if others:
            remarks.append(f"{run.label}, {name} with other settings than {done.recipe}: {', '.join(others)}")
    return [*remarks, f"{run.label} was measured on {data_of(run) or 'digits'}"]


def as_strings(filled: Filled, against: Against, marked: Sequence[int], scale: str) -> ShownTable:
    """Return a filled table as the page shows it."""
    titles, rows = grid(filled, against)
    table = filled.table
    return ShownTable(f"{table.heading}{scale}", [titles, *rows], list(marked), filled.remarks, table.notes)
