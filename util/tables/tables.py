"""The paper's tables and our own: what each row is called, the paper's numbers, and the run of ours behind them.

They are read from tables/paper.yaml and tables/study.yaml; the top of paper.yaml describes the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.config.command_line import MAINS
from util.runtime.errors import UserError, nearest
from util.runtime.files import ROOT
from util.tables.schema import Key, check_mapping, one_of, read_yaml

FOLDER = ROOT / "tables"
FILES = ("paper.yaml", "study.yaml")
TOOLS = {  # that give the numbers which `tables.py run` does not
    "segmentation": "main_segment.py",
    "transfer": "scripts/transfer.py",
    "robustness": "scripts/robustness.py",
}
SCORE = re.compile(r"(\d{1,2}\.\d)([†‡]?)(?: \((\d{1,2}\.\d) ± (\d\.\d)\))?")


@dataclass(frozen=True)
class Stage:
    """A kind of run, and the number of its `results.jsonl` that goes into a table."""

    main: str  # of MAINS; its results.jsonl names it as the stage
    flags: Mapping[str, Any] = field(default_factory=dict)  # on top of its recipe's

    @property
    def settings(self) -> type:
        """Return the dataclass of the main's settings."""
        return MAINS[self.main].settings

    @property
    def metric(self) -> str:
        """Return the name of the main's metric in results.jsonl."""
        return MAINS[self.main].metric

    @property
    def program(self) -> str:
        """Return the path of the main, relative to the checkout."""
        return MAINS[self.main].program


PRETRAIN, SEGMENT, PROBE = "pretrain", "segment", "probe"
_FEATURES = {"encoders": ["student", "momentum"], "labels_per_class": 0}
STAGES = {  # that `tables.py run` runs
    PRETRAIN: Stage("pretrain"),
    "finetune": Stage("finetune"),
    "linprobe": Stage("linprobe", {"global_pool": False}),
    "linprobe_pooled": Stage("linprobe", {"global_pool": True}),
    "probe": Stage(PROBE, {"pool": "avg", **_FEATURES}),
    "probe_cls": Stage(PROBE, {"pool": "token", **_FEATURES}),
}
ALL_STAGES = STAGES | {SEGMENT: Stage("segment")}  # and the one behind the columns that need `segmentation`


@dataclass(frozen=True)
class Score:
    """A number of the paper, in %."""

    value: float
    mark: str = ""  # † multi-crop, ‡ reproduced
    mean: float | None = None  # of a grid search whose best is `value`
    std: float | None = None

    def __str__(self) -> str:
        grid = "" if self.mean is None else f" ({self.mean:.1f} ± {self.std:.1f})"
        return f"{self.value:.1f}{self.mark}{grid}"


@dataclass(frozen=True)
class Column:
    """One number per row."""

    key: str
    title: str
    stage: str = ""  # of STAGES; empty: none of them gives it
    metric: str = ""  # of the stage's `results.jsonl`
    needs: str = ""  # the tool of TOOLS that gives it


@dataclass(frozen=True)
class Row:
    """A row's labels, the paper's numbers, and the runs that give ours."""

    labels: tuple[str, ...]
    paper: Mapping[str, Score]  # by the column's key; numbers that the paper lacks are absent
    recipes: Mapping[str, str]  # recipe of our pre-training by the column's key; empty for a competitor's row
    flags: Mapping[str, Any]  # of the pre-training, on top of its recipe
    epochs_times: float  # factor on the epochs of the pre-training

    @property
    def name(self) -> str:
        """Return the labels in one line."""
        return " ".join(label for label in self.labels if label)


@dataclass(frozen=True)
class Table:
    """A table as it is printed."""

    name: str
    title: str
    backbone: str
    epochs: str
    labels: tuple[str, ...]  # titles of the columns that name a row
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    seeds: int  # runs per row, unless --seeds says otherwise

    @property
    def heading(self) -> str:
        """Return name, title, backbone and epochs in one line."""
        epochs = f"{self.epochs} epochs" if self.epochs.isdigit() else f"epochs {self.epochs}"
        return f"{f'Table {self.name}' if self.from_paper else self.name}: {self.title}; {self.backbone}; {epochs}"

    @property
    def from_paper(self) -> bool:
        """True if the paper has numbers for it."""
        return any(row.paper for row in self.rows)


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------

