"""The launcher without SLURM: its flags, batch script and code copy, and jobs in the background of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts import submit
from shared.calls import script_caller
from shared.flags import TINY, TINY_CLASSIFIER
from shared.images import write_images
from util.cluster.code import code_files, copy_code, unused_folder
from util.cluster.jobs import requeue_lines
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.runtime.files import ROOT
from util.train.pretraining import build_state


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """Call scripts/submit.py from an empty folder: exit status, stdout, stderr."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return script_caller(monkeypatch, capsys, tmp_path, submit)


def without_tools(monkeypatch, folder: Path) -> None:
    """Set a PATH on which there is no sbatch."""
    monkeypatch.setenv("PATH", str(folder))


# ---- what would be submitted ------------------------------------------------------------------------------


def test_the_batch_script_asks_for_what_the_flags_say(launch, monkeypatch, tmp_path):
    without_tools(monkeypatch, tmp_path)  # it can be looked at anywhere
    status, shown, _ = launch(
        "pretrain --dry_run --nodes 2 --ngpus 4 --timeout 600 --signal_delay 120 --partition gpu --account lab"
        " --qos high --constraint a100 --exclude n7 --comment hello --mem_gb 100 --job_name mine --job_dir RUN"
        " --container image.sqsh --container_mounts /data:/data --prologue one --prologue two --max_requeues 3"
        " -- --recipe paper_vit_base"
    )
    assert status == 0
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in shown.splitlines() if "#SBATCH" in line
    )
    assert asked == {
        "nodes": "2",
        "gpus-per-node": "4",
        "ntasks-per-node": "4",
        "cpus-per-task": "10",
        "mem": "102400M",
        "time": "600",
        "signal": "USR2@120",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "constraint": "a100",
        "exclude": "n7",
        "comment": "hello",
        "job-name": "mine",
        "requeue": "",
        "open-mode": "append",
        "output": f"{tmp_path}/RUN/%j_0_log.out",
    }
    srun = next(line for line in shown.splitlines() if line.startswith("srun "))
    mounts = f"{tmp_path}/RUN:{tmp_path}/RUN,{tmp_path}:{tmp_path},/data:/data"
    for flag in ("kill-on-bad-exit=1", "cpus-per-task=10", "container-image=image.sqsh", f"container-mounts={mounts}"):
        assert f" --{flag} " in srun
    assert "set -e\none\ntwo\nset +e\n" in shown
    assert "\n".join(requeue_lines(3)) in shown
    flags = f"--recipe paper_vit_base --output_dir {tmp_path}/RUN --auto_resume"
    assert shown.splitlines()[-1] == f"python3 -u {tmp_path}/RUN/code/main_pretrain.py {flags}"
    assert not (tmp_path / "RUN").exists()


def test_a_run_on_cpus(launch):
    _, shown, _ = launch("linprobe --dry_run --ngpus 0 --tasks_per_node 3 -- --recipe digits_linprobe")
    assert "#SBATCH --ntasks-per-node=3" in shown
    assert "#SBATCH --cpus-per-task=1" in shown
    assert "gpus" not in shown
    assert re.search(r"/jobs/linprobe-\d{8}-\d{6}/code/main_linprobe.py --recipe digits_linprobe --output_dir", shown)


def test_a_probe_is_resumed_by_nothing(launch, tmp_path):
    _, shown, _ = launch("probe --dry_run --ngpus 1 --job_dir JOB -- a.pth --pool token")
    command = f"/JOB/code/scripts/probe.py a.pth --pool token --output_dir {tmp_path}/JOB"
    assert shown.splitlines()[-1].endswith(command)


def test_seeds_and_grid_are_an_array_over_their_product(launch, tmp_path):
    _, shown, _ = launch(
        "finetune --dry_run --job_dir RUN --seeds 0 1 --grid blr=1e-3,2e-3 global_pool=true,false --array_parallelism 3"
        " -- --recipe finetune_vit_base --output_dir OUT"
    )
    assert "#SBATCH --array=0-7%3" in shown
    assert "#SBATCH --output=" + str(tmp_path / "RUN" / "%A_%a_0_log.out") in shown
    commands = [line for line in shown.splitlines() if "/main_finetune.py " in line]
    assert len(commands) == 8
    last = "blr_2e-3-global_pool_false-seed_1"
    assert f"# {last}\n{commands[-1]}" in shown
    assert commands[-1].endswith(
        f"--output_dir OUT --blr 2e-3 --no_global_pool --seed 1 --output_dir {tmp_path}/OUT/{last} --auto_resume"
    )
    folders = {re.findall(r"--output_dir (\S+)", command)[-1] for command in commands}
    assert len(folders) == 8


