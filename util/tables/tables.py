"""The paper's tables and our own: what a row is called, the paper's numbers, and which run of ours belongs to it.

tables/paper.yaml and tables/study.yaml hold them; their description stands at the top of the first.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from util.config.command_line import MAINS
from util.runtime.errors import UserError, nearest
from util.runtime.files import ROOT

FOLDER = ROOT / "tables"
FILES = ("paper.yaml", "study.yaml")
TOOLS = {  # what gives numbers that `tables.py run` does not
    "segmentation": "main_segment.py",
    "transfer": "scripts/transfer.py",
    "robustness": "scripts/robustness.py",
}
SCORE = re.compile(r"(\d{1,2}\.\d)([†‡]?)(?: \((\d{1,2}\.\d) ± (\d\.\d)\))?")


@dataclass(frozen=True)
class Stage:
    """A kind of run, and which number of its `results.jsonl` goes into a table."""

    main: str  # of MAINS, and the stage that its results.jsonl names
    flags: Mapping[str, Any] = field(default_factory=dict)  # on top of its recipe's

    @property
    def settings(self) -> type:
        """See Main."""
        return MAINS[self.main].settings

    @property
    def metric(self) -> str:
        """See Main."""
        return MAINS[self.main].metric

    @property
    def program(self) -> str:
        """See Main."""
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
    mean: float | None = None  # of a grid search, of which `value` is the best
    std: float | None = None

    def __str__(self) -> str:
        searched = "" if self.mean is None else f" ({self.mean:.1f} ± {self.std:.1f})"
        return f"{self.value:.1f}{self.mark}{searched}"


@dataclass(frozen=True)
class Column:
    """One number per row."""

    key: str
    title: str
    stage: str = ""  # of STAGES; empty: none of them gives it
    metric: str = ""  # of the stage's `results.jsonl`
    needs: str = ""  # the tool of TOOLS that gives it, or would


@dataclass(frozen=True)
class Row:
    """What a row is called, and where its numbers are from."""

    labels: tuple[str, ...]
    paper: Mapping[str, Score]  # by the column's key; a number that the paper lacks is not there
    recipes: Mapping[str, str]  # pre-training of ours behind each column; empty for a competitor's row
    flags: Mapping[str, Any]  # of the pre-training, on top of its recipe
    epochs_times: float  # factor on the epochs of the pre-training

    @property
    def name(self) -> str:
        """The labels in one line."""
        return " ".join(label for label in self.labels if label)


@dataclass(frozen=True)
class Table:
    """A table as it is printed."""

    name: str
    title: str
    backbone: str
    epochs: str
    labels: tuple[str, ...]  # titles of the columns that say what a row is
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    seeds: int  # runs per row, unless --seeds says otherwise

    @property
    def heading(self) -> str:
        """What it is, in one line."""
        epochs = f"{self.epochs} epochs" if self.epochs.isdigit() else f"epochs {self.epochs}"
        return f"{f'Table {self.name}' if self.from_paper else self.name}: {self.title}; {self.backbone}; {epochs}"

    @property
    def from_paper(self) -> bool:
        """Whether the paper has it."""
        return any(row.paper for row in self.rows)


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


def find_tables(name: str) -> list[Table]:
    """The table of that name, or all of 4a to 4f for 4.

    Raises:
        UserError: there is none, or a file of them holds a mistake.
    """
    tables = load_tables()
    by_name = {known.lower(): table for known, table in tables.items()}
    if name.lower() in by_name:
        return [by_name[name.lower()]]
    if found := [table for known, table in tables.items() if name.isdigit() and known[:-1] == name]:
        return found
    raise UserError(f"TABLE {name}: unknown{nearest(name, tables)} (one of {', '.join(tables)}; 4 for 4a to 4f)")


def load_tables(folder: Path | None = None) -> dict[str, Table]:
    """All tables by their names, of FOLDER unless another one is given."""
    folder = folder or FOLDER
    return {
        name: read_table(f"{file}, table {name}", name, plain)
        for file in FILES
        for name, plain in read_yaml(folder / file).items()
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of names from a YAML file, in which no key may come twice."""
    try:
        plain = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path.name}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    return mapping(path.name, plain, known=None)


