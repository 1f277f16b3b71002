"""Tables with the paper's numbers beside those of our runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from util.tables.formats import TextTable
from util.tables.outcomes import deviations, outcome_in
from util.tables.plan import Options, Work, shared_flags, work_behind
from util.tables.tables import TOOLS, Column, Row, Score, Table

Against = Literal["paper", "baseline"]
MISSING = "–"  # not run, or not to its end
NO_COUNTERPART = "n/a"


@dataclass(frozen=True)
class Cell:
    """A number of the paper and ours."""

    paper: Score | None
    ours: tuple[float, ...] = ()  # one per seed, in %
    missing: str = ""  # shown where there is none; empty for a competitor's row or another tool's column

    @property
    def mean(self) -> float | None:
        """Return the mean over the seeds."""
        return statistics.mean(self.ours) if self.ours else None

    @property
    def shown(self) -> str:
        """Return mean ± standard deviation (n - 1) over the seeds."""
        if not self.ours:
            return self.missing
        spread = f" ± {statistics.stdev(self.ours):.1f}" if len(self.ours) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Filled:
    """A table with the results of our runs."""

    table: Table
    cells: tuple[dict[str, Cell], ...]  # per row, by the column's key
    remarks: tuple[str, ...]  # runs with other settings than planned

    @property
    def baseline(self) -> dict[str, Cell]:
        """Return the cells of the first row that is ours, empty if none is."""
        rows = zip(self.table.rows, self.cells, strict=True)
        return next((cells for row, cells in rows if row.recipes), {})


def fill(table: Table, options: Options) -> Filled:
    """Return the table with the results of all seeds that have finished."""
    remarks: dict[str, None] = {}  # in order, each once
    cells = tuple(
        {column.key: fill_cell(row, column, options, remarks) for column in table.columns} for row in table.rows
    )
    return Filled(table, cells, tuple(remarks))


def fill_cell(row: Row, column: Column, options: Options, remarks: dict[str, None]) -> Cell:
    """Return one cell, and add a remark for each of its runs that was not as planned."""
    paper = row.paper.get(column.key)
    if not column.stage or column.key not in row.recipes:
        return Cell(paper)
    work = work_behind(row, column, options.scale)
    if work is None:
        return Cell(paper, missing=NO_COUNTERPART)
    return Cell(paper, tuple(finished_seeds(work, column, options, remarks)), MISSING)


def finished_seeds(work: Work, column: Column, options: Options, remarks: dict[str, None]) -> list[float]:
    """Return the column's metric for each seed that has finished."""
    values, stage = [], column.stage
    for folder in sorted((options.folder / options.scale.name / work.name).glob(f"seed_*/{stage}")):
        outcome = outcome_in(folder, stage)
        if outcome is None or column.metric not in outcome.metrics:
            continue
        values.append(outcome.metrics[column.metric])
        others = deviations(shared_flags(work, stage, options)[1], outcome)
        if others:
            remarks[f"{work.name}, {folder.parent.name}, {stage} ran with other settings: {', '.join(others)}"] = None
    return values


# --------------------------------------------------------------------------------------------------------
# Strings
# --------------------------------------------------------------------------------------------------------


def grid(filled: Filled, against: Against) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of strings: labels, then the paper's number, ours and a difference per column, then seeds.

    Args:
        against: paper: the difference is ours to the paper's. baseline: there are two, of the paper's and of our
            number to the first row of ours, which is comparable where data and models are not the paper's.
    """
    titles, rows = list(filled.table.labels), [list(row.labels) for row in filled.table.rows]
    for column in filled.table.columns:
        for title, show in subcolumns(filled, column, against):
            titles.append(", ".join(filter(None, (column.title, title))))
            for row, cells in zip(rows, filled.cells, strict=True):
                row.append(show(cells[column.key]))
    if any(column.stage for column in filled.table.columns):
        titles.append("seeds")
        for row, strings, cells in zip(filled.table.rows, rows, filled.cells, strict=True):
            strings.append(count_seeds(cells, filled.table) if row.recipes else "")
    return titles, rows


def subcolumns(filled: Filled, column: Column, against: Against) -> list[tuple[str, Callable[[Cell], str]]]:
    """Return what a column is split into: what is added to its title, and the string that is shown of a cell."""
    first = filled.baseline.get(column.key, Cell(None))
    in_paper = any(column.key in row.paper for row in filled.table.rows)
    paper = [("paper", lambda cell: str(cell.paper or ""))] if in_paper else []
    if not column.stage:
        return paper
    ours = "ours" if filled.table.from_paper else ""  # all numbers of our own tables are ours
    numbers = [*paper, (ours, lambda cell: cell.shown)]
    if against == "paper":
        difference_to_paper = ("diff.", lambda cell: difference(cell.mean, value(cell.paper)))
        return [*numbers, difference_to_paper] if in_paper else numbers
    if in_paper:
        numbers.append(("Δ paper", lambda cell: difference(value(cell.paper), value(first.paper), cell is first)))
    return [*numbers, (f"Δ {ours}".strip(), lambda cell: difference(cell.mean, first.mean, cell is first))]


def value(score: Score | None) -> float | None:
    """Return the number of a score."""
    return None if score is None else score.value


def difference(a: float | None, b: float | None, same: bool = False) -> str:
    """Return a - b with its sign; empty if one is missing or both are the same cell."""
    return "" if a is None or b is None or same else f"{a - b:+.1f}"


def count_seeds(cells: dict[str, Cell], table: Table) -> str:
    """Return the number of finished seeds, as least–most where columns differ."""
    numbers = [len(cells[column.key].ours) for column in table.columns if column.stage]
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}–{max(numbers)}"


def text_table(filled: Filled, against: Against) -> TextTable:
    """Return the whole table, ready to be rendered."""
    return TextTable(*grid(filled, against), len(filled.table.labels))


def explanations(table: Table, options: Options, against: Against) -> list[str]:
    """Return lines that say what our numbers are, and which of the table's there are not."""
    lines = []
    if any(column.stage for column in table.columns):
        lines.append(
            f"ours: --scale {options.scale.name} ({options.scale.description}); accuracy of the last epoch in %, mean ±"
            " standard deviation over the seeds; –: not run or not to its end"
        )
        if against == "baseline":
            lines.append("Δ: points above the first row of ours (and of the paper's numbers in that row)")
    return lines + not_run([table], options)


def not_run(tables: Sequence[Table], options: Options) -> list[str]:
    """Return lines that name the columns, rows and cells which `tables.py run` does not run, and why."""
    lines = []
    for table in tables:
        by_tool: dict[str, list[str]] = {}
        for column in table.columns:
            if column.needs:
                by_tool.setdefault(column.needs, []).append(column.title)
        for tool, titles in by_tool.items():
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
