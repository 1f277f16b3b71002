"""Samples, the order of batches, data loader workers, streams."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, get_worker_info

from shared.calls import one_line
from shared.images import colours, encode
from shared.ranks import ROOT
from shared.streams import Numbers
from util.config.pretrain import PretrainConfig
from util.data.decode import decode
from util.data.labelled import LabelledDataset
from util.data.loader import Loader, training_loader
from util.data.samples import BatchOrder, PretrainDataset, PretrainStream
from util.data.sources import ArraySource, FileSource
from util.data.views import Normalise, TwoViews, centre_view, sample_generator
from util.runtime.errors import UserError, loaders_death, run_main
from util.runtime.logs import RunLog
from util.train.pretraining import build_loader
from util.train.trainer import report_bad_images

quick = settings(max_examples=60, deadline=None)

# ---- samples for pre-training ------------------------------------------------------------------------------
SIZE, PATCHES = (16, 16), 4


def image_files(root, good, total):
    """Return a FileSource of `total` files; those in `good` are images, the others text."""
    root.mkdir(exist_ok=True)
    paths = [str(root / f"{n:03}.png") for n in range(total)]
    for n, path in enumerate(paths):
        Path(path).write_bytes(encode(colours(20, 24, seed=n)) if n in good else b"no image")
    return FileSource(paths, [n % 2 for n in range(total)], ["even", "odd"])


def pretrain_dataset(source, seed=0, skip_bad=False):
    return PretrainDataset(source, TwoViews(SIZE), PATCHES, 3, seed, skip_bad)


def test_sample_is_noise_then_views_of_its_generator(tmp_path):
    source = image_files(tmp_path, range(3), 3)
    sample = pretrain_dataset(source, seed=5)[7, 2]
    rng = sample_generator(5, 7, 2)
    noise = rng.random(PATCHES, dtype=np.float32)
    assert torch.equal(sample.noise, torch.from_numpy(noise))
    assert torch.equal(sample.views, TwoViews(SIZE)(decode(source.read(2), 3), rng))
    assert (sample.index, sample.read_index) == (2, 2)
    assert sample.views.shape == (2, 3, *SIZE)
    assert sample.views.dtype == torch.uint8


def test_bad_image_is_an_error_that_names_it(tmp_path):
    source = image_files(tmp_path, {0, 2}, 3)
    with pytest.raises(UserError) as error:
        pretrain_dataset(source)[0, 1]
    assert one_line(error) == (
        f"{tmp_path}/001.png: cannot be read (no image, or of an unknown format); mend it or add --on_bad_image skip"
    )
    os.remove(source.paths[2])
    with pytest.raises(UserError, match=r"002\.png: cannot be read .*No such file"):
        pretrain_dataset(source)[0, 2]


def test_skip_takes_the_next_readable_image_every_time(tmp_path):
    source = image_files(tmp_path, {0, 3}, 6)
    dataset = pretrain_dataset(source, skip_bad=True)
    for _ in range(2):
        assert [int(dataset[0, index].read_index) for index in range(6)] == [0, 3, 3, 3, 0, 0]
    taken = dataset[0, 4]
    assert taken.index == 4
    rng = sample_generator(0, 0, 4)  # with the randomness of the sample that it stands for
    rng.random(PATCHES, dtype=np.float32)
    assert torch.equal(taken.views, TwoViews(SIZE)(decode(source.read(0), 3), rng))


def test_skip_gives_up(tmp_path, monkeypatch):
    dataset = pretrain_dataset(image_files(tmp_path, {5}, 6), skip_bad=True)
    monkeypatch.setattr("util.data.decode.MOST_BAD_IN_A_ROW", 4)
    assert dataset[0, 2].read_index == 5
    with pytest.raises(UserError) as error:
        dataset[0, 1]
    assert one_line(error) == f"--on_bad_image skip: 4 unreadable images in a row from {tmp_path}/001.png on"
    dataset = pretrain_dataset(image_files(tmp_path, {}, 3), skip_bad=True)
    with pytest.raises(UserError, match="3 unreadable images in a row"):
        dataset[0, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_image_in_a_loader_ends_the_program_with_one_line(tmp_path, capsys, num_workers):
    dataset = pretrain_dataset(image_files(tmp_path, {0, 2, 3}, 4))
    loader = training_loader(dataset, BatchOrder(4, 2, 1, 0, 1, 0), num_workers, False, 60)
    with pytest.raises(SystemExit) as stop:
        run_main("main_pretrain.py", lambda: list(loader))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"main_pretrain.py: error: {tmp_path}/001.png: cannot be read (no image, or of an unknown format);"
        " mend it or add --on_bad_image skip\n"
    )


# ---- order -------------------------------------------------------------------------------------------------
def updates(order):
    """Return the order's batches, as (epoch, index) pairs, in groups that make an update."""
    batches = list(order)
    assert len(batches) == len(order)
    return [batches[k : k + order.accum_iter] for k in range(0, len(batches), order.accum_iter)]


