"""Table 5 with our models' rows below the paper's, made of the lines of results.jsonl."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.results.results import read_results
from util.robustness.sets import COLUMNS
from util.tables.formats import TextTable
from util.tables.tables import Row, Table, find_tables
from util.tables.view import MISSING, Cell, Filled
from util.weights.checkpoint import BEST
from util.weights.vit import TIMM

if TYPE_CHECKING:
    from util.robustness.scores import Example

STAGE = "robustness"  # of the lines in results.jsonl
IDENTITY = ("checkpoint", "sha256", "weights", "num_heads", "input_size")  # settings that tell models apart
NOT_COMPARED = {*IDENTITY, "label", "column", "num_images"}  # a difference in any other setting is named
MARK = "*"  # of numbers that have a remark
ON_VALIDATION = ("in1k", "real", "cocc", "o")  # columns with images by which checkpoint-best was chosen
CORRECT, WRONG, NEITHER = "#2E8B57", "#C0392B", "#BBBBBB"  # frames of examples

# --------------------------------------------------------------------------------------------------------
# Lines of results.jsonl
# --------------------------------------------------------------------------------------------------------


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of results.jsonl that this program wrote, oldest first."""
    return [line for line in read_results(folder) if line["stage"] == STAGE]


def main_metric(key: str, line: Mapping[str, Any]) -> float:
    """Return the number that Table 5 prints, in %."""
    return line["metrics"]["aupr" if key == "o" else "top1"]


def without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a number depends on; not the model's label, nor the path of a file with a `sha256`."""
    path = {} if config["checkpoint"].startswith(TIMM) else {"checkpoint": ""}
    return {**config, "label": "", **path}


