"""Pictures of tables: points of a table, curves of its pre-trainings; files that a full disk leaves as they were."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.results.curves import METRICS
from util.results.run_folder import RunFolder, read_run
from util.runtime.errors import UserError
from util.runtime.files import write_durably
from util.runtime.logs import LOG_FILE
from util.tables.cost import flops_per_image
from util.tables.plan import Options, Run, plan_runs
from util.tables.tables import PRETRAIN, Score, Table
from util.tables.view import Against, Cell, Filled, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ACROSS = 6  # panels of a picture beside each other
DPI = 110
ROW_COLOURS = ("#6c7a92", "#2e4057", "#d1495b", "#edae49", "#00798c", "#8f5db7", "#5a9367", "#b56576")
CURVES = ("mim", "bc", "knn")


def save_picture(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a PNG beside `path` and rename it, so that a full disk leaves an older picture whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda file: file.write(content.getvalue()))


# --------------------------------------------------------------------------------------------------------
# Points
# --------------------------------------------------------------------------------------------------------


def draw_points(filled: Filled, against: Against, path: Path) -> None:
    """Draw the paper's numbers and ours (with the spread of the seeds) as points, a panel per column, into a PNG.

    Args:
        against: paper: the numbers themselves. baseline: their distances from the first row of ours.
    """
    from matplotlib.figure import Figure

    table, columns = filled.table, filled.table.columns
    across = min(len(columns), MOST_ACROSS)
    down = math.ceil(len(columns) / across)
    size = (2 + 3 * across, 0.5 + down * (1 + 0.4 * len(table.rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    for panel, column in zip(panels, columns, strict=False):
        first = filled.baseline.get(column.key, Cell(None)) if against == "baseline" else Cell(Score(0.0), (0.0,))
        draw_column(panel, [row[column.key] for row in filled.cells], first)
        panel.set_title(column.title)
        panel.set_xlabel("%" if against == "paper" else "points above the first row")
    panels[0].set_yticks(range(len(table.rows)), [row.name for row in table.rows])
    panels[0].set_ylim(len(table.rows) - 0.5, -0.5)
    panels[0].legend(fontsize=8)
    figure.suptitle(table.heading.partition(";")[0], fontsize=10)
    save_picture(figure, path)


def draw_column(panel: Axes, cells: Sequence[Cell], first: Cell) -> None:
    """Draw the numbers of a column relative to the cell `first`, one row below the other."""
    paper = [(value(cell.paper) - value(first.paper), i) for i, cell in enumerate(cells) if cell.paper and first.paper]
    ours = [(cell.mean - first.mean, i, cell) for i, cell in enumerate(cells) if cell.ours and first.ours]
    spread = [statistics.stdev(cell.ours) if len(cell.ours) > 1 else 0.0 for *_, cell in ours]
    panel.plot([x for x, _ in paper], [i - 0.12 for _, i in paper], "s", color="#6c7a92", label="paper")
    panel.errorbar(
        [x for x, *_ in ours],
        [i + 0.12 for _, i, _ in ours],
        xerr=spread,
        fmt="o",
        color="#d1495b",
        capsize=3,
        label="ours",
    )
    panel.grid(alpha=0.3)


# --------------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCurves:
    """The pre-trainings behind a row, one per seed that has a log."""

    name: str
    runs: Sequence[Run]
    logs: Sequence[RunFolder]

    @property
    def with_epochs(self) -> list[RunFolder]:
        """Return the logs whose number of updates per epoch is known."""
        return [log for log in self.logs if log.updates_per_epoch]

    def over_epochs(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return epochs [n] and values [seeds, n] at the updates that all seeds have; None without such a metric."""
        curves = [log.curves[metric] for log in self.with_epochs if metric in log.curves]
        if not curves:
            return None
        steps = curves[0].steps
        for curve in curves[1:]:
            steps = np.intersect1d(steps, curve.steps)
        values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
        return steps / self.with_epochs[0].updates_per_epoch, values * METRICS[metric].scale

    def flops_per_epoch(self) -> float:
        """Return the FLOP of matrix products, forward and backward."""
        run, updates = self.runs[0], self.with_epochs[0].updates_per_epoch
        return run.config.batch_size * run.config.accum_iter * run.processes * updates * flops_per_image(run)


def row_curves(table: Table, options: Options) -> list[RowCurves]:
    """Return the curves of each row of the table that has a log; UserError if none has."""
    curves: list[RowCurves] = []
    for row in table.rows:
        runs = plan_runs([dataclasses.replace(table, rows=(row,))], options)
        runs = [run for run in runs if run.stage == PRETRAIN and (run.folder / LOG_FILE).is_file()]
        if runs:
            curves.append(RowCurves(row.name, runs, [read_run(run.folder, run.title) for run in runs]))
    if not curves:
        raise UserError(f"--curves: no pre-training of table {table.name} has a log in {options.folder}")
    return curves


def draw_curves(table: Table, options: Options, path: Path) -> None:
    """Draw losses and kNN of the pre-trainings over epochs, and kNN over cost, into a PNG.

    Each row is a line, the mean of its seeds, in a band from the lowest to the highest of them.
    """
    from matplotlib.figure import Figure

    from util.figures.figure import number_log_axis

    rows = row_curves(table, options)
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for number, row in enumerate(rows):
        turn, colour = divmod(number, len(ROW_COLOURS))
        line = dict(color=ROW_COLOURS[colour], linestyle=("-", "--")[turn % 2])
        line["label"] = f"{row.name} ({len(row.logs)} seed{'s' * (len(row.logs) > 1)})"
        for panel, metric in zip(panels, CURVES, strict=False):
            draw_band(panel, row.over_epochs(metric), 1.0, line)
        if all(log.updates_per_epoch for log in row.logs):
            draw_band(panels[3], row.over_epochs("knn"), row.flops_per_epoch() / 1e12, line)
    for panel, metric in zip(panels, (*CURVES, "knn"), strict=True):
        title, unit = METRICS[metric].title, METRICS[metric].unit
        panel.set_title(f"{title}, {unit}" if unit else title)
        panel.set_xlabel("epochs")
        panel.grid(alpha=0.3)
    panels[1].set_yscale("log")  # distances of different kinds: InfoNCE is some ten times the cosine's
    number_log_axis(panels[1])
    panels[3].set_xlabel("10¹² FLOP of matrix products")
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{table.name}, --scale {options.scale.name}", fontsize=10)
    save_picture(figure, path)


def draw_band(panel: Axes, curve: tuple[np.ndarray, np.ndarray] | None, per_epoch: float, line: dict) -> None:
    """Draw the mean of the seeds and their band; `per_epoch`: units of the x axis in an epoch."""
    if curve is None:
        return
    epochs, values = curve
    x = epochs * per_epoch
    panel.plot(x, values.mean(axis=0), **line)
    panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=line["color"], alpha=0.2, linewidth=0)
