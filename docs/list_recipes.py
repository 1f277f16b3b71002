"""Write recipes/README.md from the headers of the recipes: python docs/list_recipes.py

The header of a recipe says what it is, then `Command:`, `Hardware:`, `Hours:` and `Expected:`, then remarks. A field
goes on in lines that are indented as its text is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PAGE = RECIPES / "README.md"
FIELDS = ("Command", "Hardware", "Hours", "Expected")
INTRODUCTION = """\
# Recipes

This page lists the recipes: what each one is, what it costs and which number to expect.

A recipe is a YAML file of flags. `--recipe NAME` sets them, and flags on the command line override them. A recipe with
`extends` starts from another recipe. In the commands `IMAGENET`, `ADE20K` and `CIFAR10` are folders of data
([docs/DATA.md](../docs/DATA.md)); `RUN`, `TUNED`, `PROBED` and `SEGMENTED` are output folders.

`python docs/list_recipes.py` writes this page from the headers of the recipes. Edit the headers, not this page.
"""
# Heading, a sentence about the group, and how the names of its recipes begin. The first group that fits takes a recipe.
GROUPS = (
    (
        "Quick start and small images",
        "They need one CPU core or one GPU. `quickstart` and `digits_*` need no data either.",
        ("quickstart", "small", "digits_", "cifar_", "camvid_", "transfer_nano"),
    ),
    ("The paper", "LUT's pre-training as the paper prints it.", ("paper_",)),
    ("The authors' release", "LUT's pre-training in the form of the authors' released code.", ("release_vit_",)),
    ("MAE", "The baseline.", ("mae_",)),
    ("SimMIM", "Both rows of Table A, and the fine-tuning that follows them.", ("simmim_", "finetune_simmim_")),
    (
        "Ablations",
        "The rows of Tables 4, B and C. `scripts/tables.py` runs a whole table"
        " ([docs/ABLATIONS.md](../docs/ABLATIONS.md)).",
        ("ablation_",),
    ),
    ("Fine-tuning", "Classification on ImageNet-1k.", ("finetune_", "release_finetune_")),
    ("Linear probes", "Linear classification of frozen features on ImageNet-1k.", ("linprobe_",)),
    ("Segmentation", "UperNet on ADE20K.", ("segment_",)),
    ("Transfer", "Cells of the grids of Tables 2 and 3; `scripts/transfer.py` takes them.", ("transfer_",)),
)


@dataclass(frozen=True)
class Recipe:
    """The statements in the header of a recipe."""

    name: str
    title: str
    command: str  # one line
    command_remark: str  # which data its words stand for; often empty
    hardware: str
    hours: str
    expected: str
    remarks: str


def read_recipe(path: Path) -> Recipe:
    """Parse the header of a recipe; ValueError names the field that it lacks."""
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix("#")[1:] for line in re.match(r"(#.*\n)*", text)[0].splitlines()]
    parts: dict[str, list[str]] = {"title": []}
    place = "title"
    for line in lines:
        field, colon, rest = line.partition(":")
        if colon and field in FIELDS:
            place, line = field, rest
        elif place != "title" and not line.startswith(" "):
            place = "remarks"
        parts.setdefault(place, []).append(line.strip())
    missing = [field for field in FIELDS if field not in parts]
    if missing:
        raise ValueError(f"{path.name}: its header lacks {', '.join(missing)}")
    command = parts["Command"]
    last = next(i for i, line in enumerate(command) if not line.endswith("\\"))
    return Recipe(
        name=path.stem,
        title=" ".join(parts["title"]),
        command=" ".join(line.rstrip("\\ ") for line in command[: last + 1]),
        command_remark=" ".join(command[last + 1 :]),
        hardware=" ".join(parts["Hardware"]),
        hours=" ".join(parts["Hours"]),
        expected=" ".join(parts["Expected"]),
        remarks=" ".join(parts.get("remarks", [])),
    )


def place_of(name: str) -> tuple[str, int]:
    """Return the heading that a recipe stands under, and its place there; ValueError if it fits no group."""
    for heading, _, beginnings in GROUPS:
        for i, beginning in enumerate(beginnings):
            if name.startswith(beginning):
                return heading, i
    raise ValueError(f"{name}: fits no group of docs/list_recipes.py, add the beginning of its name to one")


def render(recipe: Recipe) -> str:
    """Return the entry of a recipe."""
    remark = f"# {recipe.command_remark.strip('()')}\n" if recipe.command_remark else ""
    lines = [
        f"### [{recipe.name}]({recipe.name}.yaml)\n",
        f"{recipe.title} {recipe.remarks}".strip() + "\n",
        f"```bash\n{remark}{recipe.command}\n```\n",
        f"- Hardware: {recipe.hardware}",
        f"- Hours: {recipe.hours}",
        f"- Expected: {recipe.expected}\n",
    ]
    return "\n".join(lines)


def anchor(heading: str) -> str:
    """Return the name under which a link finds a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def page() -> str:
    """Return the whole page."""
    recipes = [read_recipe(path) for path in RECIPES.glob("*.yaml")]
    recipes.sort(key=lambda recipe: (place_of(recipe.name)[1], recipe.name))
    contents = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading, _, _ in GROUPS)
    sections = []
    for heading, description, _ in GROUPS:
        entries = [render(recipe) for recipe in recipes if place_of(recipe.name)[0] == heading]
        sections.append("\n".join([f"## {heading}\n", f"{description}\n", *entries]))
    return "\n".join([INTRODUCTION, contents + "\n", *sections])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(list(RECIPES.glob('*.yaml')))} recipes")
