"""Results and progress read from run folders, YAML that is checked, tables within 100 columns, files on a full disk."""

from __future__ import annotations

import json
import re

import pytest
from matplotlib.figure import Figure

from shared.tables import TABLES, options
from util.results.results import append_result
from util.runtime.errors import UserError
from util.tables.formats import WIDTH, TextTable
from util.tables.outcomes import TAIL_BYTES, copy_results, read_progress
from util.tables.pictures import save_picture
from util.tables.plan import plan_runs
from util.tables.schema import Key, check_mapping, one_of


@pytest.fixture
def run(tmp_path):
    """Return a planned pre-training of 16 epochs, with an empty folder."""
    run, *_ = plan_runs([TABLES["C"]], options("tiny", tmp_path))
    assert run.config.epochs == 16
    run.folder.mkdir(parents=True)
    return run


def training_line(step: int, epoch: int, **more) -> str:
    line = {"step": step, "epoch": epoch, "loss": 0.5, "lr": 1e-3, "images_per_second": 100.0}
    return json.dumps(line | more) + "\n"


@pytest.mark.parametrize(
    ("run_facts", "share", "steps"),
    [
        ('{"total_updates": 704}', 60 / 704, "step 60/704"),
        ('{"command": "python main_pretrain.py"}', 1 / 16, "step 60"),  # of an older version: whole epochs
        ('{"total_upd', 1 / 16, "step 60"),
        (None, 1 / 16, "step 60"),
    ],
)
def test_progress_is_read_from_the_log_and_run_json(run, run_facts, share, steps):
    assert read_progress(run) is None
    if run_facts is not None:
        (run.folder / "run.json").write_text(run_facts)
    evaluation = '{"step": 44, "epoch": 1, "knn": 20.0}\n'
    log = training_line(44, 0) + evaluation + training_line(60, 1, loss="nan") + evaluation + '{"step": 88, "epo'
    (run.folder / "log.jsonl").write_text(log)
    progress = read_progress(run)
    assert progress.share == pytest.approx(share)
    assert progress.line == f"epoch 2/16  {steps}  lr 0.001  100 images/s"


def test_progress_of_a_long_log_is_read_from_its_end(run):
    lines = [training_line(step, step // 44) for step in range(1, 1000)]
    (run.folder / "log.jsonl").write_text("".join(lines))
    assert (run.folder / "log.jsonl").stat().st_size > TAIL_BYTES
    assert read_progress(run).line.startswith("epoch 23/16  step 999  loss 0.5  ")


# ---- YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (3, "here: 3 must be a mapping"),
        ({"colour": "red"}, "here: size is missing"),
        ({"size": 0}, "here: size 0 must be above 0"),
        ({"size": "2"}, "here: size 2 must be above 0"),
        ({"size": 1, "colour": "rad"}, "here: colour rad is no colour, did you mean red?"),
        ({"sise": 1}, "here: unknown key sise, did you mean size?"),
    ],
)
def test_a_mapping_is_checked_key_by_key(mapping, message):
    keys = {
        "size": Key(int, "must be above 0", accepts=lambda size: size > 0),
        "colour": one_of("colour", ("red", "blue")),
    }
    assert check_mapping("here", {"size": 2}, keys) == {"size": 2, "colour": ""}
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_mapping("here", mapping, keys)


# ---- text ---------------------------------------------------------------------------------------------------


def test_a_text_table_keeps_within_the_terminal():
    titles = ["case", *(f"metric {i}, momentum encoder" for i in range(6))]
    row = ["MAE", *(f"{i}.0" for i in range(6))]
    narrow = TextTable(titles[:3], [row[:3]], 1).as_text().splitlines()
    assert narrow[0].split("  ") == titles[:3]
    wrapped = TextTable(titles, [row], 1).as_text().splitlines()
    assert wrapped[-1].split() == row
    assert [line.split() for line in wrapped[:4]] == [
        ["metric"] * 6,
        [f"{i}," for i in range(6)],
        ["momentum"] * 6,
        ["case", *["encoder"] * 6],
    ]
    wide = TextTable(titles, [[row[0], *(20 * "x" for _ in row[1:])], ["LUT", "1.0", *[""] * 5]], 1).as_text()
    assert wide.split("\n\n")[1] == "LUT\n  metric 0, momentum encoder  1.0"  # empty cells are left out
    for lines in (narrow, wrapped, wide.splitlines()):
        assert max(map(len, lines)) <= WIDTH


# ---- a full disk --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_picture_as_it_was(small_disk):
    path = small_disk / "grid.png"
    save_picture(Figure(figsize=(2, 2)), path)
    before = path.read_bytes()
    (small_disk / "other").write_bytes(bytes((1 << 20) - (1 << 15)))
    with pytest.raises(OSError, match="No space left"):
        save_picture(Figure(figsize=(40, 40)), path, dpi=300)
    assert path.read_bytes() == before
    assert {file.name for file in small_disk.iterdir()} == {"grid.png", "other"}  # no partial file


def test_a_full_disk_leaves_a_kept_result_as_it_was(run, small_disk):
    append_result(run.folder, "pretrain", {}, {"knn": 40.0}, 1.0, {})
    root = run.folder.parents[3]
    assert copy_results([run], root, small_disk / "kept") == 1
    copy = small_disk / "kept" / run.folder.relative_to(root) / "results.jsonl"
    before = copy.read_bytes()
    (small_disk / "other").write_bytes(bytes((1 << 20) - 2 * (1 << 13)))
    append_result(run.folder, "pretrain", {"note": "x" * (1 << 16)}, {"knn": 41.0}, 1.0, {})
    with pytest.raises(OSError, match="No space left"):
        copy_results([run], root, small_disk / "kept")
    assert copy.read_bytes() == before
