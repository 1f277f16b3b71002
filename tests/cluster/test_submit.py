"""The launcher without SLURM: its flags, batch script and code copy, and jobs in the background of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts import submit
from shared.calls import script_caller
from shared.flags import TINY
from util.cluster.jobs import requeue_lines
from util.cluster.launch import SIGNALS, Children, StageJob, rendezvous_port
from util.runtime.files import ROOT


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """Call scripts/submit.py from an empty folder: exit status, stdout, stderr."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return script_caller(monkeypatch, capsys, tmp_path, submit)


def without_tools(monkeypatch, folder: Path) -> None:
    """A PATH on which there is no sbatch."""
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


# ---- wrong input: one line, status 2, nothing left behind ---------------------------------------------------

WRONG = {
    "pretrian --": "STAGE pretrian: unknown, did you mean pretrain? (one of pretrain, finetune, linprobe, segment,",
    "pretrain --partition gpu": "`--` is missing: STAGE [flags of the launcher] -- [flags of the stage, or nothing]",
    "probe --": "--ngpus 8: probe is one process: --ngpus 1, or 0",
    "probe --ngpus 1 -- a.pth --resume b": "--resume: unknown flag",
    "pretrain --nods 2 --": "--nods: unknown flag, did you mean --nodes?",
    "pretrain -- --bach_size 4": "--bach_size: unknown flag, did you mean --batch_size?",
    "pretrain -- --mask_ratio 2": "--mask_ratio 2.0: must lie between 0 and 1",
    "pretrain -- --resume x.pth": "--resume x.pth: a job that is queued again would begin at this file anew",
    "pretrain --nodes 0 --": "--nodes 0: must be 1 or more",
    "pretrain --timeout 1 --": "--signal_delay 90: must be less than --timeout 1 minutes",
    "pretrain --tasks_per_node 2 --": "--tasks_per_node 2: there is one process per GPU",
    "pretrain --job_dir x%j --": "--job_dir x%j: must not contain %",
    "pretrain --grid blr --": "--grid blr: write name=value,value",
    "pretrain --grid blr=1e-3, --": "--grid blr=1e-3,: write name=value,value",
    "pretrain --grid brl=1e-3 --": "--brl: unknown flag, did you mean --blr?",
    "pretrain --grid blr=1e-3,-1 --": "--blr -1.0: must be 0 or more",
    "pretrain --grid elastic=yes --": "--grid elastic=yes: elastic is true or false",
    "pretrain --seeds 1 1 --": "--grid and --seeds: seed_1 comes twice",
    "pretrain --cluster local --nodes 2 --": "--nodes 2: --cluster local has one",
    "pretrain --cluster local --seeds 0 1 --": "--cluster local: does one run, leave out --seeds and --grid",
    "pretrain --": "--cluster slurm: there is no sbatch here, submit from a login node or use --cluster local",
    "pretrain --cluster local --job_dir file/x --": "/file/x: cannot be written (Not a directory), choose another",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(launch, monkeypatch, tmp_path, flags):
    without_tools(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("")
    status, _, said = launch(flags)
    assert status == 2
    assert len(said.splitlines()) == 1
    assert said.startswith("submit.py: error: ")
    assert WRONG[flags] in said
    assert os.listdir(tmp_path) == ["file"]


def test_what_sbatch_refuses_leaves_nothing(launch, monkeypatch, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "sbatch"
    fake.write_text('#!/bin/sh\necho "sbatch: error: invalid account" >&2\necho "sbatch: error: no job" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for _ in range(2):
        status, _, said = launch("pretrain --job_dir RUN --")
        assert (status, said) == (2, "submit.py: error: sbatch refuses: invalid account; no job\n")
    assert not (tmp_path / "RUN").exists()
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "log.jsonl").write_text("")
    launch("pretrain --job_dir RUN --")
    assert os.listdir(tmp_path / "RUN") == ["log.jsonl"]


# ---- the copy of the code -----------------------------------------------------------------------------------


def test_the_copied_code_runs_without_the_project(tmp_path):
    copy = tmp_path / "code"
    submit.copy_code(copy)
    assert (copy / "COMMIT").read_text().strip()
    for name in ("main_pretrain.py", "util/cluster/launch.py", "recipes/quickstart.yaml"):
        assert (copy / name).read_bytes() == (ROOT / name).read_bytes()
    assert not [path for path in copy.rglob("*") if path.is_file() and path.suffix not in (".py", ".yaml", "")]
    code = "import main_finetune, main_pretrain as m, util.config.command_line as c; print(m.__file__, c.RECIPES)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, text=True).stdout
    assert shown.split() == [str(copy / "main_pretrain.py"), str(copy / "recipes")]


def test_each_submission_has_its_own_copy(tmp_path):
    first = submit.unused_folder(tmp_path)
    first.mkdir()
    assert [first.name, submit.unused_folder(tmp_path).name] == ["code", "code-2"]


def test_without_git_the_same_files_are_found(monkeypatch, tmp_path):
    known = {path.relative_to(ROOT) for path in submit.code_files()}
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {path.relative_to(ROOT) for path in submit.code_files()}
    assert {Path("main_pretrain.py"), Path("util/config/groups.py"), Path("recipes/quickstart.yaml")} <= known <= found


# ---- the processes of a job ---------------------------------------------------------------------------------


@pytest.fixture
def in_job(monkeypatch):
    """The variables of a local job; the signal handlers are put back."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "77")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def job_of(script: str, folder: Path, processes: int = 2, max_requeues: int = 3) -> StageJob:
    """A job whose stage is a few lines that append to the file `said`."""
    head = (
        "import os, signal, sys, time\nsay = lambda *x: print(*x, file=open('said', 'a'))\nrank = os.environ['RANK']\n"
    )
    return StageJob((sys.executable, "-c", head + script), str(folder), 1, processes, max_requeues)


def test_ranks_find_each_other_and_start_again_on_another_port(in_job, tmp_path):
    script = "names = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()\nsay(*map(os.getenv, names))\n"
    script += "sys.exit(75 if len(open('said').readlines()) < 4 else 0)"
    assert job_of(script, tmp_path, processes=1)() == 0
    lines = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert [line[:4] for line in lines] == [["0", "0", "1", "127.0.0.1"]] * 4


def test_it_starts_again_no_more_often_than_allowed(in_job, tmp_path, capsys):
    assert job_of("say(rank, os.environ['MASTER_PORT']); sys.exit(75)", tmp_path)() == 75
    lines = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert sorted(rank for rank, _ in lines) == ["0"] * 4 + ["1"] * 4
    assert len({port for _, port in lines}) == 4
    assert capsys.readouterr().out.splitlines()[2:] == [
        "requeue: after 2 restarts",
        "requeue: not again, after --max_requeues 3",
    ]


def test_a_failed_process_ends_the_others(in_job, tmp_path, monkeypatch):
    monkeypatch.setattr("util.cluster.launch.PEERS_SECONDS", 0.5)
    begin = time.monotonic()
    assert job_of("sys.exit(3) if rank == '1' else time.sleep(60)", tmp_path)() == 3
    assert time.monotonic() - begin < 20
    assert job_of("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)", tmp_path)() == 128 + 9


@pytest.mark.parametrize(("number", "starts"), [(signal.SIGTERM, 1), (signal.SIGUSR2, 4)])
def test_a_signal_reaches_the_ranks_even_before_they_listen(in_job, tmp_path, monkeypatch, number, starts):
    """The first one comes at once. SIGTERM is meant for the whole job, the others ask it to save and go on."""
    monkeypatch.setattr("util.cluster.launch.REPEAT_SECONDS", 0.2)
    started = [tmp_path / f"started-{rank}" for rank in (0, 1)]
    script = (
        "open('started-' + rank, 'w')\ntime.sleep(0.7)\n"
        "for n in (10, 12, 15): signal.signal(n, lambda number, frame: (say(rank, number), os._exit(75)))\n"
        "time.sleep(30)"
    )

    def interrupt() -> None:
        for _ in range(starts):
            while not all(path.exists() for path in started):
                time.sleep(0.01)
            for path in started:
                path.unlink()
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert job_of(script, tmp_path)() == 75
    thread.join()
    assert sorted((tmp_path / "said").read_text().split("\n")[:-1]) == [
        f"{rank} {int(number)}" for rank in (0, 1) for _ in range(starts)
    ]


def test_a_second_signal_does_no_harm_while_python_ends(in_job):
    Children([sys.executable, "-c", ""], ".", [dict(os.environ)]).wait()
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)


def test_ports_differ_between_starts_and_lie_below_those_that_linux_hands_out():
    ports = {rendezvous_port(job, restarts) for job in (1, 2, 123456789) for restarts in range(20)}
    assert len(ports) == 60
    assert all(10_000 <= port < 32_768 for port in ports)


# ---- --cluster local ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_job_of_two_processes_requeues_itself_and_ends(launch, flat_folder, tmp_path):
    flags = f"pretrain --cluster local --ngpus 0 --tasks_per_node 2 --follow --job_dir RUN --prologue true -- {TINY}"
    status, shown, said = launch(f"{flags} --data_path flat --max_minutes 1e-6")  # one update a start
    assert status == 0, shown + said
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
