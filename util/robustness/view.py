"""Table 5 with our models' rows under the paper's."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.figures.figure import Cell as Picture
from util.figures.figure import picture_grid, save_figure
from util.results.results import read_results
from util.robustness.imagenet import class_names
from util.robustness.scores import Example
from util.robustness.sets import COLUMNS
from util.tables.formats import FORMATS
from util.tables.tables import Row, Table, find_tables
from util.tables.view import MISSING, Cell, Filled, draw
from util.weights.vit import TIMM

STAGE = "robustness"  # of the lines in results.jsonl
IDENTITY = ("checkpoint", "sha256", "weights", "num_heads", "input_size")  # what makes a row of the table
NOT_SETTINGS = {*IDENTITY, "label", "column", "num_images"}  # what else differs makes another measurement
PARTIAL = "*"


@dataclass(frozen=True)
class Ours:
    """A model's finished columns."""

    label: str
    lines: Mapping[str, Mapping[str, Any]]  # by column: the line of results.jsonl that is shown
    others: Mapping[str, Sequence[Mapping[str, Any]]]  # by column: those with other settings and another number

    def shown(self, key: str) -> str:
        """A cell: the number, marked where there is something to say of it."""
        if key not in self.lines:
            return MISSING
        return f"{main_metric(key, self.lines[key]):.1f}{PARTIAL if self.remark(key) else ''}"

    def remark(self, key: str) -> str:
        """Why a number is not that of the published set, and what it is with other settings; empty: nothing."""
        line = self.lines[key]
        said = [remark_on(line)]
        for other in self.others[key]:
            here, there = line["config"], other["config"]
            names = [name for name in here if name not in NOT_SETTINGS and here[name] != there.get(name)]
            own, its = (", ".join(f"{name} {config.get(name)}" for name in names) for config in (here, there))
            said.append(f"with {own}; {main_metric(key, other):.1f} with {its}")
        return "; ".join(filter(None, said))


def main_metric(key: str, line: Mapping[str, Any]) -> float:
    """The number that Table 5 prints, in %."""
    return line["metrics"]["aupr" if key == "o" else "top1"]


def remark_on(line: Mapping[str, Any]) -> str:
    """Why a number is not that of the published set; empty: it is."""
    bad = round(line["metrics"]["bad_images"])
    parts = [line["config"]["lacking"], f"{bad} unreadable images left out" if bad else ""]
    return ", ".join(filter(None, parts))


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl that are ours, oldest first."""
    return [line for line in read_results(folder) if line["stage"] == STAGE]


def without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a number depends on: neither what the model was called, nor where the file lies that `sha256` tells."""
    path = {} if config["checkpoint"].startswith(TIMM) else {"checkpoint": ""}
    return {**config, "label": "", **path}


def finished(lines: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest line with these settings, whatever the model and its file were called, or None."""
    found = [line for line in lines if without_names(line["config"]) == without_names(settings)]
    return found[-1] if found else None


def read_ours(folder: Path, wanted: Sequence[Mapping[str, Any]] = ()) -> list[Ours]:
    """All models of results.jsonl in the order in which they came, by their last names, which are made to differ.

    Args:
        wanted: settings whose lines are shown; of what they do not name it is the newest line.
    """
    models: dict[tuple, dict[str, list[Any]]] = {}
    labels: dict[tuple, str] = {}
    asked = [without_names(settings) for settings in wanted]
    for line in read_lines(folder):
        config = line["config"]
        named = without_names(config)
        identity = tuple(str(named[name]) for name in IDENTITY)
        lines = models.setdefault(identity, {}).setdefault(config["column"], [])
        lines[:] = [*(each for each in lines if without_names(each["config"]) != named), line]
        labels[identity] = config["label"]
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    ours = []
    for identity, lines in models.items():
        checkpoint, digest, weights, _, size = identity
        more = f" ({digest[:8] or checkpoint}, {weights}, {size})" if labels[identity] in shared else ""
        shown, others = {}, {}
        for key, found in lines.items():
            now = [each for each in found if without_names(each["config"]) in asked]
            shown[key] = (now or found)[-1]
            others[key] = [each for each in found if main_metric(key, each) != main_metric(key, shown[key])]
        ours.append(Ours(labels[identity] + more, shown, others))
    return ours


def table_with(ours: Sequence[Ours]) -> Filled:
    """The paper's rows, then ours."""
    table = find_tables("5")[0]
    rows = [dataclasses.replace(row, labels=(*row.labels, "paper")) for row in table.rows]
    rows += [Row((model.label, "ours"), paper={}, recipes={}, flags={}, epochs_times=1) for model in ours]
    cells = [{key: Cell(row.paper.get(key)) for key in COLUMNS} for row in table.rows]
    cells += [
        {key: Cell(None, (main_metric(key, model.lines[key]),) if key in model.lines else ()) for key in COLUMNS}
        for model in ours
    ]
    table = dataclasses.replace(table, labels=(*table.labels, "numbers"), rows=tuple(rows))
    return Filled(table, tuple(cells), remarks=())


def render_with(ours: Sequence[Ours], style: str) -> str:
    """The table as text, Markdown or LaTeX: Table 5's columns, a number each."""
    filled = table_with(ours)
    table: Table = filled.table
    shown = [[str(cells[column.key].paper or "") for column in table.columns] for cells in filled.cells]
    shown[len(shown) - len(ours) :] = [[model.shown(column.key) for column in table.columns] for model in ours]
    titles = [*table.labels, *(column.title for column in table.columns)]
    return FORMATS[style](titles, [[*row.labels, *cells] for row, cells in zip(table.rows, shown, strict=True)], 2)


def remarks_on(ours: Sequence[Ours]) -> list[str]:
    """What a reader of the table must know, a line each."""
    titles = column_titles()
    return [
        f"{PARTIAL} {titles[key]} of {model.label}: {model.remark(key)}"
        for model in ours
        for key in COLUMNS
        if key in model.lines and model.remark(key)
    ]


def column_titles() -> dict[str, str]:
    """What Table 5 calls its columns."""
    return {column.key: column.title for column in find_tables("5")[0].columns}


def draw_with(ours: Sequence[Ours], path: Path) -> None:
    """A panel per column, a point per row, into a PNG."""
    draw(table_with(ours), "paper", path)


def draw_examples(rows: Mapping[str, Sequence[Example]], label: str, path: Path) -> None:
    """A row of images for each column, as the model sees them, with what it says, into a PNG."""
    titles, names = column_titles(), class_names()
    cells = [
        [
            Picture(
                example.image,
                title=textwrap.shorten(names[example.said], 22, placeholder="…"),
                frame="#2E8B57" if example.said in example.right else "#BBBBBB" if not example.right else "#C0392B",
            )
            for example in examples
        ]
        for examples in rows.values()
    ]
    caption = "Above each image what the model says; green: right, red: wrong, grey: an outlier, of no class."
    save_figure(picture_grid(cells, [], [titles[key] for key in rows], f"What {label} sees", caption), path)
