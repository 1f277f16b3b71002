"""scripts/tables.py: plans, results collected and shown, wrong input, job arrays, runs that are stopped and go on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts import tables as script
from shared.calls import script_caller
from shared.ranks import PATIENCE, wait_until
from shared.runs import pretraining_lines, write_run
from shared.tables import TABLES, options
from util.config.groups import as_dict
from util.results.results import append_result, read_results
from util.runtime.files import ROOT
from util.tables.outcomes import share_done
from util.tables.pictures import row_curves
from util.tables.plan import plan_runs
from util.tables.tables import PRETRAIN, STAGES


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/tables.py from an empty folder: exit status, stdout, stderr."""
    call = script_caller(monkeypatch, capsys, tmp_path, script)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- plan -------------------------------------------------------------------------------------------------


def test_a_plan_is_a_shell_script(call):
    status, shown, _ = call("plan B --scale tiny --seeds 2 --pretrain_flags='--epochs 3 --elastic'")
    assert status == 0
    commands = [line for line in shown.splitlines() if line and not line.startswith("#")]
    assert len(commands) == 32
    assert {shlex.split(line)[0] for line in commands} == {"python"}
    assert sum("--epochs 3 --elastic" in line for line in commands) == 8
    assert "# 32 runs, 0 done; left " in shown
    assert "TFLOP/s (assumed, --tflops)" in shown
    assert "# [1/32] ablation_alpha_010, seed 0, pretrain: " in shown


def test_a_plan_says_plainly_what_is_not_run(call):
    _, shown, _ = call("plan 1 --scale tiny")
    assert "# table 1: ours by main_segment.py: ADE20K mIoU" in shown
    assert "# table 1: shown from the paper, not run: DeiT, DeiT-III, Cosub," in shown
    assert "no counterpart at --scale tiny: MAE ViT-S, MAE ViT-L, LUT ViT-S, LUT ViT-L" in shown
    _, shown, _ = call("plan 5")
    assert "# table 5: ours by scripts/robustness.py: IN-1k, IN-V2," in shown
    assert all(line.startswith("#") for line in shown.splitlines())


# ---- results ------------------------------------------------------------------------------------------------


def finish(folder: Path, table: str, name: str, seed: int, stage: str, value: float, **other) -> Path:
    """Write the results.jsonl that a run of the tiny scale would have left, as planned but for `other`."""
    runs = plan_runs([TABLES[table]], options("tiny", folder, seeds=seed + 1))
    run = next(run for run in runs if run.title == f"{name}, seed {seed}, {stage}")
    run.folder.mkdir(parents=True, exist_ok=True)
    metrics = {STAGES[stage].metric: value, "loss": 1.0}
    append_result(run.folder, STAGES[stage].main, as_dict(run.config) | other, metrics, 12.0, {})
    return run.folder / "results.jsonl"


