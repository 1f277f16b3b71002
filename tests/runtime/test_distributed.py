"""Two real processes against one with both batches; devices and what a launcher says."""

from __future__ import annotations

import copy
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from shared.calls import one_line
from shared.ranks import Ranks, command, in_two_processes, with_preface
from util.runtime.distributed import (
    SyncBatchNorm,
    broadcast_module,
    check_in_sync,
    check_same_on_all_ranks,
    choose_device,
    is_main,
    start_processes,
    synchronise_batch_norm,
    world_size,
)
from util.runtime.errors import UserError

ROWS, WIDTH, STEPS = 5, 4, 3  # per rank, of an input, of training
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def batch_norm(affine: bool = True) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(WIDTH, momentum=0.3, affine=affine).double()
    for i, p in enumerate(norm.parameters()):
        nn.init.uniform_(p, generator=torch.Generator().manual_seed(i))
    return norm


def synced(affine: bool = True) -> SyncBatchNorm:
    """Return the same layer, of the class under test."""
    norm = SyncBatchNorm(WIDTH, momentum=0.3, affine=affine).double()
    norm.load_state_dict(batch_norm(affine).state_dict())
    return norm


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of both ranks, not centred, and the gradients of the outputs, [2, ROWS, WIDTH] each."""
    generator = torch.Generator().manual_seed(step)
    x, grad = torch.randn(2, 2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return 3 * x + torch.arange(2)[:, None, None] - 5, grad


def steps(norm: nn.Module, ranks: slice | int) -> list[dict[str, torch.Tensor]]:
    """Return what `norm` computes from the inputs of these ranks, step by step."""
    results = []
    for step in range(STEPS):
        x, grad = (z[ranks].reshape(-1, WIDTH).clone() for z in batches(step))
        norm.zero_grad()
        y = norm(x.requires_grad_())
        y.backward(grad)
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in norm.named_parameters()}
        buffers = {name: b.clone() for name, b in norm.named_buffers()}
        results.append({"output": y.detach(), "gradient of the input": x.grad} | gradients | buffers)
    results.append({"output in eval mode": norm.eval()(x).detach()})
    return results


def drifted_layer(rank: int) -> nn.Linear:
    """Return a layer that is the same on both ranks but for the last bit of one number."""
    layer = nn.Linear(100, 100)
    for p in layer.parameters():
        nn.init.ones_(p)
    layer.weight.data[3, 4] += rank * 2**-23
    return layer


def complaint(call, *arguments) -> str:
    """Return the message of the error that the call raises, or nothing."""
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


FORMS = [(3, WIDTH, 5, 2), (1, WIDTH, 1, 1)]  # feature maps; one pixel of one image per rank


def maps_norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(WIDTH).double()
    for i, p in enumerate(norm.parameters()):
        nn.init.uniform_(p, generator=torch.Generator().manual_seed(i))
    return norm


def maps(form: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    """Return feature maps of both ranks, not centred."""
    return 2 * torch.randn(2, *form, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3


def maps_gradient(form: tuple[int, ...]) -> torch.Tensor:
    return maps(form, seed=2)


def under_autocast(norm: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(nn.Linear(WIDTH, WIDTH)(torch.randn(ROWS, WIDTH))).float().sum().backward()


def one_of_two(rank: int, folder: str) -> None:
    """Compute all that takes two processes; the tests below read what it saves."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for affine in (True, False):
        results[f"affine {affine}"] = steps(synced(affine), rank)

    norm = batch_norm()
    for x in norm.state_dict().values():
        x += rank + 1
    broadcast_module(norm)
    results["broadcast"] = {name: x.clone() for name, x in norm.state_dict().items()}

    results["equal"] = complaint(check_in_sync, norm, "student")
    results["drifted"] = complaint(check_in_sync, drifted_layer(rank), "student")
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0] if rank else [2.0, 1.0]])
    results["swapped"] = complaint(check_in_sync, layer, "student")
    results["bfloat16"] = complaint(under_autocast, SyncBatchNorm(WIDTH))
    for form in FORMS:
        norm, x = maps_norm(SyncBatchNorm), maps(form)[rank].requires_grad_()
        y = norm(x)
        y.backward(maps_gradient(form)[rank])
        results[f"maps {form}"] = dict(output=y.detach(), gradient=x.grad) | dict(norm.named_buffers())
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Return the results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(one_of_two, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@needs_gloo
@pytest.mark.parametrize("form", FORMS)
def test_batch_norm_of_feature_maps_over_two_processes(ranks, form):
    norm, x = maps_norm(nn.BatchNorm2d), maps(form).flatten(0, 1).requires_grad_()
    y = norm(x)
    y.backward(maps_gradient(form).flatten(0, 1))
    results = [r[f"maps {form}"] for r in ranks]
    torch.testing.assert_close(torch.cat([f["output"] for f in results]), y.detach())
    torch.testing.assert_close(torch.cat([f["gradient"] for f in results]), x.grad)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(results[0][name], buffer)
        torch.testing.assert_close(results[1][name], buffer)


@needs_gloo
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_two_processes_is_that_of_one_with_both_batches(ranks, affine):
    alone = steps(batch_norm(affine), slice(None))
    first, second = (rank[f"affine {affine}"] for rank in ranks)
    for expected, a, b in zip(alone, first, second, strict=True):
        assert set(expected) == set(a) == set(b)
        for name, x in expected.items():
            if name in ("gradient of weight", "gradient of bias"):
                combined = a[name] + b[name]  # DistributedDataParallel adds them up
            elif name.startswith(("output", "gradient")):
                combined = torch.cat([a[name], b[name]])
                combined = combined[ROWS:] if len(x) == ROWS else combined
            else:
                combined = a[name]
                assert torch.equal(a[name], b[name]), name
            torch.testing.assert_close(combined, x, rtol=1e-10, atol=1e-10, msg=name)


@needs_gloo
def test_broadcast_gives_both_what_the_first_has(ranks):
    for name, x in batch_norm().state_dict().items():
        for rank in ranks:
            torch.testing.assert_close(rank["broadcast"][name], x + 1, rtol=0, atol=0, msg=name)


@needs_gloo
def test_processes_that_drift_apart_are_noticed_by_both(ranks):
    assert [rank["equal"] for rank in ranks] == ["", ""]
    assert [rank["drifted"] for rank in ranks] == 2 * ["the student differs between ranks, first in weight"]


@needs_gloo
def test_weights_that_differ_but_add_up_to_the_same_are_noticed(ranks):
    assert [rank["swapped"] for rank in ranks] == 2 * ["the student differs between ranks, first in weight"]


@needs_gloo
def test_batch_norm_of_two_processes_under_autocast(ranks):
    assert [rank["bfloat16"] for rank in ranks] == ["", ""]


# ---- one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronised_batch_norm_keeps_names_and_numbers(monkeypatch, device):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    inner = nn.Sequential(batch_norm(affine=False), nn.LayerNorm(WIDTH))
    model = nn.Sequential(nn.Linear(3, WIDTH), batch_norm(), inner).float()
    model[2][0].running_mean += 2
    plain = copy.deepcopy(model)
    assert synchronise_batch_norm(model, torch.device(device)) is model
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())  # one process

    monkeypatch.setenv("WORLD_SIZE", "2")
    synchronised = synchronise_batch_norm(model, torch.device(device))
    layers = (synchronised[1], *synchronised[2][:2])
    assert [type(layer) for layer in layers] == [SyncBatchNorm, SyncBatchNorm, nn.LayerNorm]
    assert (synchronised[1].momentum, synchronised[1].eps) == (0.3, 1e-5)
    assert list(synchronised.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in synchronised.state_dict().items())


