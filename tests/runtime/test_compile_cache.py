"""The files of torch.compile lie in the run's folder; those that a killed compiler left do not spoil the next run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shared.ranks import Ranks, command, wait_until
from util.runtime.compile_cache import FOLDER, OPEN, VARIABLES, use_compile_cache


@pytest.fixture(autouse=True)
def _no_folders_of_the_user(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "x")  # so that what the code sets is undone
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("was_killed", [True, False])
def test_each_rank_has_a_folder_that_is_emptied_if_its_process_was_killed(tmp_path, was_killed):
    folder = tmp_path / FOLDER / "rank-1"
    for part in ("inductor", "triton"):
        (folder / part).mkdir(parents=True)
        (folder / part / "main.so").touch()
    if was_killed:
        (folder / OPEN).touch()
    use_compile_cache(tmp_path, rank=1)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert any(folder.rglob("main.so")) == (not was_killed)
    assert (folder / OPEN).exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    use_compile_cache(tmp_path, rank=0)
    folder = tmp_path / FOLDER / "rank-0"
    (folder / "inductor").mkdir()
    for variable in VARIABLES:
        del os.environ[variable]
    use_compile_cache(tmp_path, rank=0)
    assert (folder / "inductor").exists()
    assert not any(variable in os.environ for variable in VARIABLES)


def test_folders_that_the_user_has_named_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    use_compile_cache(tmp_path, rank=0)
    assert not list(tmp_path.iterdir())
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_compiled_goes_on_by_the_same_command(flat_folder, tmp_path):
    run = tmp_path / "run"
    flags = command(flat_folder, run, "--compile", "block", "--max_steps", "2")
    cache: Path = run / FOLDER / "rank-0"
    with Ranks(flags, own_group=True) as ranks:
        wait_until(lambda: any(cache.rglob("*.cpp")) or any(cache.rglob("*.so")))
        os.killpg(ranks.processes[0].pid, signal.SIGKILL)
    assert (cache / OPEN).exists()
    for library in [*cache.rglob("*.so"), *(path.with_suffix(".so") for path in cache.rglob("*.cpp"))]:
        library.write_bytes(b"")  # the state that a killed linker leaves
    with Ranks(flags) as ranks:
        assert ranks.finish()[0][0] == 0
    assert any(cache.rglob("*.so"))
    assert not (cache / OPEN).exists()