def find_line(lines: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest line with these settings, whatever the label and path of the model; None if there is none."""
    wanted = without_names(settings)
    return next((line for line in reversed(lines) if without_names(line["config"]) == wanted), None)


# --------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelResults:
    """The finished columns of a model."""

    label: str
    lines: Mapping[str, Mapping[str, Any]]  # by column: the line of results.jsonl that is shown
    others: Mapping[str, Sequence[Mapping[str, Any]]]  # by column: lines with other settings and another number

    def cell(self, key: str) -> str:
        """Return the number, marked if it has a remark, or a dash."""
        if key not in self.lines:
            return MISSING
        return f"{main_metric(key, self.lines[key]):.1f}{MARK if self.remark(key) else ''}"

    def remark(self, key: str) -> str:
        """Return how the images differ from the published set, and the numbers with other settings; often empty."""
        line = self.lines[key]
        unreadable = round(line["metrics"]["bad_images"])
        images = [line["config"]["lacking"], f"{unreadable} unreadable images left out" if unreadable else ""]
        parts = [", ".join(filter(None, images))]
        for other in self.others[key]:
            shown, hidden = line["config"], other["config"]
            names = [name for name in shown if name not in NOT_COMPARED and shown[name] != hidden.get(name)]
            ours, others = (", ".join(f"{name} {config.get(name)}" for name in names) for config in (shown, hidden))
            parts.append(f"with {ours}; {main_metric(key, other):.1f} with {others}")
        return "; ".join(filter(None, parts))

    @property
    def chosen_on(self) -> list[str]:
        """Return the columns with images by which this checkpoint was chosen as the best of its run."""
        lines = {key: self.lines[key] for key in ON_VALIDATION if key in self.lines}
        return [key for key, line in lines.items() if Path(line["config"]["checkpoint"]).name == BEST]


def read_models(folder: Path, wanted: Sequence[Mapping[str, Any]] = ()) -> list[ModelResults]:
    """Return all models of results.jsonl in order, under their last labels; equal labels are made to differ.

    Args:
        wanted: settings whose lines are shown; otherwise the newest line of a column is.
    """
    models: dict[tuple, dict[str, list[Any]]] = {}
    labels: dict[tuple, str] = {}
    asked = [without_names(settings) for settings in wanted]
    for line in read_lines(folder):
        config = line["config"]
        settings = without_names(config)
        identity = tuple(str(settings[name]) for name in IDENTITY)
        lines = models.setdefault(identity, {}).setdefault(config["column"], [])
        lines[:] = [*(each for each in lines if without_names(each["config"]) != settings), line]
        labels[identity] = config["label"]
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    results = []
    for identity, columns in models.items():
        checkpoint, digest, weights, _, size = identity
        more = f" ({digest[:8] or checkpoint}, {weights}, {size})" if labels[identity] in shared else ""
        shown, others = {}, {}
        for key, lines in columns.items():
            shown[key] = ([line for line in lines if without_names(line["config"]) in asked] or lines)[-1]
            others[key] = [line for line in lines if main_metric(key, line) != main_metric(key, shown[key])]
        results.append(ModelResults(labels[identity] + more, shown, others))
    return results


# --------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------


def paper_table() -> Table:
    """Return Table 5 of the paper."""
    return find_tables("5")[0]


def column_titles() -> dict[str, str]:
    """Return the titles of Table 5's columns."""
    return {column.key: column.title for column in paper_table().columns}


def text_table(models: Sequence[ModelResults]) -> TextTable:
    """Return the paper's rows, then one per model."""
    table = paper_table()
    keys = [column.key for column in table.columns]
    rows = [[*row.labels, "paper", *(str(row.paper.get(key, "")) for key in keys)] for row in table.rows]
    rows += [[model.label, "ours", *map(model.cell, keys)] for model in models]
    return TextTable([*table.labels, "numbers", *column_titles().values()], rows, 2)


def filled_table(models: Sequence[ModelResults]) -> Filled:
    """Return the same rows as numbers, for a picture."""
    table = paper_table()
    rows = [dataclasses.replace(row, labels=(*row.labels, "paper")) for row in table.rows]
    cells = [{key: Cell(row.paper.get(key)) for key in COLUMNS} for row in table.rows]
    for model in models:
        rows.append(Row((model.label, "ours"), paper={}, recipes={}, flags={}, epochs_times=1))
        numbers = {key: (main_metric(key, line),) for key, line in model.lines.items()}
        cells.append({key: Cell(None, numbers.get(key, ())) for key in COLUMNS})
    return Filled(dataclasses.replace(table, rows=tuple(rows)), tuple(cells), remarks=())


def table_notes(models: Sequence[ModelResults]) -> list[str]:
    """Return the lines below the table: units, remarks on single numbers, and what else a reader must know."""
    titles = column_titles()
    lines = ["top-1 accuracy in %, of IN-O AUPR in %; –: not evaluated"]
    for model in models:
        remarks = {key: model.remark(key) for key in COLUMNS if key in model.lines}
        lines += [f"{MARK} {titles[key]} of {model.label}: {remark}" for key, remark in remarks.items() if remark]
    for model in models:
        if model.chosen_on:
            columns = ", ".join(titles[key] for key in model.chosen_on)
            lines.append(f"{model.label}: {BEST} was chosen on ImageNet's validation images, which {columns} score too")
    auroc = [f"{model.label} {model.lines['o']['metrics']['auroc']:.1f}" for model in models if "o" in model.lines]
    if auroc:
        lines.append(f"AUROC of IN-O, which the paper's numbers look like: {', '.join(auroc)}")
    return lines


def draw_examples(rows: Mapping[str, Sequence[Example]], label: str, path: Path) -> None:
    """Draw a row of images for each column, as the model sees them, with its predictions, into a PNG."""
    from util.figures.figure import DPI, picture_grid
    from util.figures.figure import Cell as Picture
    from util.robustness.imagenet import class_names
    from util.tables.pictures import save_picture

    titles, names = column_titles(), class_names()
    cells = [
        [
            Picture(
                example.image,
                title=textwrap.shorten(names[example.predicted], 22, placeholder="…"),
                frame=CORRECT if example.predicted in example.answer else WRONG if example.answer else NEITHER,
            )
            for example in examples
        ]
        for examples in rows.values()
    ]
    caption = "Above each image the prediction. Green: correct, red: wrong, grey: an outlier, which has no class."
    figure = picture_grid(cells, [], [titles[key] for key in rows], f"What {label} sees", caption)
    save_picture(figure, path, DPI)