def test_an_evaluation_is_not_told_to_resume(launch):
    status, shown, _ = launch("finetune --dry_run -- --eval --resume checkpoint.pth --model vit_small_patch16")
    assert status == 0
    assert "--auto_resume" not in shown


def test_a_dry_run_checks_the_weights_against_the_model(launch, tmp_path):
    config = parse_config(PretrainConfig, [*TINY.split(), "--data_path", "x"], "main_pretrain.py")
    torch.save({"model": build_state(config, None, torch.device("cpu"))[0].model.state_dict()}, tmp_path / "good.pth")
    write_images(tmp_path / "val", 3)
    status, shown, _ = launch(f"pretrain --dry_run -- {TINY} --data_path x --init_from good.pth --val_path val")
    assert status == 0
    weights, images = shown.splitlines()[-2:]
    assert weights.startswith("--init_from good.pth: LUT, student, ")
    assert images == "--val_path val: 3 images"
    finetune = f"{TINY_CLASSIFIER} --data_path x --finetune"
    _, shown, _ = launch(f"finetune --dry_run --seeds 0 1 -- {finetune} good.pth")
    assert shown.splitlines()[-1].startswith("--finetune good.pth: LUT, student, ")
    assert shown.count("--finetune good.pth: ") == 1
    other = finetune.replace("nano_patch4", "small_patch16")
    status, _, error = launch(f"finetune --dry_run -- {other} good.pth")
    assert status == 2
    assert "tensors of the encoder do not fit" in error
    status, _, error = launch(f"finetune --dry_run -- {finetune} later.pth")
    assert (status, error.count("\n")) == (2, 1)
    _, shown, _ = launch(f"finetune --dry_run --after 12 -- {finetune} later.pth")
    assert shown.splitlines()[-1] == "--finetune later.pth: not checked, it does not exist yet"


# ---- wrong input: one line, status 2, nothing left behind ---------------------------------------------------

