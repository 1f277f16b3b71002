"""--parallel fsdp on two real processes: the curves and files of ddp, while each rank holds half of the state."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

import main_finetune
import main_pretrain
import scripts.convert as convert
from models_lut import LUT, MomentumEncoder
from shared.flags import TINY, TINY_CLASSIFIER
from shared.images import write_images
from shared.ranks import free_port
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.optim.nonfinite import NonFiniteWatch
from util.optim.optimizer import build_optimizer
from util.runtime.distributed import start_processes, stop_processes
from util.runtime.errors import UserError, call_main, run_main
from util.runtime.sharding import CAN_SUM, check_sharding, cut_like, gathered, local, shard
from util.weights.checkpoint import CheckpointStore, load_checkpoint

CPU = torch.device("cpu")
EPOCHS = "--epochs 3 --batch_size 4"  # of 4 updates, of 8 images by two processes
PRETRAIN = f"{TINY} {EPOCHS} --blr 3e-2 --momentum 0.9 --save_freq 3"
CLASSIFY = f"{TINY_CLASSIFIER} {EPOCHS} --blr 1e-2 --model_ema --model_ema_decay 0.8 --per_class"
# the two sum and round in another order, which few images and large steps would magnify
CLIPPED = (
    "--dataset digits --in_chans 1 --batch_size 16 --accum_iter 2 --head_norm_layer LN --max_steps 12 --blr 1e-3"
    " --clip_grad 0.5"
)
PROGRAMS = {"pretrain": (main_pretrain, PRETRAIN), "finetune": (main_finetune, CLASSIFY)}

# folder, program, its flags; one after the other, as some go on where others stopped
RUNS = [
    ("ddp", "pretrain", "--parallel ddp --monitor_freq 3"),
    ("fsdp", "pretrain", "--parallel fsdp --monitor_freq 3"),
    ("clipped_ddp", "pretrain", f"--parallel ddp {CLIPPED}"),
    ("clipped_fsdp", "pretrain", f"--parallel fsdp {CLIPPED}"),
    ("to_ddp", "pretrain", "--parallel fsdp --monitor_freq 3 --max_steps 6"),
    ("to_ddp", "pretrain", "--parallel ddp --monitor_freq 3 --auto_resume"),
    ("to_fsdp", "pretrain", "--parallel ddp --monitor_freq 3 --max_steps 6"),
    ("to_fsdp", "pretrain", "--parallel fsdp --monitor_freq 3 --save_in_background --auto_resume"),
    ("to_one", "pretrain", "--parallel fsdp --max_steps 6"),
    ("nan", "pretrain", "--parallel fsdp --save_freq 1"),
    ("tuned_by_ddp", "finetune", "--parallel ddp --finetune {root}/fsdp/checkpoint-2.pth"),
    ("tuned_by_fsdp", "finetune", "--parallel fsdp --finetune {root}/fsdp/checkpoint-2.pth"),
    ("evaluated", "finetune", "--parallel fsdp --eval --resume {root}/tuned_by_fsdp/checkpoint-2.pth"),
]  # fmt: skip
pytestmark = pytest.mark.skipif(not (dist.is_gloo_available() and CAN_SUM), reason="gloo of this torch cannot average")


def student() -> LUT:
    config = parse_config(PretrainConfig, TINY.split(), "main_pretrain.py")
    torch.manual_seed(0)
    return LUT(**config.model_arguments)


def one_of_two(rank: int, root: Path, ports: list[int]) -> None:
    """Make all runs as one of two processes; write the end of each into a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    ends = []
    for (folder, program, flags), port in zip(RUNS, ports, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        with poisoned(rank) if folder == "nan" else contextlib.nullcontext():
            ends.append(call(program, root, folder, flags))
    os.environ["MASTER_PORT"] = str(ports[-1])
    start_processes("cpu")
    held = share_held(rank)
    stop_processes()
    torch.save((ends, held), root / f"rank{rank}.pth")


def call(program: str, root: Path, folder: str, flags: str) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    main, shared = PROGRAMS[program]
    images = "" if "--dataset" in flags else f"--data_path {root}/images"
    name = Path(main.__file__).name
    sys.argv = [name, *f"{shared} {images} --output_dir {root / folder} {flags.format(root=root)}".split()]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            call_main(name, main.main)
    except SystemExit as stop:
        stop_processes()
        return int(stop.code or 0), errors.getvalue()
    return 0, errors.getvalue()


@contextlib.contextmanager
def poisoned(rank: int) -> Iterator[None]:
    """Rank 1's loss is not a number in update 6."""
    original, calls = LUT.mim_loss, [0]

    def mim_loss(self, *arguments):
        calls[0] += 1
        loss = original(self, *arguments)
        return loss * float("nan") if rank == 1 and calls[0] == 6 else loss

    LUT.mim_loss = mim_loss
    try:
        yield
    finally:
        LUT.mim_loss = original


def share_held(rank: int) -> dict:
    """Step a sharded and a whole model with the same gradients; return what this rank holds, and the weights."""
    model, plain = student(), student()
    follower = MomentumEncoder(model)
    skeleton = shard(model, follower, CPU)
    optimizers = [build_optimizer(m, 1e-2, (0.9, 0.95), 0.05) for m in (model, plain)]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        q.grad = 1e3 * torch.randn_like(q)
        p.grad = cut_like(q.grad, p)
    norms = [NonFiniteWatch(m, CPU, True).gradient_norms() for m in (model, plain)]
    for optimizer in optimizers:
        optimizer.step()
    moments = [state["exp_avg"] for state in optimizers[0].state.values()]
    parts = {"model": [*model.parameters()], "follower": [*follower.parameters()], "moments": moments}
    held = {name: sum(local(x).numel() for x in part) / sum(x.numel() for x in part) for name, part in parts.items()}
    built = gathered(model, skeleton, CPU, keep=rank == 1)
    return {
        "held": held,
        "norms": norms,
        "gathered": None if built is None else built.state_dict(),
        "plain": plain.state_dict(),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of all runs, each ended as its rank's file says."""
    root = tmp_path_factory.mktemp("sharded")
    for split, numbers in (("train", (16, 16)), ("val", (7, 6))):  # 13: no two halves
        for i, number in enumerate(numbers):
            write_images(root / "images" / split / f"class{i}", number, seed=10 * number + i)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(one_of_two, args=(root, [free_port() for _ in range(len(RUNS) + 1)]), nprocs=2)
    return root


def ends(runs: Path, folder: str) -> list[tuple[int, str]]:
    """Return how the runs in a folder ended, on rank 0 and then on rank 1."""
    return [
        end
        for rank in range(2)
        for end, run in zip(torch.load(runs / f"rank{rank}.pth")[0], RUNS, strict=True)
        if run[0] == folder
    ]


def curve(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def same_files(a: Path, b: Path) -> None:
    """Checkpoints with the same keys, types and, up to rounding, numbers."""
    a, b = ({name: x for name, x in load_checkpoint(path).items() if name != "config"} for path in (a, b))
    assert a.keys() == b.keys()
    assert a["binding_settings"] == b["binding_settings"]
    a, b = (dict(leaves(x)) for x in (a, b))
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert type(b[name]) is type(x), name
        if isinstance(x, Tensor):
            torch.testing.assert_close(b[name], x, rtol=1e-5, atol=1e-5, msg=name)


def leaves(state: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value in nested dicts and lists with its path."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, state


# ---- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pre_training_gives_the_curve_pictures_and_files_of_ddp(runs):
    assert [status for folder in ("ddp", "fsdp") for status, _ in ends(runs, folder)] == [0] * 4
    for name in ("loss", "mim", "bc", "grad_norm", "rankme", "knn"):
        expected = curve(runs / "ddp", name)
        assert len(expected) == (2 if name in ("rankme", "knn") else 12)
        assert curve(runs / "fsdp", name) == pytest.approx(expected, rel=1e-5), name
    same_files(runs / "ddp" / "checkpoint-2.pth", runs / "fsdp" / "checkpoint-2.pth")
    assert (runs / "fsdp" / "pictures" / "reconstruction-0003.png").exists()


@pytest.mark.slow
def test_clipping_and_accumulation_give_the_curve_of_ddp(runs):
    for name in ("loss", "mim", "bc", "grad_norm"):
        expected = curve(runs / "clipped_ddp", name)
        assert len(expected) == 12
        assert curve(runs / "clipped_fsdp", name) == pytest.approx(expected, rel=1e-3 if name == "grad_norm" else 1e-5)
    assert min(expected) > 0.5  # all were clipped


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["to_ddp", "to_fsdp"])
def test_a_checkpoint_goes_on_sharded_or_not(runs, folder):
    assert [status for status, _ in ends(runs, folder)] == [0] * 4
    assert curve(runs / folder) == pytest.approx(curve(runs / "ddp"), rel=1e-5)
    same_files(runs / "ddp" / "checkpoint-2.pth", runs / folder / "checkpoint-2.pth")


@pytest.mark.slow
def test_one_process_goes_on(runs, pretrain):
    assert newest(runs / "to_one") == 6
    images = ("--data_path", runs / "images", "--output_dir", runs / "to_one")
    pretrain(
        *PRETRAIN.split(), "--parallel fsdp --batch_size 8 --elastic --auto_resume", *images, output=runs / "to_one"
    )
    assert newest(runs / "to_one") == 12
    assert curve(runs / "to_one") == pytest.approx(curve(runs / "ddp"), rel=2e-3)  # another order of sums


def newest(run: Path) -> int:
    return CheckpointStore(run, 1, None, keep_best=False).list()[-1][1].step


@pytest.mark.slow
def test_fine_tuning_gives_the_curve_scores_and_files_of_ddp(runs):
    for folder in ("tuned_by_ddp", "tuned_by_fsdp", "evaluated"):
        assert [status for status, _ in ends(runs, folder)] == [0, 0]
    for name in ("loss", "grad_norm", "val_loss", "top1"):
        expected = curve(runs / "tuned_by_ddp", name)
        assert curve(runs / "tuned_by_fsdp", name) == pytest.approx(expected, rel=1e-5), name
    same_files(runs / "tuned_by_ddp" / "checkpoint-2.pth", runs / "tuned_by_fsdp" / "checkpoint-2.pth")
    tuned, evaluated = (np.load(runs / folder / "confusion.npy") for folder in ("tuned_by_fsdp", "evaluated"))
    assert tuned.sum() == evaluated.sum() == 13  # each image once
    assert 100 * tuned.trace() / 13 == pytest.approx(expected[-1], rel=1e-5)


@pytest.mark.slow
def test_a_timm_model_of_a_sharded_run(runs, tmp_path, monkeypatch):
    arguments = [runs / "fsdp" / "checkpoint-2.pth", "--to", "timm", "--output", tmp_path / "vit.safetensors"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    run_main("convert.py", convert.main)
    saved, state = load_checkpoint(runs / "ddp" / "checkpoint-2.pth")["model"], load_file(tmp_path / "vit.safetensors")
    for name in ("patch_embed.proj.weight", "blocks.5.mlp.fc1.weight"):
        torch.testing.assert_close(state[name], saved[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_nan_on_one_rank_stops_both(runs):
    for status, errors in ends(runs, "nan"):
        assert status == 1
        assert "the loss is no longer finite: update 6 (loss nan" in errors
        assert errors.count("error") == 1
    assert newest(runs / "nan") == 4


@pytest.mark.slow
def test_each_rank_holds_half_and_steps_as_a_whole_model(runs):
    held = [torch.load(runs / f"rank{rank}.pth")[1] for rank in range(2)]
    for name in ("model", "follower", "moments"):
        shares = [rank_result["held"][name] for rank_result in held]
        assert sum(shares) == pytest.approx(1)
        assert max(shares) < 0.51
    for rank_result in held:
        sharded, plain = rank_result["norms"]
        assert plain.isfinite().all()
        torch.testing.assert_close(sharded, plain, rtol=1e-5, atol=0)
    assert held[0]["gathered"] is None
    gathered = held[1]["gathered"]
    assert gathered.keys() == held[1]["plain"].keys()
    for name, x in held[1]["plain"].items():
        torch.testing.assert_close(gathered[name], x, rtol=1e-5, atol=1e-6, msg=name)


# ---- one process, and what is refused --------------------------------------------------------------------------


def test_one_process_shards_nothing(pretrain, flat_folder, tmp_path):
    flags = ("--data_path", flat_folder)
    expected = pretrain(*flags, output=tmp_path / "ddp")
    assert pretrain(*flags, "--parallel fsdp", output=tmp_path / "fsdp")[-1]["loss"] == expected[-1]["loss"]


def test_what_fsdp_cannot_do_is_said(linprobe, class_folders, capsys):
    with pytest.raises(UserError, match="--parallel fsdp: has no loss scaling for fp16, use --amp bf16 or fp32"):
        check_sharding("fsdp", torch.float16, CPU)
    check_sharding("ddp", torch.float16, CPU)
    check_sharding("fsdp", torch.bfloat16, CPU)
    with pytest.raises(SystemExit) as stop:
        linprobe("--data_path", class_folders, "--parallel fsdp")
    assert stop.value.code == 2
    assert "--parallel fsdp: one layer is trained, use ddp" in capsys.readouterr().err


def test_an_older_gloo_is_refused(monkeypatch):
    monkeypatch.setattr("util.runtime.sharding.CAN_SUM", False)
    check_sharding("fsdp", None, torch.device("cuda"))
    with pytest.raises(UserError, match="does it on GPUs only, use ddp or a newer torch"):
        check_sharding("fsdp", None, CPU)
