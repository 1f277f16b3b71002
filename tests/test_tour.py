"""The notebook of docs/: it runs from its top, draws its pictures, and is kept in a form that others can read."""

from __future__ import annotations

import base64
import io
import itertools
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from docs.execute_notebook import cleaned, execute, pictures
from shared.calls import one_line
from util.runtime.errors import RunError, UserError
from util.runtime.files import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
MOST_BYTES = 500_000  # code hosts show no larger notebook well
NUM_PICTURES = 8


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


def check_pictures(notebook):
    """Check that there are as many pictures as there should be, and that none is empty."""
    images = pictures(notebook)
    assert len(images) == NUM_PICTURES
    for picture in images:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert min(pixels.shape) > 200
        assert len(np.unique(pixels)) > 20


def test_the_notebook_is_kept_with_its_outputs_and_small(tour):
    nbformat.validate(tour)
    assert TOUR.stat().st_size < MOST_BYTES
    check_pictures(tour)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_the_notebook_tells_nothing_of_the_machine_that_ran_it(tour):
    assert cleaned(nbformat.from_dict(tour)) == tour
    for cell in tour.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            text = "".join([output.get("text", ""), str(output.get("data", {}).get("text/plain", ""))])
            assert not re.search(r"(^|[\s'\"])/\w+/|\d\d:\d\d|Warning|0x[0-9a-f]{6}", text), text


def test_words_stand_before_each_cell_of_code_and_cells_are_short(tour):
    kinds = [cell.cell_type for cell in tour.cells]
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")
    assert max(cell.source.count("\n") for cell in tour.cells if cell.cell_type == "code") < 30


@pytest.mark.slow
def test_the_notebook_runs_and_what_it_says_comes_true(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = execute(TOUR, tmp_path, timeout=500)
    check_pictures(notebook)
    cells = {
        cell.id: "".join(o.text for o in cell.outputs if "text" in o) for cell in notebook.cells if "outputs" in cell
    }
    features = [float(number) for number in re.findall(r"knn ([\d.]+)", cells["pretrain-run"])]
    assert features[-1] > features[0]  # than of a random network
    tuned, scratch = (float(number) for number in re.findall(r"([\d.]+) %", cells["results-table"]))
    assert tuned > scratch + 5
    assert (tmp_path / "output" / "tour").is_dir()  # and not in the folder of the notebook that is kept


@pytest.mark.slow
def test_a_cell_that_fails_or_hangs_is_said_in_one_line(tmp_path):
    failures = (("1 / 0", "some.ipynb: a cell failed: ZeroDivisionError"), ("while True: pass", "some.ipynb"))
    for source, message in failures:
        path = tmp_path / "some.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
        before = path.read_bytes()
        with pytest.raises(RunError, match=message) as error:
            execute(path, tmp_path / "copy", timeout=5)
        one_line(error)
        assert path.read_bytes() == before


def test_what_is_no_notebook(tmp_path):
    for name in ("gone.ipynb", "words.ipynb"):
        (tmp_path / "words.ipynb").write_text("words")
        with pytest.raises(UserError, match=f"{name}: cannot be read as a notebook") as error:
            execute(tmp_path / name, tmp_path, timeout=5)
        one_line(error)
