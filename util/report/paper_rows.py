"""Which rows of the paper's tables given runs belong to, and the tables with their results filled in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.config.command_line import as_flags, parse_config, recipe_chain
from util.data.datasets import published_names
from util.report.parts import data_of
from util.results.run_folder import RunFolder, as_number, read_mapping
from util.runtime.errors import UserError
from util.tables.outcomes import Outcome, deviations, outcome_in
from util.tables.plan import Options, read_scale, work_behind
from util.tables.schema import read_yaml
from util.tables.tables import ALL_STAGES, FOLDER, PRETRAIN, SEGMENT, STAGES, Column, Row, Table, load_tables
from util.tables.view import MISSING, Against, Cell, Filled, fill, grid


@dataclass(frozen=True)
class Shown:
    """A table as a page shows it."""

    heading: str
    rows: list[list[str]]  # the first one are heads
    marked: list[int]  # rows of the runs, counted without the heads
    remarks: tuple[str, ...]
    notes: tuple[str, ...]  # of the table itself


@dataclass(frozen=True)
class Place:
    """Where a run stands in the tables."""

    run: RunFolder
    stage: str  # of ALL_STAGES
    recipe: str  # of its pre-training
    pretraining: dict  # the settings of that; empty where they cannot be found


def paper_tables(runs: Sequence[RunFolder]) -> tuple[list[Shown], list[str]]:
    """Every table that a run belongs to, by its recipe or as one of the runs of scripts/tables.py.

    Also what to say of the runs that belong to none.
    """
    tables = load_tables()
    paper = [with_segmentation(table) for table in tables.values() if table.from_paper]
    studies: dict[tuple[str, Path], set[str]] = {}  # scale and folder of scripts/tables.py -> names of work
    places: list[Place] = []
    homeless: list[str] = []
    for run in runs:
        if (study := study_of(run)) is not None:
            studies.setdefault(study[:2], set()).add(study[2])
        elif (place := place_of(run)) is not None and any(row_of(t, place) for t in paper):
            places.append(place)
        else:
            recipe = f"recipe {place.recipe}" if place else "no known recipe"
            homeless.append(f"{run.label} ({measured_elsewhere(run) or recipe})")
    shown = [found for key, work in studies.items() for found in of_study(tables, *key, work)]
    shown += [by_recipe(table, places) for table in paper if any(row_of(table, place) for place in places)]
    return shown, homeless


# --------------------------------------------------------------------------------------------------------
# Runs of scripts/tables.py, which its folders name
# --------------------------------------------------------------------------------------------------------


def study_of(run: RunFolder) -> tuple[str, Path, str] | None:
    """Scale, folder of all scales and name of the work, where the run lies as scripts/tables.py puts it."""
    parts = run.path.resolve().parts
    if len(parts) < 5 or parts[-1] not in STAGES or not re.fullmatch(r"seed_\d+", parts[-2]):
        return None
    scale, work = parts[-4], parts[-3]
    return (scale, Path(*parts[:-4]), work) if scale in read_yaml(FOLDER / "scales.yaml") else None


def of_study(tables: dict[str, Table], scale_name: str, folder: Path, names: set[str]) -> list[Shown]:
    """The tables that hold the work, with all runs of the folder."""
    options = Options(read_scale(scale_name), folder)

    def is_meant(row: Row, column: Column) -> bool:
        work = work_behind(row, column, options.scale)
        return work is not None and work.name in names

    found = []
    for table in tables.values():
        marked = [i for i, row in enumerate(table.rows) if any(is_meant(row, column) for column in table.columns)]
        if marked:
            against: Against = "paper" if scale_name == "paper" and table.from_paper else "baseline"
            found.append(as_shown(fill(table, options), against, marked, f", scale {scale_name}"))
    return found


# --------------------------------------------------------------------------------------------------------
# Single runs, which their recipe names
# --------------------------------------------------------------------------------------------------------


# settings of a segmentation that name its data, without which they are not valid
MASKED_DATA = ("data_path", "train_images", "train_masks", "val_images", "val_masks")


def with_segmentation(table: Table) -> Table:
    """With the columns that need `segmentation` as those of the stage that gives them."""
    columns = [
        dataclasses.replace(column, stage=SEGMENT) if column.needs == "segmentation" else column
        for column in table.columns
    ]
    return dataclasses.replace(table, columns=tuple(columns))


def measured_elsewhere(run: RunFolder) -> str:
    """On what, where it is not the images that the columns of its stage are about; empty: it may be these.

    Transfer learning and a share held out of the training images have numbers of their own, each cell of a grid one.
    """
    recipe = Path(str(run.config.get("recipe") or "")).stem
    if run.stage == SEGMENT:
        here = recipe.startswith("segment_")
        return "" if here else f"segmentation of {data_of(run)}, {f'recipe {recipe}' if recipe else 'no recipe'}"
    if run.stage not in ("finetune", "linprobe"):
        return ""
    held_out = as_number(run.config.get("holdout")) or 0
    if held_out > 0:
        return f"judged by a share of {held_out:g} of the training images of {data_of(run)}"
    transfer = recipe.startswith("transfer_") or str(run.config.get("dataset")) in published_names()
    return f"transfer to {data_of(run)}" if transfer else ""


def place_of(run: RunFolder) -> Place | None:
    """By its recipe, or that of the pre-training that it started from; None: neither names one, or it is no row's."""
    if measured_elsewhere(run):
        return None
    if run.stage == PRETRAIN:
        stage, settings = PRETRAIN, run.config
    elif run.stage in ("finetune", "linprobe", SEGMENT):
        stage, start = run.stage, str(run.config.get("finetune") or "")
        if stage == "linprobe" and run.config.get("global_pool") and not run.config.get("cls_token"):
            stage = "linprobe_pooled"
        settings = read_mapping(Path(start).parent / "config.yaml", []) if start else {}
    else:
        return None
    recipe = str(settings.get("recipe") or "")
    return Place(run, stage, recipe, settings) if recipe else None