class UniqueKeys(yaml.SafeLoader):
    """YAML by which a number written twice is a mistake; SafeLoader would take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader, with an error that names the key and its line."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_table(where: str, name: str, plain: Any) -> Table:
    """A table from its part of the file; `where` it stands begins every error."""
    known = ("title", "backbone", "epochs", "labels", "columns", "rows", "notes", "seeds")
    plain = mapping(where, plain, known, required=known[:-2])
    columns = tuple(read_column(f"{where}, column {key}", key, column) for key, column in plain["columns"].items())
    labels = tuple(plain["labels"])
    rows = tuple(read_row(f"{where}, row {i}", labels, columns, row) for i, row in enumerate(plain["rows"], start=1))
    for i, row in enumerate(rows):
        expect(row.labels not in [other.labels for other in rows[:i]], f"{where}, row {i + 1}", f"{row.name} is twice")
    seeds, notes = plain.get("seeds", 1), plain.get("notes", [])
    expect(isinstance(seeds, int) and seeds >= 1, where, f"seeds {seeds} must be 1 or more")
    expect(isinstance(notes, list), where, "notes must be a list")
    texts = {key: plain[key] for key in known[:3]}
    for key, text in texts.items():
        expect(isinstance(text, str), where, f"{key} {text} must be text")
    return Table(name=str(name), **texts, labels=labels, columns=columns, rows=rows, notes=tuple(notes), seeds=seeds)


def read_column(where: str, key: str, plain: Any) -> Column:
    """`title`, and where our number comes from."""
    plain = mapping(where, plain, ("title", "ours", "metric", "needs"), required=("title",))
    stage, needs = plain.get("ours", ""), plain.get("needs", "")
    expect(bool(stage) != bool(needs), where, "give one of ours and needs")
    expect(not stage or stage in STAGES, where, f"ours {stage} is no stage{nearest(stage, STAGES)}")
    expect(not needs or needs in TOOLS, where, f"needs {needs} is no tool{nearest(needs, TOOLS)}")
    expect(bool(stage) or "metric" not in plain, where, "metric needs ours")
    metric = plain.get("metric", STAGES[stage].metric if stage else "")
    return Column(key, plain["title"], stage, metric, needs)


def read_row(where: str, labels: Sequence[str], columns: Sequence[Column], plain: Any) -> Row:
    """Labels, numbers, and what to run for it."""
    keys = [column.key for column in columns]
    plain = mapping(where, plain, (*labels, *keys, "run", "flags", "epochs_times"), required=labels)
    for label in labels:
        expect(isinstance(plain[label], str), where, f"{label} {plain[label]} must be text, in quotes")
    run, flags, times = plain.get("run", {}), plain.get("flags", {}), plain.get("epochs_times", 1)
    recipes = mapping(where, run, keys) if isinstance(run, dict) else dict.fromkeys(keys, run)
    expect(all(isinstance(recipe, str) for recipe in recipes.values()), where, f"run {run} must name a recipe")
    expect(isinstance(times, int | float) and times > 0, where, f"epochs_times {times} must be above 0")
    expect(bool(recipes) or not (flags or times != 1), where, "flags and epochs_times need run")
    return Row(
        labels=tuple(plain[label] for label in labels),
        paper={key: read_score(f"{where}, {key}", plain[key]) for key in keys if key in plain},
        recipes=recipes,
        flags=mapping(where, flags, known=None),
        epochs_times=times,
    )


def read_score(where: str, plain: Any) -> Score:
    """A number as the paper prints it."""
    match = SCORE.fullmatch(str(plain))
    expect(match is not None, where, f"{plain} is not written as 82.8, 82.8† or 69.8 (68.6 ± 0.9)")
    value, mark, mean, std = match.groups()
    return Score(float(value), mark, *(None if x is None else float(x) for x in (mean, std)))


def mapping(where: str, plain: Any, known: Sequence[str] | None, required: Sequence[str] = ()) -> dict[str, Any]:
    """`plain` itself, once it is a mapping that has all `required` keys and none but `known` ones (None: any)."""
    expect(isinstance(plain, dict), where, f"{plain!r} must be a mapping")
    for key in plain:
        expect(known is None or key in known, where, f"unknown key {key}{nearest(str(key), known or ())}")
    for key in required:
        expect(key in plain, where, f"{key} is missing")
    return plain


def expect(holds: bool, where: str, message: str) -> None:
    """UserError `where: message` unless `holds`."""
    if not holds:
        raise UserError(f"{where}: {message}")