WRONG = {
    "pretrian --": "STAGE pretrian: unknown, did you mean pretrain? (one of pretrain, finetune, linprobe, segment,",
    "pretrain --partition gpu": "`--` is missing: STAGE [flags of the launcher] -- [flags of the stage, or nothing]",
    "probe --": "--ngpus 8: probe runs in one process, add --ngpus 1 or 0",
    "probe --ngpus 1 -- a.pth --resume b": "--resume: unknown flag",
    "pretrain --nods 2 --": "--nods: unknown flag, did you mean --nodes?",
    "pretrain -- --bach_size 4": "--bach_size: unknown flag, did you mean --batch_size?",
    "pretrain -- --mask_ratio 2": "--mask_ratio 2.0: must lie between 0 and 1",
    "pretrain -- --resume x.pth": "--resume x.pth: a requeued job would start from this file again",
    "pretrain --nodes 0 --": "--nodes 0: must be 1 or more",
    "pretrain --timeout 1 --": "--signal_delay 90: must be less than the 60 seconds of --timeout 1",
    "pretrain --tasks_per_node 2 --": "--tasks_per_node 2: a run on GPUs has one process per GPU",
    "pretrain --job_dir x%j --": "--job_dir x%j: must not contain %",
    "pretrain --grid blr --": "--grid blr: write name=value,value",
    "pretrain --grid blr=1e-3, --": "--grid blr=1e-3,: write name=value,value",
    "pretrain --grid brl=1e-3 --": "--brl: unknown flag, did you mean --blr?",
    "pretrain --grid blr=1e-3,-1 --": "--blr -1.0: must be 0 or more",
    "pretrain --grid elastic=yes --": "--grid elastic=yes: elastic is true or false",
    "pretrain --seeds 1 1 --": "--grid and --seeds: seed_1 comes twice",
    "pretrain --cluster local --nodes 2 --": "--nodes 2: --cluster local has one node",
    "pretrain --cluster local --seeds 0 1 --": "--cluster local: does one run, leave out --seeds and --grid",
    "pretrain --": "--cluster slurm: there is no sbatch here, submit from a login node or use --cluster local",
    "pretrain --cluster local --job_dir file/x --": "/file/x: cannot be written (Not a directory), choose another",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(launch, monkeypatch, tmp_path, flags):
    without_tools(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("")
    status, _, error = launch(flags)
    assert status == 2
    assert len(error.splitlines()) == 1
    assert error.startswith("submit.py: error: ")
    assert WRONG[flags] in error
    assert os.listdir(tmp_path) == ["file"]


def test_what_sbatch_refuses_leaves_nothing(launch, monkeypatch, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "sbatch"
    fake.write_text('#!/bin/sh\necho "sbatch: error: invalid account" >&2\necho "sbatch: error: no job" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for _ in range(2):
        status, _, error = launch("pretrain --job_dir RUN --")
        assert (status, error) == (2, "submit.py: error: sbatch refuses: invalid account; no job\n")
    assert not (tmp_path / "RUN").exists()
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "log.jsonl").write_text("")
    launch("pretrain --job_dir RUN --")
    assert os.listdir(tmp_path / "RUN") == ["log.jsonl"]


# ---- the copy of the code -----------------------------------------------------------------------------------


def test_the_copied_code_runs_without_the_project(tmp_path):
    copy = tmp_path / "code"
    copy_code(copy)
    assert (copy / "COMMIT").read_text().strip()
    for name in ("main_pretrain.py", "util/cluster/launch.py", "recipes/quickstart.yaml"):
        assert (copy / name).read_bytes() == (ROOT / name).read_bytes()
    assert not [path for path in copy.rglob("*") if path.is_file() and path.suffix not in (".py", ".yaml", "")]
    code = "import main_finetune, main_pretrain as m, util.config.command_line as c; print(m.__file__, c.RECIPES)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, text=True).stdout
    assert shown.split() == [str(copy / "main_pretrain.py"), str(copy / "recipes")]


def test_each_submission_has_its_own_copy(tmp_path):
    first = unused_folder(tmp_path)
    first.mkdir()
    assert [first.name, unused_folder(tmp_path).name] == ["code", "code-2"]


def test_without_git_the_same_files_are_found(monkeypatch, tmp_path):
    tracked = {path.relative_to(ROOT) for path in code_files()}
    monkeypatch.setenv("PATH", str(tmp_path))
    without_git = {path.relative_to(ROOT) for path in code_files()}
    assert (
        {Path("main_pretrain.py"), Path("util/config/groups.py"), Path("recipes/quickstart.yaml")}
        <= tracked
        <= without_git
    )


# ---- --cluster local ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_job_of_two_processes_requeues_itself_and_ends(launch, flat_folder, tmp_path):
    flags = f"pretrain --cluster local --ngpus 0 --tasks_per_node 2 --follow --job_dir RUN --prologue true -- {TINY}"
    status, shown, error = launch(f"{flags} --data_path flat --max_minutes 1e-4")  # one update a start
    assert status == 0, shown + error
    assert re.search(r"^job +\d+: pretrain, 1 x 2 processes$", shown, re.M)
    assert "requeue: after 0 restarts" in shown
    assert re.search(r"resumed after update \d", shown)
    steps = [json.loads(line)["step"] for line in (tmp_path / "RUN" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "RUN" / "checkpoint-1.pth").exists()


@pytest.mark.slow
def test_follow_ends_with_the_status_of_a_local_job(launch, tmp_path):
    status, shown, _ = launch(
        f"pretrain --cluster local --ngpus 0 --follow --job_dir RUN -- {TINY} --data_path nowhere"
    )
    assert status == 2
    assert "--data_path nowhere: there is no such file or folder" in shown
    status, shown, _ = launch(f"pretrain --cluster local --ngpus 0 --follow --job_dir RUN --prologue false -- {TINY}")
    assert status == 1


@pytest.mark.slow
def test_ctrl_c_ends_the_look_at_a_local_job_but_not_the_job(flat_folder, tmp_path):
    folder = tmp_path / "run"
    flags = f"--cluster local --ngpus 0 --follow --job_dir {folder} -- {TINY} --data_path {flat_folder} --epochs 20"
    command = [sys.executable, str(ROOT / "scripts" / "submit.py"), "pretrain", *flags.split()]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        next(line for line in process.stdout if line.startswith("epoch 1/20 "))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 128 + signal.SIGINT
    deadline = time.monotonic() + 60
    while not (folder / "results.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