def row_of(table: Table, place: Place) -> list[tuple[int, Column]]:
    """The cells that the run belongs to: those of its stage, or for a pre-training all that start from it."""
    return [
        (number, column)
        for number, row in enumerate(table.rows)
        if not row.flags and row.epochs_times == 1
        for column in table.columns
        if row.recipes.get(column.key) == place.recipe and place.stage in (PRETRAIN, column.stage)
    ]


def by_recipe(table: Table, places: Sequence[Place]) -> Shown:
    """A table with the results of these runs."""
    ours: dict[tuple[int, str], list[float]] = {}
    marked: set[int] = set()
    remarks: dict[str, None] = {}
    for place in places:
        cells = row_of(table, place)
        marked |= {number for number, _ in cells}
        outcome = outcome_in(place.run.path, place.stage)
        for number, column in cells:
            metric = column.metric or ALL_STAGES[place.stage].metric
            if column.stage == place.stage and outcome is not None and metric in outcome.metrics:
                ours.setdefault((number, column.key), []).append(outcome.metrics[metric])
        if cells:
            remarks |= dict.fromkeys(differences(place))
    filled = tuple(
        {
            column.key: Cell(
                row.paper.get(column.key),
                tuple(ours.get((number, column.key), ())),
                MISSING if number in marked and column.stage else "",
            )
            for column in table.columns
        }
        for number, row in enumerate(table.rows)
    )
    return as_shown(Filled(table, filled, tuple(remarks)), "paper", sorted(marked), "")


def differences(place: Place) -> list[str]:
    """In which settings the run and its pre-training are others than their recipes say, and what they saw."""
    run = place.run
    found = [] if run.finished else [f"{run.label} has not finished"]
    parts = [(PRETRAIN, "pre-training", place.pretraining)]
    if place.stage != PRETRAIN:
        parts.append((place.stage, place.stage.partition("_")[0], run.config))
    for stage, name, settings in parts:
        recipe, kind = str(settings.get("recipe") or ""), ALL_STAGES[stage]
        if not recipe:
            found.append(f"{run.label}, {name}: no recipe of the paper's")
            continue
        try:
            recipe_chain(recipe)
            data = {key: settings[key] for key in MASKED_DATA if stage == SEGMENT and settings.get(key)}
            planned = parse_config(kind.settings, ["--recipe", recipe, *as_flags(data)], kind.program)
        except UserError as error:
            found.append(f"{run.label}, {name}: {error}")
            continue
        others = deviations(planned, Outcome({}, settings))
        if others:
            found.append(f"{run.label}, {name} with other settings than {recipe}: {', '.join(others)}")
    return [*found, f"{run.label} was measured on {data_of(run) or 'digits'}"]


def as_shown(filled: Filled, against: Against, marked: Sequence[int], where: str) -> Shown:
    """As strings."""
    titles, rows = grid(filled, against)
    table = filled.table
    return Shown(f"{table.heading}{where}", [titles, *rows], list(marked), filled.remarks, table.notes)
