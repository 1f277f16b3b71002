"""Every error is one line with its cause and cure: of users, of the machine, Ctrl-C, closed pipes, and our own bugs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.flags import TINY
from shared.images import write_images
from shared.ranks import PATIENCE
from util.runtime.errors import (
    INTERRUPT_STATUS,
    REQUEUE_STATUS,
    Requeue,
    RunError,
    UserError,
    exit_with_error,
    printable,
    run_main,
)
from util.runtime.files import ROOT
from util.runtime.logs import RunLog, aligned


def end_of(error: BaseException | str, capsys) -> tuple[int, str]:
    """Exit status and stderr of a main that raises this."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main("x.py", main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("--lr x:\n  must be"), 2, "x.py: error: --lr x: must be\n"),
        (RunError("the loss is NaN"), 1, "x.py: error: the loss is NaN\n"),
        (Requeue("stopped; run it again"), REQUEUE_STATUS, "x.py: stopped; run it again\n"),
        (KeyboardInterrupt(), INTERRUPT_STATUS, "x.py: stopped by Ctrl-C\n"),
        (MemoryError(), 1, "this machine is out of memory: use a smaller --batch_size"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate"),
            1,
            "the GPU is out of memory: use a smaller --batch_size",
        ),
        (
            RuntimeError("unable to write to file </torch_1_2_0>: No space left on device (28)"),
            1,
            "make /dev/shm larger",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. out of shared memory"), 1, "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1, "data loader worker died or hung"),
        (
            RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4"),
            1,
            "another process of the run has ended",
        ),
        (RuntimeError("The server socket has failed to bind: EADDRINUSE: address already in use"), 1, "MASTER_PORT is"),
        (FileNotFoundError(2, "No such file", "run/a.pth"), 1, "No such file (run/a.pth): was the folder deleted"),
        (OSError(5, "Input/output error", "a"), 1, "Input/output error (a): check the disk or the network"),
    ],
)
def test_an_error_is_one_line(error, status, message, capsys):
    code, text = end_of(error, capsys)
    assert code == status
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("of ours"), RuntimeError("shapes"), KeyError("a")])
def test_only_a_bug_of_ours_has_a_traceback_and_says_what_to_report(error, capsys):
    code, text = end_of(error, capsys)
    assert code == 1
    assert text.startswith("Traceback")
    assert text.splitlines()[-1] == (
        "x.py: error: this is a bug; please open an issue of this project with the lines above, the command,"
        " and the run's config.yaml and run.json"
    )


# ---- escape sequences --------------------------------------------------------------------------------------
HOSTILE = "\x1b]0;title\x07\x1b[2Jcat\u202e\x9b31m\udce9"
ESCAPED = r"\x1b]0;title\x07\x1b[2Jcat\u202e\x9b31m\udce9"


def test_names_are_shown_escaped_on_a_terminal(capsys, tmp_path):
    assert printable(HOSTILE) == ESCAPED
    assert printable("é 中\u200c a\tb\nc", keep="\n\t") == "é 中\u200c a\tb\nc"
    with pytest.raises(SystemExit):
        exit_with_error("x.py", f"{HOSTILE}: no image", 2)
    assert capsys.readouterr().err == f"x.py: error: {ESCAPED}: no image\n"
    log = RunLog(tmp_path, None, enabled=True)
    log.text(f"skipped {HOSTILE}")
    RunLog(tmp_path, None, enabled=False).text_of_any_rank(HOSTILE)
    log.close()
    assert capsys.readouterr() == (f"skipped {ESCAPED}\n", f"{ESCAPED}\n")
    assert aligned([[HOSTILE, "1"], ["dog", "22"]]).splitlines()[1] == f"{'dog':<{len(ESCAPED)}}  22"


# ---- real faults of the machine ----------------------------------------------------------------------------


def run(images: Path, output: Path, flags: str = "", before: str = "", after: str = "") -> subprocess.CompletedProcess:
    """Pre-train from a shell: what `before` sets holds for the run, what `after` says follows it."""
    arguments = [*TINY.split(), "--data_path", str(images), "--output_dir", str(output), *flags.split()]
    command = f"{before} {sys.executable} main_pretrain.py {shlex.join(arguments)} {after}"
    settings = dict(
        cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], **settings)


def one_error(end: subprocess.CompletedProcess) -> str:
    """Return the one line that the run ended with."""
    lines = [line for line in end.stderr.splitlines() if "error: " in line]
    assert end.returncode == 1, end.stderr
    assert len(lines) == 1, end.stderr
    assert "Traceback" not in end.stderr
    return lines[0]


@pytest.fixture
def many_images(tmp_path) -> Path:
    write_images(tmp_path / "images", 64)
    return tmp_path / "images"


@pytest.mark.slow
def test_too_many_open_files(many_images, tmp_path):
    end = run(many_images, tmp_path / "run", "--num_workers 8", before="ulimit -n 40;")
    assert "too many files are open: raise the limit (ulimit -n 65536)" in one_error(end)


@pytest.mark.slow
def test_out_of_memory(many_images, tmp_path):
    end = run(many_images, tmp_path / "run", "--head_mlp_dim 900000", before="ulimit -v 5000000;")
    assert "this machine is out of memory: use a smaller --batch_size" in one_error(end)


@pytest.mark.slow
def test_a_small_dev_shm(many_images, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("may not make a mount namespace here")
    inner = ['mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"']
    end = run(many_images, tmp_path / "run", "--num_workers 1", before=f"unshare -m bash -c {shlex.join(inner)} x")
    assert "shared memory is full: make /dev/shm larger" in one_error(end)


@pytest.mark.slow
def test_a_closed_pipe(many_images, tmp_path):
    end = run(many_images, tmp_path / "run", "--epochs 200", after="| head -1")
    assert "the program that reads our output has ended" in one_error(end)
    assert "Exception ignored" not in end.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["deleted", "renamed"])
def test_the_output_folder_disappears(many_images, tmp_path, fault):
    output = tmp_path / "run"
    act = f"rm -r {output}" if fault == "deleted" else f"mv {output} {output}-2"
    watch = f"(until grep -qs step {output}/log.jsonl; do sleep .1; done; {act}) &"
    end = run(many_images, output, "--epochs 300", before=watch)
    assert "was the folder deleted or renamed in the meantime?" in one_error(end)


@given(st.text(st.characters(codec=None)))
def test_printable_text_moves_no_cursor(text):
    shown = printable(text)
    shown.encode()  # also of names that no encoding knows
    assert not any(character < " " or "\x7f" <= character < "\xa0" or character == "\u202e" for character in shown)
    assert printable(shown) == shown