def splits(effective_batch):
    """Return all (batch_size, accum_iter, world_size) of an effective batch."""
    numbers = range(1, effective_batch + 1)
    return [split for split in itertools.product(numbers, repeat=3) if np.prod(split) == effective_batch]


@quick
@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_an_update_holds_the_same_samples_for_any_ranks_and_parts(num_samples, effective_batch, seed, epoch):
    reference = None
    for batch_size, accum_iter, world_size in splits(effective_batch):
        ranks = [BatchOrder(num_samples, batch_size, accum_iter, r, world_size, seed, epoch) for r in range(world_size)]
        number = num_samples // effective_batch
        assert all(order.updates_per_epoch == number for order in ranks)
        per_rank = [updates(order) for order in ranks]
        assert all(len(of_rank) == number for of_rank in per_rank)
        assert all(len(batch) == batch_size for of_rank in per_rank for update in of_rank for batch in update)
        together = [
            sorted(sample for of_rank in per_rank for batch in of_rank[k] for sample in batch) for k in range(number)
        ]
        reference = reference or together
        assert together == reference
        samples = [index for update in together for _, index in update]
        assert len(samples) == len(set(samples)) == number * effective_batch
        assert set(samples) <= set(range(num_samples))
        assert {sample_epoch for update in together for sample_epoch, _ in update} <= {epoch}


@quick
@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    accum_iter=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 400),
    place=st.floats(0, 1),
)
def test_a_resumed_epoch_is_the_tail_of_the_whole(num_samples, batch_size, accum_iter, world_size, epoch, place):
    for rank in range(world_size):
        order = BatchOrder(num_samples, batch_size, accum_iter, rank, world_size, seed=3, epoch=epoch)
        all_updates = updates(order)
        order.start_update = start = round(place * order.updates_per_epoch)
        assert updates(order) == all_updates[start:]
        order.start_update = 0
        assert updates(order) == all_updates


def test_epochs_and_seeds_have_their_own_orders_and_leave_out_other_samples():
    def order(seed, epoch):
        return [index for batch in BatchOrder(50, 4, 1, 0, 1, seed, epoch) for _, index in batch]

    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in range(4) for epoch in range(25)}
    assert len(set(orders.values())) == 100
    assert all(len(samples) == 48 for samples in orders.values())
    assert set().union(*(set(range(50)) - set(samples) for samples in orders.values())) == set(range(50))


def test_too_few_samples_make_no_update():
    order = BatchOrder(num_samples=7, batch_size=2, accum_iter=2, rank=0, world_size=2, seed=0)
    assert order.updates_per_epoch == len(order) == 0
    assert list(order) == []


# ---- loader ------------------------------------------------------------------------------------------------
def run_epochs(dataset, num_workers, epochs=(0, 1), start=0, **order):
    """Return all batches of some epochs through one loader."""
    order = BatchOrder(len(dataset.source), 4, 1, 0, 1, 0)
    loader = training_loader(dataset, order, num_workers, pin_memory=False, timeout=60)
    batches = []
    for epoch in epochs:
        order.epoch, order.start_update = epoch, start
        batches.append(list(loader))
        start = 0
    return batches


def equal(one, other):
    """True if two epochs are the same to the byte."""
    assert len(one) == len(other)
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


