"""Transfer results as people see them: beside the rows of the paper's Tables 2 and 3, and as heat maps of the grids."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from util.figures.figure import ORANGE, new_figure
from util.tables.formats import FORMATS
from util.tables.tables import Row, Table
from util.tables.transfer import Grid, Result
from util.tables.view import MISSING, difference

AVERAGE = "avg"  # column of Table 3, of the others
Results = Mapping[str, Mapping[str, Result]]  # by label and data set
CELL_INCHES = (0.62, 0.46)  # of a heat map


@dataclass(frozen=True)
class Comparison:
    """Titles and rows of strings, labels first."""

    titles: list[str]
    rows: list[list[str]]

    def render(self, style: str) -> str:
        """As text, Markdown or LaTeX."""
        return FORMATS[style](self.titles, self.rows, 2)


def beside_paper(table: Table, results: Results) -> Comparison:
    """The rows of the paper, then ours and their differences to the row of the same name, LUT's for other labels."""
    titles = [*table.labels, "numbers", *(column.title for column in table.columns)]
    keys = [column.key for column in table.columns]
    rows = [[*row.labels, "paper", *(str(row.paper.get(key, "")) for key in keys)] for row in table.rows]
    for label, found in results.items():
        if not set(keys) & set(found):
            continue
        values = values_of(keys, found)
        shown = [str(found[key].score) if key in found and found[key].score else MISSING for key in keys]
        if AVERAGE in values:
            shown[keys.index(AVERAGE)] = f"{values[AVERAGE]:.1f}"
        rows.append([label, "ours", *shown])
        row = counterpart(table, label)
        paper = {key: row.paper[key].value for key in keys if key in row.paper}
        differences = [difference(values.get(key), paper.get(key)) for key in keys]
        rows.append([label, f"Δ to paper's {row.labels[0]}", *differences])
    return Comparison(titles, rows)


def values_of(keys: Sequence[str], found: Mapping[str, Result]) -> dict[str, float]:
    """Our best numbers, and their mean where none is missing."""
    values = {key: found[key].score.value for key in keys if key in found and found[key].score}
    others = [key for key in keys if key != AVERAGE]
    if AVERAGE in keys and all(key in values for key in others):
        values[AVERAGE] = statistics.mean(values[key] for key in others)
    return values


def counterpart(table: Table, label: str) -> Row:
    """The row that ours is compared with; the paper's marks are not part of its name."""
    by_name = {row.labels[0].rstrip("†‡"): row for row in table.rows}
    return by_name.get(label, by_name["LUT"])


def alone(names: Sequence[str], results: Results) -> Comparison:
    """Data sets that the paper has not."""
    rows = [
        [label, "ours", *(str(found[name].score) if name in found and found[name].score else MISSING for name in names)]
        for label, found in results.items()
        if set(names) & set(found)
    ]
    return Comparison(["method", "numbers", *names], rows)


# --------------------------------------------------------------------------------------------------------
# Heat maps
# --------------------------------------------------------------------------------------------------------


def heat_maps(grids: Mapping[str, Grid], title: str, judged: str) -> Figure:
    """A panel for each data set: learning rate to the right, weight decay upwards, accuracy as colour and number.

    Args:
        grids: by the title of the panel.
        judged: on which images, for the caption.
    """
    axes_of = {name: axes_values(grid) for name, grid in grids.items()}
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    widest = max(len(lrs) for lrs, _ in axes_of.values())
    tallest = max(len(decays) for _, decays in axes_of.values())
    width = max(4.5, columns * (widest * CELL_INCHES[0] + 1.4))
    height = rows * (tallest * CELL_INCHES[1] + 1.1) + 1.2
    caption = (
        f"Top-1 accuracy in % at the last epoch on {judged}, mean over the seeds. Frame: the best cell."
        " –: not finished. Colours are each panel's own, from its lowest to its highest number."
    )
    figure = new_figure(width, height, title, caption)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(grids) :]:
        panel.set_visible(False)
    for panel, (name, grid) in zip(panels, grids.items(), strict=False):
        draw_grid(panel, name, grid, *axes_of[name])
    return figure


def axes_values(grid: Grid) -> tuple[list[float], list[float]]:
    """Learning rates and weight decays of all cells."""
    return tuple(sorted({point[i] for point in grid.cells}) for i in (0, 1))


def draw_grid(panel: Axes, name: str, grid: Grid, lrs: Sequence[float], decays: Sequence[float]) -> None:
    """One data set."""
    means, best = grid.means, grid.best
    values = np.array([[means.get((lr, decay), np.nan) for lr in lrs] for decay in decays])
    low, high = (np.nanmin(values), np.nanmax(values)) if means else (0.0, 1.0)
    panel.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9), origin="lower", aspect="auto")
    panel.set_facecolor("#EEEEEE")
    for (y, x), value in np.ndenumerate(values):
        dark = not np.isnan(value) and value < low + 0.6 * (high - low)
        shown = MISSING if np.isnan(value) else f"{value:.1f}"
        panel.text(x, y, shown, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if best is not None:
        corner = (lrs.index(best[0]) - 0.5, decays.index(best[1]) - 0.5)
        panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False))
    panel.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs], fontsize=7, rotation=30 if len(lrs) > 4 else 0)
    panel.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays], fontsize=7)
    panel.set_xlabel("learning rate per 256 images", fontsize=8)
    panel.set_ylabel("weight decay", fontsize=8)
    panel.set_title(name, fontsize=9)
