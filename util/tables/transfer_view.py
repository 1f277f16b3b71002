"""Results of transfer grids: beside the rows of the paper's Tables 2 and 3, and as heat maps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.data.published import DATASETS
from util.runtime.errors import UserError
from util.tables.formats import TextTable
from util.tables.tables import Row, Table, load_tables
from util.tables.transfer import Grid, GridResult, Point, grid_folder, read_result
from util.tables.view import MISSING, difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_TABLES = ("2", "3")
AVERAGE = "avg"  # column of Table 3: the mean of the others
CELL_INCHES = (0.62, 0.46)  # of a heat map
Results = Mapping[str, Mapping[str, GridResult]]  # by label and data set


def read_results_of_grids(root: Path, holdout: float) -> Results:
    """Return the results of all grids below an --output_dir, in alphabetical order; UserError if there are none."""
    results: dict[str, dict[str, GridResult]] = {}
    for folder in sorted(root.glob(f"*/*/{grid_folder(Path(), '', holdout).name}")):
        label, name = folder.parts[-3:-1]
        results.setdefault(label, {})[name] = read_result(root / label, name, holdout)
    if not results:
        raise UserError(f"--output_dir {root}: holds no grid of --holdout {holdout:g} (LABEL/DATA SET), see `run`")
    return results


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def tables_with_results(results: Results) -> list[tuple[str, TextTable]]:
    """Return heading and table for each table of the paper that has one of the data sets, then for the other sets."""
    names = list(dict.fromkeys(name for by_name in results.values() for name in by_name))
    tables = load_tables()
    shown, others = [], names
    for table in (tables[number] for number in PAPER_TABLES):
        keys = {column.key for column in table.columns}
        if keys & set(names):
            shown.append((table.heading, beside_paper(table, results)))
        others = [name for name in others if name not in keys]
    if others:
        rows = [[label, "ours", *score_strings(others, by_name)] for label, by_name in results.items()]
        rows = [row for row, by_name in zip(rows, results.values(), strict=True) if set(others) & set(by_name)]
        shown.append(("Data sets that the paper does not have", TextTable(["method", "numbers", *others], rows, 2)))
    return shown


def beside_paper(table: Table, results: Results) -> TextTable:
    """Return the paper's rows, then ours and our differences to the paper's row of the same name, else to LUT's."""
    titles = [*table.labels, "numbers", *(column.title for column in table.columns)]
    keys = [column.key for column in table.columns]
    rows = [[*row.labels, "paper", *(str(row.paper.get(key, "")) for key in keys)] for row in table.rows]
    for label, by_name in results.items():
        if not set(keys) & set(by_name):
            continue
        values = values_of(keys, by_name)
        strings = score_strings(keys, by_name)
        if AVERAGE in values:
            strings[keys.index(AVERAGE)] = f"{values[AVERAGE]:.1f}"
        rows.append([label, "ours", *strings])
        row = row_to_compare(table, label)
        paper = {key: row.paper[key].value for key in keys if key in row.paper}
        differences = [difference(values.get(key), paper.get(key)) for key in keys]
        rows.append([label, f"Δ to paper's {row.labels[0]}", *differences])
    return TextTable(titles, rows, 2)


def score_strings(names: Sequence[str], by_name: Mapping[str, GridResult]) -> list[str]:
    """Return best (mean ± std) for each data set, a dash where there is no score yet."""
    return [str(by_name[name].score) if name in by_name and by_name[name].score else MISSING for name in names]


def values_of(keys: Sequence[str], by_name: Mapping[str, GridResult]) -> dict[str, float]:
    """Return our best numbers, and their mean where the table has an average and none of them is missing."""
    values = {key: by_name[key].score.value for key in keys if key in by_name and by_name[key].score}
    others = [key for key in keys if key != AVERAGE]
    if AVERAGE in keys and all(key in values for key in others):
        values[AVERAGE] = statistics.mean(values[key] for key in others)
    return values


def row_to_compare(table: Table, label: str) -> Row:
    """Return the paper's row of this name (without its marks), else LUT's."""
    by_name = {row.labels[0].rstrip("†‡"): row for row in table.rows}
    return by_name.get(label, by_name["LUT"])


# --------------------------------------------------------------------------------------------------------
# Notes
# --------------------------------------------------------------------------------------------------------


def title_of(name: str) -> str:
    """Return the full name of a data set."""
    return DATASETS[name].title if name in DATASETS else name


def choice_images(holdout: float) -> str:
    """Return the images on which the cells are compared, in words."""
    return f"{holdout:.0%} of the training images, held out" if holdout else "the test images"