def test_without_a_group_synchronised_batch_norm_is_plain():
    for actual, expected in zip(steps(synced(), 0), steps(batch_norm(), 0), strict=True):
        assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    processes = start_processes("cpu")
    assert (processes.rank, processes.world_size, processes.device) == (0, 1, torch.device("cpu"))
    assert not dist.is_initialized()
    norm = batch_norm()
    broadcast_module(norm)
    check_in_sync(norm, "student")
    assert all(torch.equal(x, batch_norm().state_dict()[name]) for name, x in norm.state_dict().items())


def test_the_launcher_s_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert (world_size(), is_main()) == (8, rank == 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="--dist_backend smoke: not in this build of torch, use auto, nccl or gloo"):
        start_processes("cpu", backend="smoke")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=1", "RANK=1 in the environment: but WORLD_SIZE=1"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 in the environment: without RANK and MASTER_ADDR and MASTER_PORT;"),
        ("WORLD_SIZE=", "WORLD_SIZE= in the environment: must be a number from 1;"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0 in the environment: must be a number from 1;"),
        ("MASTER_PORT=abc", "MASTER_PORT=abc in the environment: must be a number from 1;"),
        ("MASTER_PORT=70000", "MASTER_PORT=70000 in the environment: must be a number from 1;"),
        ("LOCAL_RANK=-1", "LOCAL_RANK=-1 in the environment: must be a number from 0;"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=h MASTER_PORT=1", "RANK=2 in the environment: but WORLD_SIZE=2"),
    ],
)
def test_variables_that_another_job_left_are_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for assignment in variables.split():
        monkeypatch.setenv(*assignment.split("="))
    with pytest.raises(UserError) as error:
        start_processes("cpu")
    assert one_line(error).startswith(message)
    assert "start several processes with torchrun or scripts/submit.py" in one_line(error)