def test_a_table_of_results(call, tmp_path):
    folder = tmp_path / "out"
    for seed, values in enumerate(((70.0, 60.0), (72.0, 63.0), (71.0, 64.0))):
        for name, value in zip(("ablation_mae", "ablation_lut"), values, strict=True):
            finish(folder, "4f", name, seed, "finetune", value)
    finish(folder, "4f", "ablation_lut_rrc", 0, "linprobe", 50.0)
    finish(folder, "4f", "ablation_lut_rrc", 0, "finetune", 55.5)
    _, shown, _ = call("show 4f --scale tiny --output_dir out --against paper")
    rows = [re.split(r"  +", line) for line in shown.splitlines()]
    assert ["MAE", "RRC", "82.8", "71.0 ± 1.0", "-11.8", "61.5", "–", "–", "0–3"] in rows
    assert ["MAE", "SRC", "82.5", "–", "64.2", "–", "–", "0"] in rows
    assert ["LUT", "RRC", "83.4", "55.5", "-27.9", "67.1", "50.0", "-17.1", "–", "0–1"] in rows
    assert ["LUT", "SRC", "83.5", "62.3 ± 2.1", "-21.2", "67.9", "–", "–", "0–3"] in rows
    table = shown.split("\n\n")[1].splitlines()
    assert [re.split(r"  +", line.strip()) for line in table[:2]] == [
        ["lin,"],  # titles are wrapped to keep within 100 columns
        ["ft,", "ft,", "lin,", "lin,", "lin,", "pooled,"],
    ]
    assert max(map(len, table)) <= 100
    _, shown, _ = call("show 4f --scale tiny --output_dir out --format markdown")
    assert "| method | views | ft, paper | ft, ours | ft, Δ paper | ft, Δ ours | lin, paper |" in shown
    assert "| MAE | RRC | 82.8 | 71.0 ± 1.0 |  |  | 61.5 | – |" in shown
    assert "| LUT | SRC | 83.5 | 62.3 ± 2.1 | +0.7 | -8.7 | 67.9 | – | +6.4 |  |" in shown
    _, shown, _ = call("show 4f --scale tiny --output_dir out --format latex --picture a/b.png")
    assert "LUT & SRC & 83.5 & 62.3 $\\pm$ 2.1 & +0.7 & -8.7 & 67.9 & -- & +6.4 &  & -- &  & 0--3 \\\\" in shown
    assert "\\begin{tabular}{llrrrrrrrrrrr}" in shown
    assert all(line[0] in "%\\MLm" for line in shown.splitlines() if line)  # nothing that LaTeX would print
    with Image.open(tmp_path / "a" / "b.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_numbers_of_competitors_and_missing_tools_are_the_papers(call):
    _, shown, _ = call("show 2 --format markdown")
    assert "| data2vec | 75.2 (74.5 ± 0.7) | 80.6 (80.0 ± 0.5) | 76.2 (75.5 ± 0.9) |" in shown
    assert "table 2: ours by scripts/transfer.py: iNat 2018, iNat 2019, iNat 2021-mini" in shown
    _, shown, _ = call("show 1")
    assert (
        "\n\nDINO, ICCV 2021, Pixel\n  ViT-S, paper        81.5†\n  ViT-B, paper        82.8†\n"
        "  ADE20K mIoU, paper  46.8\n\n"
    ) in shown  # too wide for columns: a block per row
    assert "ADE20K after LUT is 49.5 here and 48.6 in the introduction." in shown
    _, shown, _ = call("show study --scale tiny --format markdown")
    assert "| LUT, symmetric | – |  | – |  | – |  | – |  | – |  | – |  | 0 |" in shown


def test_a_column_may_name_its_metric(call, tmp_path):
    """Student and momentum encoder come from one probing; MAE has no momentum encoder."""
    folder = tmp_path / "output" / "tables"
    for name, metrics in (("ablation_mae", {}), ("ablation_lut_rrc-alpha_0.1", {"momentum/knn": 31.0})):
        path = finish(folder, "parts", name, 0, "probe", 44.0)
        line = json.loads(path.read_text())
        line["metrics"] |= {"student, kNN, k 20": 33.0} | metrics  # the old name too
        path.write_text(json.dumps(line) + "\n")
    _, shown, _ = call("show parts --scale tiny --format markdown --against paper")
    assert "| MAE | 33.0 | 44.0 | – | – | 0–1 |" in shown
    assert "| cosine distance | 33.0 | 44.0 | 31.0 | – | 0–1 |" in shown


def test_curves_of_a_table(call, tmp_path):
    folder = tmp_path / "output" / "tables"
    for seed, more in ((0, 4), (1, 2)):  # the second one is still under way
        for name in ("ablation_mae", "ablation_lut_rrc-alpha_0.1"):
            (run,) = (
                run
                for run in plan_runs([TABLES["study"]], options("tiny", folder, seeds=seed + 1))
                if run.title == f"{name}, seed {seed}, pretrain"
            )
            write_run(run.folder, pretraining_lines(more, 11), as_dict(run.config))
    (first,) = (  # of an array, which has not ended an epoch yet
        run
        for run in plan_runs([TABLES["study"]], options("tiny", folder))
        if run.title == "ablation_mae, seed 0, pretrain"
    )
    saved = (first.folder / "log.jsonl").read_text()
    write_run(first.folder, pretraining_lines(1, 11)[:4], as_dict(first.config))
    assert row_curves(TABLES["study"], options("tiny", folder))[0].over_epochs("knn")[0].tolist() == [0, 1, 2]
    (first.folder / "log.jsonl").write_text(saved)

    rows = row_curves(TABLES["study"], options("tiny", folder))
    assert [(row.name, len(row.logs)) for row in rows] == [("MAE", 2), ("LUT", 2)]
    epochs, values = rows[0].over_epochs("knn")
    assert epochs.tolist() == [0, 1, 2]  # what all seeds have
    assert values.tolist() == [[11, 20, 21], [11, 20, 21]]
    assert rows[1].flops_per_epoch() > 1.3 * rows[0].flops_per_epoch()
    status, _, errors = call("show study --scale tiny --curves a/curves.png")
    assert status == 0, errors
    with Image.open(tmp_path / "a" / "curves.png") as picture:
        assert picture.format == "PNG"
    finish(folder, "study", "ablation_mae", 0, PRETRAIN, 21.0)
    finish(folder, "study", "ablation_mae", 0, "probe", 44.0)
    _, output, _ = call("keep study --scale tiny --into kept")
    assert output == "3 files copied into kept\n"  # two results and a log
    finish(folder, "study", "ablation_mae", 4, "probe", 46.0)  # one more than the table plans
    assert call("keep study --scale tiny --into kept")[1] == "4 files copied into kept\n"
    shown = [call(f"show study --scale tiny --output_dir {place}")[1] for place in ("output/tables", "kept")]
    assert shown[0] == shown[1]
    assert len(row_curves(TABLES["study"], options("tiny", tmp_path / "kept"))) == 1
    status, _, errors = call("keep 4c --scale tiny --output_dir nothing")
    assert status == 2
    assert "--output_dir nothing: no run of table 4c has finished there" in errors
    (tmp_path / "nothing").mkdir()
    status, _, errors = call("show 4c --scale tiny --output_dir nothing --curves b.png")
    assert status == 2
    assert "--curves: no pre-training of table 4c has a log in nothing" in errors


def test_a_results_file_cut_short_counts_as_not_finished(call, tmp_path):
    path = finish(tmp_path / "output" / "tables", "B", "ablation_lut", 0, "finetune", 60.0)
    intact = path.read_text()
    path.write_text(intact + intact[: len(intact) // 2])
    status, shown, errors = call("show B --scale tiny")
    assert status == 0
    assert "60.0" in shown
    (warning,) = errors.splitlines()
    assert warning == f"WARNING: {path.relative_to(tmp_path)}, line 2: cut short or not a result, left out"
    path.write_text(intact[: len(intact) // 2])
    assert "60.0" not in call("show B --scale tiny")[1]
    append_result(path.parent, "finetune", {}, {"top1": 61.0}, 1.0, {})  # begins a line of its own
    assert [line["metrics"] for line in read_results(path.parent)] == [{"top1": 61.0}]


def test_a_run_with_other_settings_is_shown_with_a_remark_and_not_taken_for_done(call, tmp_path):
    path = finish(tmp_path / "output" / "tables", "B", "ablation_lut", 0, "finetune", 60.0, epochs=3)
    _, shown, _ = call("show B --scale tiny")
    assert "ablation_lut, seed_0, finetune ran with other settings: epochs 3 (planned: 5)" in shown
    status, _, errors = call("run B --scale tiny")
    assert status == 2
    assert errors == (
        f"tables.py: error: --output_dir {path.parent.relative_to(tmp_path)}: has finished with epochs 3 (planned: 5),"
        " choose another folder\n"
    )


def test_what_is_done_is_not_done_again(call, tmp_path):
    folder = tmp_path / "output" / "tables"
    runs = plan_runs([TABLES["C"]], options("tiny", folder))
    for run in runs:
        name, _, stage = run.title.split(", ")
        finish(folder, "C", name, 0, stage, 50.0)
    assert {share_done(run) for run in runs} == {1.0}
    status, shown, _ = call("run C --scale tiny")
    assert status == 0
    assert shown.startswith("6 runs, 6 done already\n")
    assert re.search(r"^L_BC only +82.0 +50.0 +-0.1 +\+0.0 +1$", shown, re.M)
    assert "# 6 runs, 6 done; left 0.0e+00 FLOP, about 0:00:00" in call("plan C --scale tiny")[1]


# ---- wrong input: one line ----------------------------------------------------------------------------------

WRONG = {
    "plan 4g": "TABLE 4g: unknown (one of 1, 2, 3, 4a, 4b, 4c, 4d, 4e, 4f, 5, A, B, C, study, brief, parts, tuning;",
    "plan 12": "TABLE 12: unknown",
    "plan sturdy": "TABLE sturdy: unknown, did you mean study?",
    "shwo 4c": "shwo: unknown command, did you mean show? (one of plan, run, show, keep, then the table)",
    "plan 4c --scale tinny": "--scale tinny: unknown, did you mean tiny? (one of paper, small, cpu, tiny)",
    "show 4c --scale tiny --output_dir absent": "--output_dir absent: there is no such folder of runs",
    "plan 4c --seed 3": "--seed: unknown flag, did you mean --seeds?",
    "plan 4c --seeds 0": "--seeds 0: must be 1 or more",
    "plan 4c --tflops -1": "--tflops -1.0: must be above 0",
    "plan B --processes 3": "table B, 0.1: --processes 3: the 4096 images of an update cannot be shared by 3 processes",
    "plan B --pretrain_flags='--bach_size 4'": "table B, 0.1: --bach_size: unknown flag, did you mean --batch_size?",
    """plan B --pretrain_flags='a"' """: '--pretrain_flags a": No closing quotation',
    "plan B --finetune_flags='--epochs 0'": "table B, 0.1: --epochs 0: must be 1 or more",
    "run B": "--data_path: is missing, --scale paper needs IMAGENET",
    "run B --scale small": "--data_path: is missing, --scale small needs CIFAR10",
    "run B --scale small --data_path nowhere": "--data_path nowhere: there is no such file or folder",
    "run B --scale tiny --data_path x": "--data_path x: --scale tiny has its own data, leave the flag out or take",
    "run B --data_path nowhere": "--data_path nowhere: there is no such file or folder",
    "run B --scale tiny -- --partition gpu": "`--`: flags of the launcher need --submit before it",
    "run B --scale tiny --submit": "--submit: there is no sbatch here",
    "run B --scale tiny --submit -- --cluster local": "--cluster local: runs on this machine need no --submit",
    "run B --scale tiny --submit -- --seeds 1 2": "--seeds 1 2: leave it out behind --submit",
    "run B --scale tiny --processes 4 --submit": "--processes 4: the launcher starts 8 processes, leave it out",
    "show 4 --curves x.png": "--curves x.png: draws one table, 4 is 6",
    "show 4 --picture x.png": "--picture x.png: draws one table, 4 is 6",
    "show 4c --format html": "--format html: unknown",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(call, monkeypatch, tmp_path, flags):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, errors = call(flags)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("tables.py: error: ")
    assert WRONG[flags] in errors
    assert os.listdir(tmp_path) == []


# ---- SLURM --------------------------------------------------------------------------------------------------


def test_each_stage_is_an_array_whose_tasks_wait_for_their_pretraining(call, tmp_path):
    data = tmp_path / "images"
    data.mkdir()
    flags = "--submit --dry_run -- --partition gpu --nodes 2 --after 7"
    status, shown, errors = call(f"run B --data_path images --seeds 2 {flags}")
    assert status == 0, errors
    scripts = shown.split("#!/bin/bash")[1:]
    stages = (PRETRAIN, "finetune", "linprobe", "linprobe_pooled")
    assert [re.search(r"--job-name=(\S+)", text)[1] for text in scripts] == [f"lut-{stage}" for stage in stages]
    assert all("#SBATCH --array=0-7%" in text for text in scripts)
    assert all("#SBATCH --partition=gpu" in text for text in scripts)
    dependencies = [re.search(r"--dependency=(\S+)", text)[1] for text in scripts]
    assert dependencies == ["afterok:7"] + 3 * ["aftercorr:JOB"]
    assert all("#SBATCH --kill-on-invalid-dep=yes" in text for text in scripts)
    for text in scripts:  # task i starts from the checkpoint of task i
        commands = [line for line in text.splitlines() if re.search(r"/main_\w+\.py ", line)]
        folders = [re.search(rf"{tmp_path}/output/tables/paper/(\w+/seed_\d)/", line)[1] for line in commands]
        assert folders == [f"{name}/seed_{seed}" for seed in (0, 1) for name in ALPHAS]
        assert all("--auto_resume" in line for line in commands)
    assert "--batch_size 128 --accum_iter 2 " in scripts[0]  # 16 processes


def test_a_probe_in_an_array_is_one_process(call, tmp_path):
    (tmp_path / "images").mkdir()
    status, shown, errors = call("run study --data_path images --seeds 1 --submit --dry_run -- --nodes 2")
    assert status == 0, errors
    scripts = {re.search(r"--job-name=lut-(\S+)", text)[1]: text for text in shown.split("#!/bin/bash")[1:]}
    sizes = {name: re.findall(r"^#SBATCH --(?:nodes|ntasks-per-node)=(\d+)", scripts[name], re.M) for name in scripts}
    assert sizes[PRETRAIN] == sizes["finetune"] == ["2", "8"]
    assert sizes["probe"] == sizes["probe_cls"] == ["1", "1"]
    commands = re.findall(r"/scripts/probe.py (\S+) .*", scripts["probe"])
    assert commands[0].endswith("/output/tables/paper/ablation_mae/seed_0/pretrain/checkpoint-399.pth")
    assert "--dependency=aftercorr:JOB" in scripts["probe"]


ALPHAS = ("ablation_alpha_010", "ablation_lut", "ablation_alpha_050", "ablation_alpha_100")


def test_what_has_its_pretraining_waits_for_nothing(call, tmp_path):
    for stage in (PRETRAIN, "linprobe"):
        finish(tmp_path / "output" / "tables", "B", "ablation_lut", 0, stage, 50.0)
    _, shown, _ = call("run B --scale tiny --submit --dry_run -- --ngpus 0")
    scripts = shown.split("#!/bin/bash")[1:]
    jobs = []
    for text in scripts:
        names = re.findall(r"^# (\w+), seed 0, \w+$", text, re.M)
        after = re.search(r"--dependency=(\S+)", text)
        jobs.append((re.search(r"--job-name=lut-(\S+)", text)[1], len(names), after and after[1]))
    waits = "aftercorr:JOB"
    assert jobs == [
        *((PRETRAIN, 3, None), ("finetune", 1, None), ("finetune", 3, waits), ("linprobe", 3, waits)),
        *(("linprobe_pooled", 1, None), ("linprobe_pooled", 3, waits)),
    ]


# ---- real runs ----------------------------------------------------------------------------------------------


def test_a_run_killed_between_its_checkpoint_and_its_result_gets_one(pretrain, linprobe, class_folders, tmp_path):
    data = ("--data_path", class_folders)
    for call, name, metric, flags in (
        (pretrain, "a", "knn", "--monitor_freq 1"),
        (linprobe, "b", "top1", f"--finetune {tmp_path}/a/checkpoint-1.pth"),
    ):
        folder = tmp_path / name
        call(*data, flags, output=folder)
        (before,) = read_results(folder)
        (folder / "results.jsonl").unlink()
        call(*data, flags, "--auto_resume", output=folder)
        (after,) = read_results(folder)
        assert after["metrics"][metric] == before["metrics"][metric]


REAL = """X:
  title: Two rows for real
  backbone: nano
  epochs: "2"
  labels: [case]
  columns: {knn: {title: kNN, ours: pretrain}, lin: {title: lin, ours: linprobe}}
  rows:
    - {case: MAE, lin: 61.5, run: ablation_mae}
    - {case: LUT, lin: 67.9, run: ablation_lut}
"""
# the script on other tables: a process of its own, to be killed
DRIVER = """
import sys
import util.tables.tables
util.tables.tables.FILES = (sys.argv.pop(1),)
from scripts.tables import main
from util.runtime.errors import run_main
run_main("tables.py", main)
"""


@pytest.mark.slow
def test_a_table_that_is_stopped_half_way_goes_on(tmp_path):
    (tmp_path / "own.yaml").write_text(REAL)
    flags = [
        *("X", "--scale", "tiny", "--output_dir", str(tmp_path / "out")),
        "--pretrain_flags=--epochs 4 --warmup_epochs 1 --batch_size 128 --print_freq 1 --save_freq 1 --monitor_freq 0",
        "--linprobe_flags=--epochs 1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(*more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "own.yaml"), "run", *flags, *more]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **output)

    mae, lut = (tmp_path / "out" / "tiny" / name / "seed_0" for name in ("ablation_mae", "ablation_lut"))
    for number, stopped, begun, status in (
        (signal.SIGKILL, mae / "linprobe", "log.jsonl", -9),
        (signal.SIGINT, lut / "pretrain", "checkpoint-0.pth.json", 130),
    ):
        process = start()
        wait_until(lambda path=stopped / begun, run=process: path.exists() or run.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, output
        assert not (stopped / "results.jsonl").exists()
    assert output.startswith("4 runs, 1 done already\n")
    assert "ablation_lut, seed 0, pretrain: stopped; run the same command to resume" in output

    before = {path: path.read_text() for path in mae.glob("*/results.jsonl")}
    process = start()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.startswith("4 runs, 2 done already\n")
    assert "[3/4] ablation_lut, seed 0, pretrain\n" in output
    assert re.search(r"^\[4/4, all left 0:\d\d:\d\d\] epoch 1/1  step 11(/11)?  loss ", output, re.M)
    assert re.search(r"^resumed after update \d+$", (lut / "pretrain" / "output.txt").read_text(), re.M)
    assert {path: path.read_text() for path in mae.glob("*/results.jsonl")} == before
    assert [len(read_results(folder)) for folder in (*mae.iterdir(), *lut.iterdir())] == [1, 1, 1, 1]
    assert re.search(r"^LUT .* 67\.9 +\d+\.\d .* 0–1$", output, re.M)  # no kNN, it was not looked at

    # what fails is named, and the rest is done
    for folder in lut.iterdir():
        for path in (*folder.glob("checkpoint-*"), *lut.glob("linprobe/results.jsonl")):
            path.unlink()
    process = start("--keep_going")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "FAILED: ablation_lut, seed 0, linprobe: exit status 2, main_linprobe.py: error: --finetune " in output
    assert output.splitlines()[-1].startswith("tables.py: error: 1 of 4 runs failed: ablation_lut, seed 0, linprobe: ")