def explanation(holdout: float) -> str:
    """Return a line that says what our numbers are."""
    spread = "mean ± standard deviation (n - 1) of the grid's accuracies"
    if holdout:
        return (
            f"ours: the cell that is best on {choice_images(holdout)}, trained again on all of them, on the test images"
            f" ({spread} on those held out); top-1 in % at the last epoch"
        )
    return (
        f"ours: best ({spread}), top-1 in % at the last epoch on the test images, which choose the best too, as the"
        " paper's maximum does; --holdout 0.2 chooses on training images"
    )


def grid_notes(results: Results) -> list[str]:
    """Return a line for each grid: how many cells have finished, and where its best cell lies."""
    lines = []
    for label, by_name in results.items():
        for name, result in by_name.items():
            grid, best = result.grid, result.grid.best
            line = f"{label}, {name}: {len(grid.means)} of {len(grid.cells)} cells"
            if best is not None:
                line += f", best at learning rate {best[0]:g}, weight decay {best[1]:g}{edge_remark(best, grid.means)}"
            if best is not None and result.score is None:
                line += "; not yet trained on all training images"
            lines.append(line)
    if any("aircraft" in by_name for by_name in results.values()):
        lines.append("Aircraft: images keep the banner of 20 pixels with the copyright at their lower edge")
    return lines


def edge_remark(best: Point, cells: Mapping[Point, float]) -> str:
    """Return a remark if the best of three or more learning rates is the lowest or highest: a better may lie beyond."""
    lrs = sorted({lr for lr, _ in cells})
    if len(lrs) < 3 or best[0] not in (lrs[0], lrs[-1]):
        return ""
    return f" (the {'lowest' if best[0] == lrs[0] else 'highest'} learning rate: widen --lrs)"


# --------------------------------------------------------------------------------------------------------
# Heat maps
# --------------------------------------------------------------------------------------------------------


def heat_maps(grids: Mapping[str, Grid], title: str, images: str) -> Figure:
    """Return a panel per data set: learning rate to the right, weight decay upwards, accuracy as colour and number.

    Args:
        grids: by the title of the panel.
        images: on which the cells are compared, for the caption.
    """
    from util.figures.figure import new_figure

    axes_of = {name: axes_values(grid) for name, grid in grids.items()}
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    widest = max(len(lrs) for lrs, _ in axes_of.values())
    tallest = max(len(decays) for _, decays in axes_of.values())
    width = max(4.5, columns * (widest * CELL_INCHES[0] + 1.4))
    height = rows * (tallest * CELL_INCHES[1] + 1.1) + 1.2
    caption = (
        f"Top-1 accuracy in % at the last epoch on {images}, mean over the seeds. Frame: the best cell."
        " –: not finished. Each panel has its own colours, from its lowest to its highest number."
    )
    figure = new_figure(width, height, title, caption)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(grids) :]:
        panel.set_visible(False)
    for panel, (name, grid) in zip(panels, grids.items(), strict=False):
        draw_grid(panel, name, grid, *axes_of[name])
    return figure


def axes_values(grid: Grid) -> tuple[list[float], list[float]]:
    """Return the learning rates and the weight decays of all cells."""
    return tuple(sorted({point[i] for point in grid.cells}) for i in (0, 1))


def draw_grid(panel: Axes, name: str, grid: Grid, lrs: Sequence[float], decays: Sequence[float]) -> None:
    """Draw the heat map of one data set."""
    from matplotlib.patches import Rectangle

    from util.figures.figure import ORANGE

    means, best = grid.means, grid.best
    values = np.array([[means.get((lr, decay), np.nan) for lr in lrs] for decay in decays])
    low, high = (np.nanmin(values), np.nanmax(values)) if means else (0.0, 1.0)
    panel.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9), origin="lower", aspect="auto")
    panel.set_facecolor("#EEEEEE")
    for (y, x), value in np.ndenumerate(values):
        dark = not np.isnan(value) and value < low + 0.6 * (high - low)
        text = MISSING if np.isnan(value) else f"{value:.1f}"
        panel.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if best is not None:
        corner = (lrs.index(best[0]) - 0.5, decays.index(best[1]) - 0.5)
        panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False))
    panel.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs], fontsize=7, rotation=30 if len(lrs) > 4 else 0)
    panel.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays], fontsize=7)
    panel.set_xlabel("learning rate per 256 images", fontsize=8)
    panel.set_ylabel("weight decay", fontsize=8)
    panel.set_title(name, fontsize=9)
