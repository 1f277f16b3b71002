"""The wings of util/: which may import which (see the table in CONTRIBUTING.md). Read from the syntax trees."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from util.runtime.files import ROOT

BASE = ("runtime", "optim", "models", "data", "config", "weights", "figures", "results", "analysis")
TRAIN = (*BASE, "train")
MAY_IMPORT = {  # beside itself
    "runtime": (),
    "optim": ("runtime",),
    "models": ("runtime", "optim"),
    "data": ("runtime",),
    "config": ("runtime", "models"),
    "weights": ("runtime", "models", "data", "config"),
    "figures": ("runtime", "models", "data"),
    "results": ("runtime", "weights"),
    "analysis": ("weights", "figures", "data", "config", "models", "runtime"),
    "train": BASE,
    "engine": TRAIN,
    "main": (*TRAIN, "engine"),
    "tables": TRAIN,
    "robustness": (*TRAIN, "tables"),
    "report": (*TRAIN, "tables"),
    "bench": (*TRAIN, "engine", "main", "tables", "robustness", "report", "cluster"),
    "cluster": ("runtime",),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("util/**/*.py")]
    if path.name != "__init__.py"
}


def wing_of(module: str) -> str:
    """`data` of util.data.views, `models` of models_lut."""
    return module.split(".")[1] if module.startswith("util.") else module.partition("_")[0]


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, wherever in it the import stands."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules & MODULES.keys()


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_wing_imports_itself_and_those_that_its_line_names(module):
    allowed = {wing_of(module), *MAY_IMPORT[wing_of(module)]}
    wrong = [f"{module} imports {other}" for other in sorted(IMPORTS[module]) if wing_of(other) not in allowed]
    assert not wrong, f"{'; '.join(wrong)}; the wing {wing_of(module)} may import {', '.join(sorted(allowed))}"


def test_no_module_is_imported_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_wings_are_ordered():
    TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize("wing", sorted(path.name for path in (ROOT / "util").iterdir() if path.is_dir()))
def test_each_wing_says_its_rule_and_nothing_else(wing):
    if wing == "__pycache__":
        return
    tree = ast.parse((ROOT / "util" / wing / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1
