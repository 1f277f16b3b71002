"""scripts/transfer.py with real runs: killed, continued, the held-out choice trained again, a cell that fails."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shared.ranks import PATIENCE, wait_until
from shared.transfer import TINY_GRID, rows_of
from util.results.results import read_results
from util.runtime.files import ROOT
from util.tables.transfer import read_grid


def start(folder: Path, flags: str) -> subprocess.Popen:
    """Start the script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "transfer.py"), *shlex.split(flags)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on_and_the_held_out_choice_is_trained_again(tmp_path, class_folders):
    flags = f"run {TINY_GRID} --data_path {class_folders} --lrs 1e-3 4e-3 --weight_decays 0.05 --holdout 0.25"
    flags = flags.replace("--epochs 2", "--epochs 15 --save_freq 1")
    grid = tmp_path / "output/transfer/ours/images/holdout_0.25"
    first, second = (grid / f"lr_{lr}-wd_0.05" / "seed_0" for lr in ("0.001", "0.004"))

    process = start(tmp_path, flags)
    wait_until(lambda: list(second.glob("checkpoint-*.pth.json")) or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    process.kill()
    process.wait()
    assert (first / "results.jsonl").exists()
    assert not (second / "results.jsonl").exists()
    before = (first / "results.jsonl").read_text()
    wait_until(
        lambda: not subprocess.run(["pgrep", "-f", str(second.relative_to(tmp_path))], capture_output=True).stdout
    )

    process = start(tmp_path, flags)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.startswith("2 runs, 1 done already\n")
    assert re.search(r"^\[2/2, all left 0:\d\d:\d\d\] epoch ", output, re.M)
    assert re.search(r"^resumed after update \d+$", (second / "output.txt").read_text(), re.M)
    assert (first / "results.jsonl").read_text() == before
    assert [len(read_results(folder)) for folder in (first, second)] == [1, 1]

    best = read_grid(grid).best
    assert "the best cell of each data set, on all training images\n1 runs, 0 done already\n" in output
    chosen = read_grid(grid / "chosen")
    assert list(chosen.means) == [best]
    means = list(read_grid(grid).means.values())
    shown = f"{chosen.means[best]:.1f} ({statistics.mean(means):.1f} ± {statistics.stdev(means):.1f})"
    assert ["ours", "ours", shown] in rows_of(output)
    rates = [lr for lr, folder in ((1e-3, first), (4e-3, second)) if list(folder.glob("checkpoint-*.pth"))]
    assert rates == [best[0]]
    with Image.open(grid / "grid.png") as picture:
        assert min(picture.size) > 300

    # a cell that fails is named, and the others are done
    [path.unlink() for path in second.iterdir()]
    (second / "checkpoint-0.pth").write_text("no checkpoint")
    process = start(tmp_path, f"{flags} --keep_going")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    assert re.search(r"FAILED: ours, images, lr 0.004, weight decay 0.05, seed 0: exit status \d", output)
    assert "ours, images: 1 of 2 cells" in output
    assert output.splitlines()[-1].startswith("transfer.py: error: 1 of 2 runs failed: ours, images, lr 0.004")
