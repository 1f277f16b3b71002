"""The curves of a table's pre-trainings as a picture: losses and kNN over the epochs, and kNN over what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.figures.figure import number_log_axis
from util.results.curves import METRICS
from util.results.run_folder import RunFolder, read_run
from util.runtime.errors import UserError
from util.runtime.logs import LOG_FILE
from util.tables.plan import Options, Run, flops_per_image, plan_runs
from util.tables.tables import PRETRAIN, Table

ROW_COLOURS = ("#6c7a92", "#2e4057", "#d1495b", "#edae49", "#00798c", "#8f5db7", "#5a9367", "#b56576")
SHOWN = ("mim", "bc", "knn")


@dataclass(frozen=True)
class RowCurves:
    """The pre-trainings behind a row: one log per seed, as far as it has come."""

    name: str
    plans: Sequence[Run]
    logs: Sequence[RunFolder]

    @property
    def begun(self) -> list[RunFolder]:
        """The logs that say by now how many updates an epoch has."""
        return [log for log in self.logs if log.updates_per_epoch]

    def over_epochs(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Epochs [n] and values [seeds, n], at the updates that all seeds have; None: not in their logs."""
        curves = [log.curves[metric] for log in self.begun if metric in log.curves]
        if not curves:
            return None
        steps = curves[0].steps
        for curve in curves[1:]:
            steps = np.intersect1d(steps, curve.steps)
        values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
        return steps / self.begun[0].updates_per_epoch, values * METRICS[metric].scale

    def flops_per_epoch(self) -> float:
        """Matrix products, forward and backward."""
        config, per_epoch = self.plans[0].config, self.begun[0].updates_per_epoch
        images = config.batch_size * config.accum_iter * self.plans[0].processes * per_epoch
        return images * flops_per_image(self.plans[0])


def row_curves(table: Table, options: Options) -> list[RowCurves]:
    """Of each row of the table that has a log.

    Raises:
        UserError: none has.
    """
    found: list[RowCurves] = []
    for row in table.rows:
        alone = dataclasses.replace(table, rows=(row,))
        plans = [run for run in plan_runs([alone], options) if run.stage == PRETRAIN]
        plans = [run for run in plans if (run.folder / LOG_FILE).is_file()]
        if plans:
            found.append(RowCurves(row.name, plans, [read_run(run.folder, run.title) for run in plans]))
    if not found:
        raise UserError(f"--curves: no pre-training of table {table.name} has a log in {options.folder}")
    return found


def draw_curves(table: Table, options: Options, path: Path) -> None:
    """A line per row, the mean of its seeds in a band from the lowest to the highest of them, as a PNG."""
    from matplotlib.figure import Figure

    rows = row_curves(table, options)
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for number, row in enumerate(rows):
        look = dict(color=ROW_COLOURS[number % len(ROW_COLOURS)], linestyle=("-", "--")[number // len(ROW_COLOURS) % 2])
        label = f"{row.name} ({len(row.logs)} seed{'s' * (len(row.logs) > 1)})"
        for panel, metric in zip(panels, SHOWN, strict=False):
            draw_row(panel, row.over_epochs(metric), 1.0, label, look)
        if all(log.updates_per_epoch for log in row.logs):
            draw_row(panels[3], row.over_epochs("knn"), row.flops_per_epoch() / 1e12, label, look)
    for panel, metric in zip(panels, (*SHOWN, "knn"), strict=True):
        about = METRICS[metric]
        panel.set_title(f"{about.title}{f', {about.unit}' * bool(about.unit)}")
        panel.set_xlabel("epochs")
        panel.grid(alpha=0.3)
    panels[1].set_yscale("log")  # distances of different kinds: InfoNCE is some ten times the cosine's
    number_log_axis(panels[1])
    panels[3].set_xlabel("10¹² FLOP of matrix products")
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{table.name}, --scale {options.scale.name}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_row(panel, curve: tuple[np.ndarray, np.ndarray] | None, per_epoch: float, label: str, look: dict) -> None:
    """The mean of the seeds, and their band."""
    if curve is None:
        return
    epochs, values = curve
    x = epochs * per_epoch
    panel.plot(x, values.mean(axis=0), label=label, **look)
    panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.2, linewidth=0)