# ---- what ranks must have in common ------------------------------------------------------------------------
SAME = {"images": 9, "names of the images": "1f", "seed": 0, "peak lr": 1e-3, "batch_size": 8, "model": "ab"}


def compare(rank: int) -> list[tuple[str, float]]:
    """Return the message about each fact that differs on rank 1, and the seconds until it came."""
    check_same_on_all_ranks(SAME)
    messages = []
    for name in SAME:
        begin = time.perf_counter()
        with pytest.raises(UserError) as error:
            check_same_on_all_ranks(SAME | ({name: "other"} if rank else {}))
        messages.append((one_line(error), time.perf_counter() - begin))
    return messages


@pytest.mark.slow
def test_ranks_with_other_data_or_settings_are_refused_by_name(tmp_path):
    for messages in in_two_processes(compare, tmp_path):
        for (message, seconds), (name, value) in zip(messages, SAME.items(), strict=True):
            assert message.startswith(f"{name}: is {value} on rank 0 but other on rank 1;")
            assert seconds < 1


OTHER = {  # what rank 1 does otherwise, in Python before its program, and the fact that is named
    "--seed": ("sys.argv += ['--seed', '1']", "seed: is 0 on rank 0 but 1 on rank 1;"),
    "--blr": ("sys.argv += ['--blr', '1e-3']", "peak lr: is "),
    "--decoder_depth": ("sys.argv += ['--decoder_depth', '2']", "decoder_depth: is 1 on rank 0 but 2 on rank 1;"),
    "batch": ("sys.argv += ['--accum_iter', '2']", "effective batch: is 16 on rank 0 but 32 on rank 1;"),
    "images": ("sys.argv += ['--data_path', 'FEWER']", "number of images: is 32 on rank 0 but 30 on rank 1;"),
    "names": ("sys.argv += ['--data_path', 'RENAMED']", "names of the images: is "),
}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHER)
def test_a_run_whose_ranks_differ_is_refused_on_all_of_them(flat_folder, tmp_path, other):
    shutil.copytree(flat_folder, fewer := tmp_path / "FEWER")
    for path in list(fewer.glob("*.png"))[:2]:
        path.unlink()
    shutil.copytree(flat_folder, renamed := tmp_path / "RENAMED")
    next(renamed.glob("*.png")).rename(renamed / "other.png")
    code, message = OTHER[other]
    code = code.replace("FEWER", str(fewer)).replace("RENAMED", str(renamed))
    preface = f"import os\nif os.environ['RANK'] == '1': {code}"
    with Ranks(with_preface(preface, command(flat_folder, tmp_path / "run")), 2) as ranks:
        ends = ranks.finish()
    for status, text in ends:
        assert status == 2
        assert f"main_pretrain.py: error: {message}" in text
        assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_rank_has_nothing_to_compare():
    check_same_on_all_ranks(SAME)


@pytest.mark.parametrize(
    ("gpus", "name", "local_rank", "device"),
    [
        (0, "auto", 0, "cpu"),
        (0, "cpu", 1, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda", 0, "cuda:0"),
        (2, "cuda:1", 0, "cuda:1"),
        (2, "cpu", 1, "cpu"),
    ],
)
def test_device(monkeypatch, gpus, name, local_rank, device):
    pretend(monkeypatch, gpus, local_rank)
    assert choose_device(name) == torch.device(device)


def test_a_task_of_slurm_that_sees_its_own_gpu_alone(monkeypatch):
    pretend(monkeypatch, 1, local_rank=3)
    monkeypatch.setenv("SLURM_LOCALID", "0")  # of torchrun, whose processes all see what it sees
    with pytest.raises(UserError, match="process 3 has no GPU, this machine has 1"):
        choose_device("auto")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert choose_device("auto") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("gpus", "name", "local_rank", "message"),
    [
        (0, "cuda", 0, "--device cuda: this machine has no usable GPU, use --device cpu"),
        (0, "cuda:1", 0, "--device cuda:1: this machine has no usable GPU, use --device cpu"),
        (2, "gpu", 0, "--device gpu: no device has that name, use auto, cpu, cuda or cuda:1"),
        (2, "cuda", 2, "--nproc_per_node: process 2 has no GPU, this machine has 2"),
        (2, "cuda:7", 0, "--device cuda:7: this machine has 2 GPUs, counted from 0"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, gpus, name, local_rank, message):
    pretend(monkeypatch, gpus, local_rank)
    with pytest.raises(UserError, match=message):
        choose_device(name)


def pretend(monkeypatch, gpus: int, local_rank: int) -> None:
    """Pretend that the machine has so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
