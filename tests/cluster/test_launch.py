"""The processes of a job: how they find each other, start again, and end after a signal or a failure."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from util.cluster.launch import SIGNALS, Children, StageJob
from util.cluster.rendezvous import CANDIDATES, candidate_ports
from util.runtime.files import ROOT


@pytest.fixture
def in_job(monkeypatch):
    """Set the variables of a local job; put the signal handlers back afterwards."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "77")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def job_of(script: str, folder: Path, processes: int = 2, max_requeues: int = 3) -> StageJob:
    """Return a job whose stage is a few lines that append to the file `said`."""
    head = (
        "import os, signal, sys, time\nsay = lambda *x: print(*x, file=open('said', 'a'))\nrank = os.environ['RANK']\n"
    )
    return StageJob((sys.executable, "-c", head + script), str(folder), 1, processes, max_requeues)


def test_ranks_get_the_variables_of_torchrun_in_every_start(in_job, tmp_path):
    script = "names = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()\nsay(*map(os.getenv, names))\n"
    script += "sys.exit(75 if len(open('said').readlines()) < 4 else 0)"
    assert job_of(script, tmp_path, processes=1)() == 0
    lines = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert [line[:4] for line in lines] == [["0", "0", "1", "127.0.0.1"]] * 4


def test_it_starts_again_no_more_often_than_allowed(in_job, tmp_path, capsys):
    assert job_of("say(rank); sys.exit(75)", tmp_path)() == 75
    assert sorted((tmp_path / "said").read_text().split()) == ["0"] * 4 + ["1"] * 4
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
    Children().run([sys.executable, "-c", ""], ".", [dict(os.environ)])
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)


def test_candidate_ports_differ_between_starts_and_lie_below_those_that_linux_hands_out():
    ports = [port for job in (1, 2, 123456789) for start in range(20) for port in candidate_ports(job, start)]
    assert len(set(ports)) > 0.9 * len(ports)
    assert all(len(set(candidate_ports(job, 0))) == CANDIDATES for job in range(100))
    assert all(10_000 <= port < 32_768 for port in ports)


MEET = "import torch, torch.distributed as d\nd.init_process_group('gloo')\nx = torch.ones(1)\nd.all_reduce(x)\n"
MEET += "say(rank, int(x), os.environ['MASTER_PORT'])\nd.barrier()\nos._exit(0)"  # no shutdown beside threads of gloo


def test_local_ranks_meet(in_job, tmp_path):
    assert job_of(MEET, tmp_path)() == 0
    lines = sorted(line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert [line[:2] for line in lines] == [["0", "2"], ["1", "2"]]


def test_a_taken_port_does_not_end_a_slurm_job(tmp_path):
    """Two tasks of a job meet though other programs listen at its first two candidate ports, one of them silent."""
    code = f"from cluster.test_launch import MEET, job_of; job_of(MEET, {str(tmp_path)!r}, processes=0)()"
    job = os.getpid()
    variables = dict(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID=str(job), SLURM_NTASKS="2", SLURM_JOB_NUM_NODES="1")
    variables |= dict(SLURM_JOB_NODELIST="localhost", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    with contextlib.ExitStack() as stack:
        for port in candidate_ports(job, 0)[:2]:
            with contextlib.suppress(OSError):  # it is taken already
                stack.enter_context(socket.create_server(("", port)))
        tasks = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | variables | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (1, 0)
        ]
        outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert outputs[1].count("is taken, trying another one") >= 2
    lines = sorted(line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert [line[:2] for line in lines] == [["0", "2"], ["1", "2"]]
    assert lines[0][2] == lines[1][2]
