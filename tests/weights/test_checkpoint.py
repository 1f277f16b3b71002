"""The checkpoint store against what disks and kills do to it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.ranks import newest_step, same_end
from util.runtime.errors import RunError, UserError
from util.runtime.files import ROOT, TEMPORARY, manifest_path
from util.weights.checkpoint import BEST, CheckpointStore, load_checkpoint, read_manifest


def state(number: int, size: int = 1000) -> dict:
    return {"model": {"x": torch.full((size,), float(number))}, "updates": number}


def store(folder: Path, keep_last: int = 2, keep_every: int | None = None, keep_best: bool = True) -> CheckpointStore:
    return CheckpointStore(folder, keep_last, keep_every, keep_best)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".pth"}


def test_what_is_saved_is_loaded(tmp_path):
    assert store(tmp_path).load_latest() is None
    path = store(tmp_path).save(state(7), epoch=3, step=7)
    assert path.name == "checkpoint-3.pth"
    loaded, loaded_path = store(tmp_path).load_latest()
    assert loaded_path == path
    assert torch.equal(loaded["model"]["x"], state(7)["model"]["x"])
    assert {p.name for p in tmp_path.iterdir()} == {path.name, path.name + ".json"}  # no litter


def test_the_newest_is_the_one_with_most_updates(tmp_path):
    store(tmp_path).save(state(10), epoch=9, step=10)
    store(tmp_path).save(state(13), epoch=10, step=13, mid_epoch=True)
    loaded, path = store(tmp_path).load_latest()
    assert (loaded["updates"], path.name) == (13, "checkpoint-10-step13.pth")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 5),
    metrics=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=9),
)
def test_retention_against_the_policy_s_words(tmp_path_factory, keep_last, keep_every, metrics):
    folder = tmp_path_factory.mktemp("store")
    for epoch, metric in enumerate(metrics):
        # re-opened each time, as by a run that is interrupted after every epoch
        store(folder, keep_last, keep_every).save(state(epoch, 1), epoch=epoch, step=epoch + 1, metric=metric)
    epochs = range(len(metrics))
    retained = {e for e in epochs if e >= len(metrics) - keep_last or (keep_every and (e + 1) % keep_every == 0)}
    expected = {f"checkpoint-{e}.pth" for e in retained}
    measured = [m for m in metrics if m is not None]
    if measured:
        expected.add(BEST)
        best = load_checkpoint(folder / BEST)["updates"]
        assert best == metrics.index(max(measured))  # the first of equals
    assert names(folder) == expected
    assert all(read_manifest(folder / name) is not None for name in expected)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, share):
    store(tmp_path).save(state(1), epoch=0, step=1)
    newest = store(tmp_path).save(state(2), epoch=1, step=2)
    os.truncate(newest, int(newest.stat().st_size * share))
    loaded, path = store(tmp_path).load_latest()
    assert (loaded["updates"], path.name) == (1, "checkpoint-0.pth")
    assert "checkpoint-1.pth: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_one_flipped_bit_is_found(tmp_path, capsys, seed):
    store(tmp_path).save(state(1), epoch=0, step=1)
    newest = store(tmp_path).save(state(2), epoch=1, step=2)
    content = bytearray(newest.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed
    newest.write_bytes(content)
    assert store(tmp_path).load_latest()[0]["updates"] == 1
    assert "SHA-256" in capsys.readouterr().err
    with pytest.raises(UserError, match="SHA-256"):
        load_checkpoint(newest)


def test_when_all_are_bad_nothing_is_begun_anew(tmp_path):
    for epoch in (0, 1):
        path = store(tmp_path).save(state(epoch), epoch=epoch, step=epoch + 1)
        os.truncate(path, 10)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        store(tmp_path).load_latest()


def test_a_file_without_manifest_is_taken_last_and_said_so(tmp_path, capsys):
    store(tmp_path).save(state(1), epoch=0, step=1)
    torch.save(state(2), tmp_path / "checkpoint-1.pth")
    assert store(tmp_path).load_latest()[0]["updates"] == 1
    manifest_path(tmp_path / "checkpoint-0.pth").unlink()
    (tmp_path / "checkpoint-0.pth").unlink()
    assert store(tmp_path).load_latest()[0]["updates"] == 2
    assert "no manifest" in capsys.readouterr().err


def test_a_newer_file_without_manifest_is_named_and_the_newest_is_told_by_name(tmp_path, capsys):
    store(tmp_path).save(state(1), epoch=0, step=1)
    for number, name in enumerate(("checkpoint-10.pth", "checkpoint-9.pth", "checkpoint-10-step77.pth")):
        torch.save(state(number + 2), tmp_path / name)
        os.utime(tmp_path / name, (number, number))  # as a copy may leave it
    assert store(tmp_path).load_latest()[0]["updates"] == 1
    output = capsys.readouterr().err
    assert "checkpoint-10.pth has no manifest" in output
    assert "resuming from checkpoint-0.pth" in output
    manifest_path(tmp_path / "checkpoint-0.pth").unlink()
    assert store(tmp_path).load_latest()[0]["updates"] == 2
    with pytest.raises(UserError, match=r"is a folder, give a checkpoint: .*checkpoint-10\.pth$"):
        load_checkpoint(tmp_path)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from util.weights.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), 2, None, True)
print("ready", flush=True)
for n in range(1, 10_000):
    store.save({"x": torch.full((300_000,), float(n)), "updates": n}, epoch=n, step=n, metric=float(n))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_during_saves_leaves_a_complete_checkpoint(tmp_path, kills):
    rng = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.2 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.glob("checkpoint-*.pth"):  # whatever has a final name is whole
            n = load_checkpoint(path)["updates"]
            assert load_checkpoint(path)["x"].eq(n).all()
        with contextlib.suppress(FileNotFoundError):  # killed before the first was saved
            newest = max(json.loads(p.read_text())["step"] for p in tmp_path.glob("checkpoint-*.json"))
            assert store(tmp_path).load_latest()[0]["updates"] == newest
    store(tmp_path).save(state(99_999), epoch=99_999, step=99_999)
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_a_full_disk_is_an_error_and_harms_nothing(small_disk):
    store(small_disk).save(state(1), epoch=0, step=1)
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    with pytest.raises(RunError, match=r"checkpoint-1\.pth could not be saved"):
        store(small_disk).save(state(2, size=1_000_000), epoch=1, step=2)
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


class Evil:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, writer):
    path, touched = tmp_path / "checkpoint-0.pth", tmp_path / "touched"
    writer({"model": Evil(touched)}, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Evil(touched)))  # the trap does work
    assert touched.exists()


@pytest.mark.parametrize("module", ["", "pathlib._local"])  # this Python's own; what 3.13 writes
def test_paths_in_args_of_other_programs_are_read(tmp_path, monkeypatch, module):
    kind = type("PosixPath", (PurePosixPath,), {"__module__": module}) if module else type(Path())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pathlib._local", SimpleNamespace(PosixPath=kind))
        torch.save({"model": {}, "args": argparse.Namespace(output_dir=kind("/ckpt/job"))}, tmp_path / "other.pth")
    assert str(load_checkpoint(tmp_path / "other.pth")["args"].output_dir) == "/ckpt/job"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(range(256)) * 2])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_one_line(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)


def test_a_checkpoint_must_be_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a checkpoint"):
        load_checkpoint(tmp_path / "list.pth")


# ---- saving beside the training --------------------------------------------------------------------------------


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    store = CheckpointStore(tmp_path, 2, None, keep_best=False)
    weights = {"model": {"w": torch.zeros(1000, 1000)}, "updates": 1, "list": [torch.zeros(3)]}
    for step in range(1, 4):
        store.save_in_background(weights | {"updates": step}, epoch=step, step=step)
        weights["model"]["w"] += 1
        weights["list"][0] += 1
    store.wait()
    assert newest_step(tmp_path) == 3
    for epoch in (2, 3):
        saved = load_checkpoint(tmp_path / f"checkpoint-{epoch}.pth")
        assert saved["updates"] == epoch
        assert (saved["model"]["w"] == epoch - 1).all()
        assert (saved["list"][0] == epoch - 1).all()


def test_a_failed_background_save_is_raised_at_the_next_update(tmp_path):
    store = CheckpointStore(tmp_path / "gone", 2, None, keep_best=False)  # a folder that is not there
    store.save_in_background({"w": torch.zeros(3)}, epoch=0, step=1)
    store._writing.exception()
    with pytest.raises(RunError, match="could not be saved"):
        store.raise_failure()
    store.raise_failure()  # once


def test_a_run_that_saves_in_the_background_ends_the_same(pretrain, flat_folder, tmp_path):
    flags = ("--data_path", flat_folder)
    pretrain(*flags, output=tmp_path / "a")
    pretrain(*flags, "--save_in_background --max_steps 6", output=tmp_path / "b")
    pretrain(*flags, "--save_in_background --auto_resume", output=tmp_path / "b")
    same_end(tmp_path / "a", tmp_path / "b")