TEXT = Key(str, "must be text, in quotes")
LIST = Key(list, "must be a list")
TABLE_KEYS = {
    **dict.fromkeys(("title", "backbone", "epochs"), TEXT),
    **dict.fromkeys(("labels", "rows"), LIST),
    "columns": Key(dict, "must be a mapping"),
    "notes": Key(list, "must be a list", default=()),
    "seeds": Key(int, "must be 1 or more", default=1, accepts=lambda seeds: seeds >= 1),
}
COLUMN_KEYS = {
    "title": TEXT,
    "ours": one_of("stage", STAGES),
    "metric": Key(str, "must be text", default=""),
    "needs": one_of("tool", TOOLS),
}
RUN_KEYS = {  # of a row, beside its labels and numbers
    "run": Key((str, dict), "must name a recipe", default=None),
    "flags": Key(dict, "must be a mapping", default={}),
    "epochs_times": Key((int, float), "must be above 0", default=1, accepts=lambda factor: factor > 0),
}


def find_tables(name: str) -> list[Table]:
    """Return the table of that name, or 4a to 4f for 4; UserError if there is none or a file holds a mistake."""
    tables = load_tables()
    by_name = {known.lower(): table for known, table in tables.items()}
    if name.lower() in by_name:
        return [by_name[name.lower()]]
    if parts := [table for known, table in tables.items() if name.isdigit() and known[:-1] == name]:
        return parts
    raise UserError(f"TABLE {name}: unknown{nearest(name, tables)} (one of {', '.join(tables)}; 4 for 4a to 4f)")


def load_tables(folder: Path | None = None) -> dict[str, Table]:
    """Return all tables by their names, read from `folder` (default: FOLDER)."""
    return {
        str(name): read_table(f"{file}, table {name}", str(name), content)
        for file in FILES
        for name, content in read_yaml((folder or FOLDER) / file).items()
    }


def read_table(where: str, name: str, content: Any) -> Table:
    """Return a table made of its part of a file; errors begin with `where` it stands."""
    values = check_mapping(where, content, TABLE_KEYS)
    columns = tuple(read_column(f"{where}, column {key}", key, column) for key, column in values["columns"].items())
    rows: list[Row] = []
    for number, row in enumerate(values["rows"], start=1):
        rows.append(read_row(f"{where}, row {number}", values["labels"], columns, row))
        if rows[-1].labels in [other.labels for other in rows[:-1]]:
            raise UserError(f"{where}, row {number}: {rows[-1].name} is twice")
    values |= {key: tuple(values[key]) for key in ("labels", "notes")}
    return Table(name=name, **values | {"columns": columns, "rows": tuple(rows)})


def read_column(where: str, key: str, content: Any) -> Column:
    """Return a column made of its title and the source of our number."""
    values = check_mapping(where, content, COLUMN_KEYS)
    stage, needs = values["ours"], values["needs"]
    if bool(stage) == bool(needs):
        raise UserError(f"{where}: give one of ours and needs")
    if values["metric"] and not stage:
        raise UserError(f"{where}: metric needs ours")
    return Column(key, values["title"], stage, values["metric"] or (STAGES[stage].metric if stage else ""), needs)


def read_row(where: str, labels: Sequence[str], columns: Sequence[Column], content: Any) -> Row:
    """Return a row made of its labels, numbers and runs."""
    keys = [column.key for column in columns]
    number = Key(object, "", default=None)
    values = check_mapping(where, content, dict.fromkeys(labels, TEXT) | dict.fromkeys(keys, number) | RUN_KEYS)
    run = values["run"] or {}
    if isinstance(run, str):
        run = dict.fromkeys(keys, run)
    check_mapping(where, run, dict.fromkeys(keys, Key(str, "must name a recipe", default="")))
    if not run and (values["flags"] or values["epochs_times"] != 1):
        raise UserError(f"{where}: flags and epochs_times need run")
    return Row(
        labels=tuple(values[label] for label in labels),
        paper={key: read_score(f"{where}, {key}", values[key]) for key in keys if values[key] is not None},
        recipes=run,
        flags=values["flags"],
        epochs_times=values["epochs_times"],
    )


def read_score(where: str, number: Any) -> Score:
    """Return a number as the paper prints it; UserError where it is written otherwise."""
    match = SCORE.fullmatch(str(number))
    if match is None:
        raise UserError(f"{where}: {number} is not written as 82.8, 82.8† or 69.8 (68.6 ± 0.9)")
    value, mark, mean, std = match.groups()
    return Score(float(value), mark, *(None if x is None else float(x) for x in (mean, std)))
