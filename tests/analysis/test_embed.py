"""scripts/embed.py: features in files, against the encoder itself."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scripts import embed as script
from shared.calls import script_caller
from shared.checkpoints import save_lut
from shared.ranks import Ranks, wait_until
from util.analysis.embedding import nearest, read_shards
from util.analysis.probe import extract_features
from util.data.datasets import open_images
from util.data.labelled import LabelledDataset
from util.runtime.files import ROOT
from util.weights.vit import open_vit, pooled, tokens_of

CPU = torch.device("cpu")
FLAGS = "--num_workers 0 --batch_size 5 --shard_size 12 --device cpu"


@pytest.fixture
def checkpoint(tmp_path):
    return save_lut(tmp_path / "checkpoint-1.pth")


@pytest.fixture
def embed(monkeypatch, capsys, tmp_path):
    return script_caller(monkeypatch, capsys, tmp_path, script)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("weights", ["student", "momentum"])
def test_features_are_the_encoder_s(embed, checkpoint, class_folders, tmp_path, weights):
    embed(f"{checkpoint} --data_path {class_folders} --output {tmp_path / 'out'} --weights {weights} {FLAGS}"
          " --kinds cls mean patch")  # fmt: skip
    vit, source = open_vit(str(checkpoint), weights, "", (), None, CPU), open_images(str(class_folders), "", "train")
    loader = torch.utils.data.DataLoader(
        LabelledDataset(source, range(len(source)), vit.size, vit.in_chans), batch_size=32
    )
    for kind, pool in (("cls", "token"), ("mean", "avg")):
        expected, labels = extract_features(
            lambda pixels, pool=pool: pooled(vit.model, tokens_of(vit.model, vit.images(pixels)), pool), loader
        )
        torch.testing.assert_close(torch.cat(list(read_shards(tmp_path / "out", kind))), expected, atol=1e-5, rtol=1e-5)
    patches = torch.cat(list(read_shards(tmp_path / "out", "patch")))
    assert patches.shape == (32, np.prod(vit.model.patch_embed.grid_size), vit.model.embed_dim)
    torch.testing.assert_close(patches.mean(dim=1), torch.cat(list(read_shards(tmp_path / "out", "mean"))))
    with (tmp_path / "out" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [source.name(i) for i in range(32)]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert {row["class"] for row in rows} == {"cat", "dog"}


@pytest.mark.parametrize("flags", ["", "--format npy", "--dtype fp16"])
def test_an_interrupted_call_goes_on_to_equal_bytes(embed, checkpoint, flat_folder, tmp_path, flags):
    embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'whole'} {FLAGS} {flags}")
    embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'cut'} {FLAGS} {flags}")
    for path in (tmp_path / "cut").glob("shard-00001*"):
        path.unlink()
    (tmp_path / "cut" / ".unfinished-shard-00001.safetensors").write_text("of a killed call")
    embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'cut'} {FLAGS} {flags}")
    expected = files_of(tmp_path / "whole")
    assert len(expected) > 3
    assert {name: content for name, content in files_of(tmp_path / "cut").items() if name in expected} == expected


def test_embeddings_with_other_settings_are_refused(embed, checkpoint, flat_folder, tmp_path):
    embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'out'} {FLAGS}")
    status, _, error = embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'out'} {FLAGS} --kinds cls")
    assert status == 2
    assert "holds embeddings with kinds ['cls', 'mean'], here it is ['cls']" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "--kinds": "--kinds",
        "--kinds cls cls": "give each kind once",
        "--shard_size 0": "--shard_size 0: must be 1 or more",
        "--input_size 33": "33",
        "--query nothing.jpg": "nothing.jpg",
        "--kinds patch --query a.jpg": "needs cls or mean features",
        "--data_path nowhere": "there is no such file or folder",
    }.items(),
)
def test_wrong_input_is_one_line(embed, checkpoint, flat_folder, tmp_path, flags, message):
    status, _, error = embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'out'} {FLAGS} {flags}")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert message in error


def test_neighbours_are_those_of_all_pairs_and_are_drawn(embed, checkpoint, flat_folder, tmp_path):
    query = sorted(flat_folder.rglob("*.png"))[3]
    embed(f"{checkpoint} --data_path {flat_folder} --output {tmp_path / 'out'} {FLAGS} --query {query} --neighbours 3")
    assert (tmp_path / "out" / "neighbours.png").stat().st_size > 1000
    features = torch.cat(list(read_shards(tmp_path / "out", "mean")))
    unit = torch.nn.functional.normalize(features, dim=1)
    expected = (unit[:4] @ unit.T).sort(dim=1, descending=True)
    rows, cosines = nearest(tmp_path / "out", "mean", features[:4], 5)
    torch.testing.assert_close(cosines, expected.values[:, :5])
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def command(checkpoint, images, output, *flags):
    return [
        "scripts/embed.py",
        str(checkpoint),
        "--data_path",
        str(images),
        "--output",
        str(output),
        *FLAGS.split(),
        *flags,
    ]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, class_folders, tmp_path):
    with Ranks(command(checkpoint, class_folders, tmp_path / "one")) as ranks:
        assert [status for status, _ in ranks.finish()] == [0]
    with Ranks(command(checkpoint, class_folders, tmp_path / "two"), 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(checkpoint, class_folders, tmp_path):
    with Ranks(command(checkpoint, class_folders, tmp_path / "whole", "--shard_size", "1")) as ranks:
        assert ranks.finish()[0][0] == 0
    expected = files_of(tmp_path / "whole")
    call = [sys.executable, *command(checkpoint, class_folders, tmp_path / "killed", "--shard_size", "1")]
    process = subprocess.Popen(call, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(lambda: len(list((tmp_path / "killed").glob("shard-*"))) >= 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "killed").glob("shard-*"))) < 32
    subprocess.run(call, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert {name: data for name, data in files_of(tmp_path / "killed").items() if name in expected} == expected


def test_the_five_lines_of_the_docs_read_them(embed, checkpoint, class_folders, tmp_path):
    embed(f"{checkpoint} --data_path {class_folders} --output {tmp_path / 'out'} {FLAGS}")
    shards = sorted((tmp_path / "out").glob("shard-*.safetensors"))
    features = torch.cat([load_file(path)["mean"] for path in shards])
    assert len(features) == 32
