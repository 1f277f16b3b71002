"""The pages lead somewhere: links, tables of contents, files, recipes, flags and tests that they name exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from docs.list_recipes import PAGE, anchor, page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", PAGE, *ROOT.glob("docs/*.md")])
HISTORY = {"LOG.md"}  # tells what was, under the names of its time
LIVING = [path for path in PAGES if path.name not in HISTORY]
GUIDES = [path for path in LIVING if path.parent != ROOT and path.name != "FAULTS.md"]
OTHER_PROGRAMS = {
    *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "max_restarts"),  # torchrun
    *("logdir", "help", "durations"),  # TensorBoard, tyro, pytest
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def code(path: Path) -> list[str]:
    """Blocks of code, and what stands in backticks."""
    text = path.read_text(encoding="utf-8")
    return [*re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.M | re.S), *re.findall(r"`([^`\n]+)`", prose(path))]


def headings(path: Path, level: str = "#+") -> list[str]:
    """Headings as a reader sees them."""
    titles = re.findall(rf"^{level} (.*)$", prose(path), flags=re.M)
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in titles]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(path):
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, heading = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or (heading and heading not in map(anchor, headings(page))):
            broken.append(target)
    assert not broken


def test_the_readme_is_a_way_in_and_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", "\n".join(lines)))
    assert linked == {name_of(path) for path in ROOT.glob("docs/*.md")}


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_a_guide_begins_with_its_purpose_and_names_its_sections(path):
    beginning, *_ = prose(path).partition("\n## ")
    assert re.match(r"# .+\n\n\w", beginning)
    contents = re.findall(r"^- \[(.*)\]\(#(.*)\)$", beginning, flags=re.M)
    contents = [(title.replace("`", ""), target) for title, target in contents]
    assert contents == [(heading, anchor(heading)) for heading in headings(path, "##")]


def named_files() -> dict[str, str]:
    """Paths in code that look like files of this repository -> a page that names each."""
    looks = r"(?<![\w/.-])((?:util|scripts|recipes|tests|docs|tables)/[\w./-]+|(?:main|engine|models)_\w+\.py)"
    files = {}
    for path in [*LIVING, ROOT / "docs" / "tour.ipynb"]:
        for target in re.findall(looks, "\n".join(code(path))):
            files.setdefault(target.rstrip("."), name_of(path))
    return files


@pytest.mark.parametrize(("target", "where"), named_files().items(), ids=list(named_files()))
def test_a_file_that_a_page_names_exists(target, where):
    assert (ROOT / target).exists(), f"{where} names {target}"


def test_the_tree_of_the_readme_is_the_tree():
    tree = README.read_text(encoding="utf-8").split("\nutil/\n")[1].split("```")[0]
    wings = {path.name for path in (ROOT / "util").iterdir() if (path / "__init__.py").exists()}
    assert {line.split("/")[0].strip() for line in tree.splitlines()} == wings


@cache
def known_flags() -> set[str]:
    """Fields of all dataclasses and their other names, also behind --no_."""
    known = set(OTHER_PROGRAMS)
    for source in (path for folder in ("util", "scripts", "docs") for path in (ROOT / folder).rglob("*.py")):
        for field, alias in re.findall(r"^    (\w+): |\"--(\w+)\"", source.read_text(encoding="utf-8"), flags=re.M):
            known |= {field or alias, f"no_{field or alias}"}
    return known


@pytest.mark.parametrize("path", LIVING, ids=name_of)
def test_recipes_and_flags_that_a_page_names_exist(path):
    text = "\n".join(code(path))
    recipes = set(re.findall(r"--(?:finetune_)?recipe (\w+)(?![\w$])", text)) - {"NAME"}
    assert not {recipe for recipe in recipes if not (ROOT / "recipes" / f"{recipe}.yaml").exists()}
    assert not set(re.findall(r"(?<![\w-])--([a-z]\w*)", text)) - known_flags()


def test_tests_that_the_page_of_faults_names_exist():
    text = (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8")
    numbers, file = [], ""
    for row in re.findall(r"^\| (\d.*)$", text, flags=re.M):
        numbers += re.findall(r"\d+", row.split("|")[0])
        for name, test in re.findall(r"`(\w+\.py)?(?:::(\w+))?`", row):
            file = name or file
            paths = list((ROOT / "tests").rglob(file))
            assert len(paths) == 1, file
            assert not test or f"def {test}(" in paths[0].read_text(encoding="utf-8"), f"{file}::{test}"
    assert {str(n) for n in range(1, 34)} <= set(numbers) <= {str(n) for n in range(1, 53)}


def test_the_recipes_page_is_what_the_script_writes_now():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python docs/list_recipes.py"


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "MODELS.md"], ids=name_of)
def test_the_python_of_a_page_runs(path):
    """On a file of MAE's layout that lies in the tests, which says nothing of its heads."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    (file,) = (ROOT / "tests").rglob("mae_encoder_only_tiny.pth")
    names: dict[str, object] = {}
    exec(re.sub(r"\"[^\"]*\.pth\"", repr(str(file)), block).replace("num_heads=None", "num_heads=2"), names)
    batch, tokens, width = names["tokens"].shape
    assert (batch, tokens) == (2, 1 + names["vit"].model.patch_embed.num_patches)
    assert names.get("features", names["tokens"][:, 0]).shape == (batch, width)
