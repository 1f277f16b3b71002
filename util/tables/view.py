"""Tables as people see them: the paper's numbers beside those of our runs, as text, Markdown, LaTeX or a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from util.tables.formats import FORMATS
from util.tables.plan import Options, Work, deviations, outcome_in, shared_flags, work_behind
from util.tables.tables import Column, Row, Score, Table

Against = Literal["paper", "baseline"]
MISSING = "–"  # not run, or not to its end
NO_COUNTERPART = "n/a"
MOST_ACROSS = 6  # panels of a picture beside each other


@dataclass(frozen=True)
class Cell:
    """A number of the paper and ours."""

    paper: Score | None
    ours: tuple[float, ...] = ()  # one per seed, in %
    missing: str = ""  # what stands there without any; empty: a competitor's row, or a tool that does not exist

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.mean(self.ours) if self.ours else None

    @property
    def shown(self) -> str:
        """Mean ± standard deviation (n - 1) over the seeds."""
        if not self.ours:
            return self.missing
        spread = f" ± {statistics.stdev(self.ours):.1f}" if len(self.ours) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Filled:
    """A table with what our runs have given."""

    table: Table
    cells: tuple[dict[str, Cell], ...]  # per row, by the column's key
    remarks: tuple[str, ...]  # runs with other settings than planned

    @property
    def baseline(self) -> dict[str, Cell]:
        """The cells of the first row that is ours; empty where none is."""
        rows = zip(self.table.rows, self.cells, strict=True)
        return next((cells for row, cells in rows if row.recipes), {})


def fill(table: Table, options: Options) -> Filled:
    """Collect the results of all seeds there are."""
    remarks: dict[str, None] = {}  # in order, each once
    cells = tuple(
        {column.key: fill_cell(row, column, options, remarks) for column in table.columns} for row in table.rows
    )
    return Filled(table, cells, tuple(remarks))


def fill_cell(row: Row, column: Column, options: Options, remarks: dict[str, None]) -> Cell:
    """One cell; adds a remark for a run that was not as planned."""
    paper = row.paper.get(column.key)
    if not column.stage or column.key not in row.recipes:
        return Cell(paper)
    work = work_behind(row, column, options.scale)
    if work is None:
        return Cell(paper, missing=NO_COUNTERPART)
    return Cell(paper, tuple(results(work, column, options, remarks)), MISSING)


def results(work: Work, column: Column, options: Options, remarks: dict[str, None]) -> list[float]:
    """The column's metric for each seed that has finished."""
    found, stage = [], column.stage
    for folder in sorted((options.folder / options.scale.name / work.name).glob(f"seed_*/{stage}")):
        outcome = outcome_in(folder, stage)
        if outcome is None or column.metric not in outcome.metrics:
            continue
        found.append(outcome.metrics[column.metric])
        others = deviations(shared_flags(work, stage, options)[1], outcome)
        if others:
            remarks[f"{work.name}, {folder.parent.name}, {stage} ran with other settings: {', '.join(others)}"] = None
    return found


def grid(filled: Filled, against: Against) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of strings: labels, then for each column the paper's number, ours, a difference, then seeds.

    Args:
        against: the difference is to the paper; or both the paper's and ours are to the first row of ours, which
            is what compares where data and models are not the paper's.
    """
    titles, rows = list(filled.table.labels), [list(row.labels) for row in filled.table.rows]
    for column in filled.table.columns:
        for title, show in parts(filled, column, against):
            titles.append(", ".join(filter(None, (column.title, title))))
            for shown, cells in zip(rows, filled.cells, strict=True):
                shown.append(show(cells[column.key]))
    if any(column.stage for column in filled.table.columns):
        titles.append("seeds")
        for row, shown, cells in zip(filled.table.rows, rows, filled.cells, strict=True):
            shown.append(seeds(cells, filled.table) if row.recipes else "")
    return titles, rows


def parts(filled: Filled, column: Column, against: Against) -> list[tuple[str, Callable[[Cell], str]]]:
    """What the columns that a column is shown in add to its title, and what each makes of a cell."""
    first = filled.baseline.get(column.key, Cell(None))
    in_paper = any(column.key in row.paper for row in filled.table.rows)
    paper = [("paper", lambda cell: str(cell.paper or ""))] if in_paper else []
    if not column.stage:
        return paper
    ours = "ours" if filled.table.from_paper else ""  # of whom else
    found = [*paper, (ours, lambda cell: cell.shown)]
    if against == "paper":
        return [*found, ("diff.", lambda cell: difference(cell.mean, value(cell.paper)))] if in_paper else found
    if in_paper:
        found.append(("Δ paper", lambda cell: difference(value(cell.paper), value(first.paper), cell is first)))
    return [*found, (f"Δ {ours}".strip(), lambda cell: difference(cell.mean, first.mean, cell is first))]


def value(score: Score | None) -> float | None:
    """The number alone."""
    return None if score is None else score.value


def difference(a: float | None, b: float | None, same: bool = False) -> str:
    """a - b with its sign; empty where one is missing, or both are the same cell."""
    return "" if a is None or b is None or same else f"{a - b:+.1f}"


def seeds(cells: dict[str, Cell], table: Table) -> str:
    """How many there are; the fewest and the most where columns differ."""
    numbers = [len(cells[column.key].ours) for column in table.columns if column.stage]
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}–{max(numbers)}"


def render(filled: Filled, against: Against, style: Literal["text", "markdown", "latex"]) -> str:
    """The whole table."""
    titles, rows = grid(filled, against)
    return FORMATS[style](titles, rows, len(filled.table.labels))


def draw(filled: Filled, against: Against, path: Path) -> None:
    """Draw the paper's numbers and ours (with the spread of the seeds) as points, a panel per column, into a PNG.

    `against` the baseline: their distances from the first row of ours.
    """
    from matplotlib.figure import Figure

    table, columns = filled.table, filled.table.columns
    across = min(len(columns), MOST_ACROSS)
    down = math.ceil(len(columns) / across)
    size = (2 + 3 * across, 0.5 + down * (1 + 0.4 * len(table.rows)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    for panel, column in zip(panels, columns, strict=False):
        first = filled.baseline.get(column.key, Cell(None)) if against == "baseline" else Cell(Score(0.0), (0.0,))
        cells = [(place, row[column.key]) for place, row in enumerate(filled.cells)]
        paper = [(value(cell.paper) - value(first.paper), place) for place, cell in cells if cell.paper and first.paper]
        ours = [
            (cell.mean - first.mean, place, statistics.stdev(cell.ours) if len(cell.ours) > 1 else 0.0)
            for place, cell in cells
            if cell.ours and first.ours
        ]
        panel.plot([x for x, _ in paper], [y - 0.12 for _, y in paper], "s", color="#6c7a92", label="paper")
        x, y, spread = ([point[i] for point in ours] for i in range(3))
        panel.errorbar(x, [place + 0.12 for place in y], xerr=spread, fmt="o", color="#d1495b", capsize=3, label="ours")
        panel.set_title(column.title)
        panel.set_xlabel("%" if against == "paper" else "points above the first row")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(table.rows)), [row.name for row in table.rows])
    panels[0].set_ylim(len(table.rows) - 0.5, -0.5)
    panels[0].legend(fontsize=8)
    figure.suptitle(table.heading.partition(";")[0], fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