class BreaksOff(Dataset):
    """Its worker hands over no more memory once it is asked for a third sample, and does not end either."""

    def __init__(self):
        self.broken = multiprocessing.Event()

    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index == 2:
            time.sleep(1)  # in which the thread that hands over the sample before this one has announced it
            resource_sharer.stop()
            self.broken.set()
            time.sleep(600)
        return torch.zeros(4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems share memory in another way")
def test_a_batch_that_breaks_off_names_the_loader():
    """A worker killed a moment ago leaves its batch like this: announced, and not to be fetched."""
    dataset = BreaksOff()
    batches = iter(Loader(dataset, batch_size=1, num_workers=1, loader_timeout=60.0))
    next(batches)
    assert dataset.broken.wait(60)  # the second batch is announced
    with pytest.raises(RuntimeError, match=r"a batch broke off \(\w+Error") as raised:
        next(batches)
    assert loaders_death(raised.value) is raised.value


class Unreadable(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError("the disk is gone")


def test_what_a_data_set_raises_in_a_loader_worker_is_no_death_of_it():
    with pytest.raises(OSError, match="the disk is gone") as raised:
        next(iter(Loader(Unreadable(), num_workers=1, loader_timeout=20.0)))
    assert loaders_death(raised.value) is None


def test_loader_workers_outlive_the_sigterm_of_a_whole_group(tmp_path):
    dataset = pretrain_dataset(image_files(tmp_path, set(range(14)), 14))
    batches = iter(training_loader(dataset, BatchOrder(14, 1, 1, 0, 1, 0), 2, pin_memory=False, timeout=60))
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    assert len(list(batches)) == 13


HANGS = """
import sys, time
from util.data.loader import Loader
class Hangs:
    __len__ = lambda self: 4
    def __getitem__(self, index):
        if index:
            print("asked", flush=True)
            time.sleep(600)
        return index
batches = iter(Loader(Hangs(), num_workers=1, persistent_workers=True))
next(batches)
sys.stdin.readline()
sys.exit(3)
"""


def test_a_loader_worker_that_hangs_does_not_hold_up_the_exit():
    command = [sys.executable, "-c", HANGS]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == "asked\n"
        process.stdin.close()
        try:
            assert process.wait(timeout=60) == 3
        finally:
            process.kill()


def test_batches_do_not_depend_on_loader_workers(tmp_path):
    dataset = pretrain_dataset(image_files(tmp_path, set(range(14)) - {6}, 14), skip_bad=True)
    first, second = run_epochs(dataset, num_workers=0)
    for batch in (*first, *second):
        assert batch.views.shape == (4, 2, 3, *SIZE)
        assert batch.views.dtype == torch.uint8
        assert batch.noise.shape == (4, PATCHES)
        assert batch.noise.dtype == torch.float32
        assert batch.index.shape == batch.read_index.shape == (4,)
        assert batch.index.dtype == torch.int64
    assert len(first) == len(second) == 3
    assert not torch.equal(first[0].index, second[0].index)
    for of_one in first:  # the same image has other views in another epoch
        for of_two in second:
            for i, j in (of_one.index[:, None] == of_two.index[None]).nonzero().tolist():
                assert not torch.equal(of_one.views[i], of_two.views[j])
                assert not torch.equal(of_one.noise[i], of_two.noise[j])
    for num_workers in (1, 2):
        epochs = run_epochs(dataset, num_workers)
        assert equal(epochs[0], first)
        assert equal(epochs[1], second)
    resumed = run_epochs(dataset, 2, start=2)
    assert equal(resumed[0], first[2:])
    assert equal(resumed[1], second)


def test_labelled_images(tmp_path):
    source = image_files(tmp_path, {0, 1, 3}, 4)
    dataset = LabelledDataset(source, [3, 0], (8, 8), 3)
    assert len(dataset) == 2
    view, label = dataset[0]
    assert torch.equal(view, centre_view(decode(source.read(3), 3), (8, 8)))
    assert label == 1
    with pytest.raises(UserError, match=r"002\.png: cannot be read"):
        LabelledDataset(source, [2], (8, 8), 3)[0]
    assert LabelledDataset(source, [2], (8, 8), 3, skip_bad=True)[0][1] == source.labels[3]
    unlabelled = ArraySource(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, None, "x")
    assert LabelledDataset(unlabelled, [1], (8, 8), 1)[0][1] == -1


def test_normalise_is_of_pixels_in_0_to_1():
    pixels = torch.randint(256, (2, 2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (pixels.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    normalised = Normalise(mean, std, torch.device("cpu"))(pixels)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised, expected, atol=2e-6)


def run_stream(num_workers, epochs=(0, 1), rank=0, skip_bad=False, bad=(), parts=12, start=0):
    """Return three batches of each epoch, without the first `start`."""
    stream = PretrainStream(
        Numbers(bad, parts), TwoViews(SIZE), PATCHES, 3, 0, rank, skip_bad, batch_size=4, start_batch=start
    )
    loader = training_loader(stream, BatchOrder(12, 4, 1, 0, 1, 0), num_workers, False, 60)
    batches = []
    for epoch in epochs:
        stream.epoch = epoch
        batches.append(list(itertools.islice(loader, 3 - start)))
    return batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_gives_batches_that_differ_between_epochs_and_repeat(num_workers):
    first, second = run_stream(num_workers)
    for batch in (*first, *second):
        assert batch.views.shape == (4, 2, 3, *SIZE)
        assert batch.noise.shape == (4, PATCHES)
    numbers = torch.cat([batch.index for batch in first]).tolist()
    assert len(set(numbers)) == 12
    assert not any(torch.equal(a.views, b.views) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].noise, second[0].noise)
    again = run_stream(num_workers, epochs=(1, 0))
    assert equal(again[0], second)
    assert equal(again[1], first)


def test_stream_is_told_the_epoch(monkeypatch):
    epochs_set = []
    monkeypatch.setattr(Numbers, "set_epoch", lambda self, epoch: epochs_set.append(epoch))
    next(iter(PretrainStream(Numbers(), TwoViews(SIZE), PATCHES, 3, 0, 0, epoch=7)))
    assert epochs_set == [7]


def test_stream_of_another_rank_has_other_randomness():
    (first,), (other,) = run_stream(0, epochs=(0,)), run_stream(0, epochs=(0,), rank=1)
    assert not torch.equal(first[0].views, other[0].views)
    assert not set(first[0].index.tolist()) & set(other[0].index.tolist())


def test_stream_goes_on_after_its_end_with_new_randomness():
    stream = PretrainStream(Numbers(), TwoViews(SIZE), PATCHES, 3, 0, 0)
    samples = list(itertools.islice(stream, 24))
    assert not any(torch.equal(a.views, b.views) for a, b in zip(samples[:12], samples[12:], strict=True))


def test_bad_image_in_a_stream():
    with pytest.raises(UserError) as error:
        run_stream(0, bad={5})
    assert "--on_bad_image skip" in one_line(error)
    ((*_, last),) = run_stream(0, epochs=(0,), skip_bad=True, bad={5})
    assert last.index.tolist() == [8, 9, 10, 11]
    with pytest.raises(UserError):
        run_stream(0, skip_bad=True, bad=range(12))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("bad", [set(), {1, 5}])
def test_stream_entered_in_mid_epoch_goes_on_with_what_it_has_not_had(num_workers, start, bad):
    full_epoch = run_stream(num_workers, skip_bad=bool(bad), bad=bad)
    resumed = run_stream(num_workers, skip_bad=bool(bad), bad=bad, start=start)
    for all_batches, tail in zip(full_epoch, resumed, strict=True):
        assert equal(tail, all_batches[start:])


class Drawn(Numbers):
    """A stream whose reader draws the order from one generator of the worker's seed, as timm's reader of wds/ does."""

    rng = None

    def __iter__(self):
        worker = get_worker_info()
        self.rng = self.rng or np.random.default_rng(worker.seed if worker else 42)
        for n in self.rng.permutation(12):
            yield encode(colours(20, 24, seed=n)), n


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_s_reader_draws_the_same_order_after_a_resume(num_workers):
    def epochs(numbers, start, noise):
        torch.manual_seed(noise)  # what else the process has drawn
        stream = PretrainStream(Drawn(), TwoViews(SIZE), PATCHES, 3, 0, 0, batch_size=4)
        loader = training_loader(stream, BatchOrder(12, 4, 1, 0, 1, 0), num_workers, False, 60)
        for stream.epoch in numbers:
            stream.start_batch = start
            yield list(itertools.islice(loader, 3 - start))

    _, full_epoch = epochs([0, 1], start=0, noise=6)
    (resumed,) = epochs([1], start=1, noise=5)
    assert equal(resumed, full_epoch[1:])


def test_what_a_stream_leaves_out_is_counted(capsys, tmp_path):
    log = RunLog(tmp_path, None, enabled=True)
    batches = run_stream(0, epochs=(0,), skip_bad=True, bad={5, 6})[0]
    assert [report_bad_images([batch], Numbers(), log) for batch in batches] == [0, 2, 0]
    assert capsys.readouterr().out == "left out 2 unreadable samples of the stream\n"


def test_on_bad_image_reaches_a_stream():
    config = dataclasses.replace(PretrainConfig(model="lut_vit_nano_patch4"), on_bad_image="skip", num_workers=0)
    loader = build_loader(config, Numbers({1}), BatchOrder(12, 4, 1, 0, 1, 0), torch.device("cpu"))
    assert loader.dataset.skip_bad
    assert loader.dataset.batch_size == config.batch_size


def test_stream_without_a_part_for_each_process_does_not_hang(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main("x", lambda: run_stream(2, parts=1))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("x: error: --dataset: the stream holds no samples")


def test_names_that_no_encoding_knows_are_printed_with_escapes():
    code = "from util.runtime.errors import run_main; run_main('x', lambda: print('a\\udcff'))"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    root = ROOT
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=root, check=True)
    assert process.stdout == b"a\\udcff\n"
