"""Every sensible combination of method and switches: one update, a checkpoint, its cost; two processes; whole runs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models_architectures
from engine_pretrain import build_trainer
from models_lut import LUT
from shared.pretrain import config_of, random_batch
from shared.ranks import in_two_processes
from util.config.pretrain import PretrainConfig
from util.data.samples import Batch
from util.train.cost import count_parameters, pretrain_cost
from util.train.pretraining import build_state
from util.weights.export import write_mae
from util.weights.interop import load_weights, read_weights
from util.weights.layouts import part_of

CPU = torch.device("cpu")
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

PICO = dict(
    img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
SWITCHES = (
    "",
    "--steered_tokens none",
    "--steered_tokens all",
    "--context_token cls",
    "--supervision token --shared_crop",
    "--supervision both --shared_crop",
    "--distance smooth_l1",
    "--distance infonce --infonce_temperature 0.1",
    "--context_mask_ratio 0.5",
    "--context_mask_ratio 0.75 --context_token cls --distance infonce",
    "--w_mim 0",
    "--w_mim 0 --supervision both --shared_crop --distance smooth_l1",
    "--steered_tokens all --supervision both --shared_crop --context_token cls",
    "--steered_tokens all --distance infonce --context_mask_ratio 0.5",
    "--mask_unit 16 --norm_pix_loss",
)
METHODS = [f"{method}{switches}" for method in ("", "--method simmim ") for switches in SWITCHES]
COMBINATIONS = [*METHODS, *(f"{flags} --views symmetric" for flags in METHODS if "none" not in flags)]


def add_pico() -> None:
    """Add a model that is smaller than any real one."""
    models_architectures.ARCHITECTURES["vit_pico_patch8"] = models_architectures.MODELS["lut_vit_pico_patch8"] = PICO


@pytest.fixture(autouse=True, scope="module")
def _pico():
    add_pico()
    yield
    del models_architectures.ARCHITECTURES["vit_pico_patch8"], models_architectures.MODELS["lut_vit_pico_patch8"]


def pico_config(flags: str) -> PretrainConfig:
    return config_of(f"--model lut_vit_pico_patch8 --decoder_depth None {flags}")


# ---- one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_every_parameter_learns(flags):
    """DistributedDataParallel waits for the gradient of each."""
    config = pico_config(flags)
    state, _ = build_state(config, None, CPU)
    trainer = build_trainer(config, state, None, CPU, updates_per_epoch=10)
    state.updates = 5  # no longer at learning rate 0
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    trainer.update([random_batch(4)])
    assert not [name for name, p in state.model.named_parameters() if torch.equal(p, before[name])]
    means = trainer.meter.drain()
    assert all(map(math.isfinite, means.values()))
    assert ("mim" in means, "bc" in means) == (config.w_mim > 0, config.has_momentum_encoder)


@pytest.mark.parametrize(
    "flags",
    ["", "--steered_tokens all", "--w_mim 0", "--method simmim --steered_tokens all", "--method simmim --w_mim 0"],
)
def test_checkpoints_are_read_by_all_that_read_checkpoints(flags, tmp_path):
    config, path = pico_config(flags), tmp_path / "checkpoint.pth"
    state, _ = build_state(config, None, CPU)
    torch.save(state.state_dict(), path)
    same = load_weights(config.student_type(**config.model_arguments), path, strict=True)
    assert not same.missing
    assert not same.unexpected
    assert read_weights(path).layout == ("SimMIM, student" if "decoder.weight" in same.loaded else "LUT, student")

    mae = LUT(**pico_config("--alpha 0").model_arguments)
    has_decoder = config.method == "mae" and config.w_mim > 0
    for weights in ("student", "momentum"):
        is_complete = has_decoder and weights == "student"
        loaded = set(load_weights(mae, path, weights).loaded)
        assert loaded == {name for name in mae.state_dict() if is_complete or part_of(name) == "encoder"}
    write_mae(read_weights(path), None, tmp_path / "mae.pth")
    exported = torch.load(tmp_path / "mae.pth")["model"]
    assert set(exported) == {name for name in mae.state_dict() if has_decoder or part_of(name) == "encoder"}


@pytest.mark.parametrize("flags", ["--steered_tokens all", "--w_mim 0 --distance infonce", "--method simmim"])
def test_cost_counts_what_is_there(flags):
    config = pico_config(flags)
    cost = pretrain_cost(config.model_arguments, False, config.student_type)
    student = config.student_type(**config.model_arguments)
    assert cost.student_parameters == count_parameters(student)
    plain = pico_config("--alpha 0 --w_mim 1")
    encoder = [name for name in LUT(**plain.model_arguments).state_dict() if part_of(name) == "encoder"]
    assert cost.encoder_parameters == sum(p.numel() for name, p in student.named_parameters() if name in encoder)


def test_what_costs_more_and_what_costs_less():
    def flops(flags: str) -> int:
        config = pico_config(flags)
        return pretrain_cost(config.model_arguments, False, config.student_type).flops_per_image

    default = flops("")
    assert flops("--steered_tokens none") < flops("--w_mim 0") < default
    assert flops("--context_mask_ratio 0.5") < default < flops("--steered_tokens all") < flops("--method simmim")


# ---- two processes -----------------------------------------------------------------------------------------

TOGETHER = [
    "--distance infonce",
    "--distance infonce --steered_tokens all --views symmetric",
    "--w_mim 0",
    "--w_mim 0 --supervision both --shared_crop",
    "--steered_tokens all --context_mask_ratio 0.5",
    "--supervision token --shared_crop",
    "--method simmim --distance infonce",
    "--method simmim --w_mim 0",
]


def losses_and_gradients(flags: str, ranks: slice) -> dict[str, Tensor]:
    """Return those of images of a batch, in fp64, of the second pass: a parameter left out in the first fails it."""
    config = pico_config(flags)
    state, _ = build_state(config, None, CPU)
    state.model.double()
    state.model_ema.double()
    trainer = build_trainer(config, state, None, CPU, updates_per_epoch=10)
    batch = Batch(*(x[ranks] for x in random_batch(8)))
    views = trainer.normalise(batch.views).double().transpose(0, 1)
    student_views = views if config.views == "symmetric" else views[:1]
    for _ in range(2):
        state.model.zero_grad()
        losses = trainer.model(student_views, batch.noise, trainer.context_targets(views, batch.noise))
        (config.w_mim * losses.mim + config.resolved_alpha * losses.bc).backward()
    gradients = {name: p.grad.clone() for name, p in state.model.named_parameters()}
    return gradients | {name: loss.detach().double() for name, loss in losses._asdict().items()}


def shares(rank: int) -> dict[str, dict[str, Tensor]]:
    """Compute all that takes two processes, from every second image."""
    add_pico()
    return {flags: losses_and_gradients(flags, slice(rank, None, 2)) for flags in TOGETHER}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Return the results of each of two processes."""
    return in_two_processes(shares, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("flags", TOGETHER)
def test_two_processes_are_one_with_the_whole_batch(ranks, flags):
    expected, (first, second) = losses_and_gradients(flags, slice(None)), (rank[flags] for rank in ranks)
    assert set(expected) == set(first) == set(second)
    for name, x in expected.items():
        if name in ("mim", "bc"):
            torch.testing.assert_close((first[name] + second[name]) / 2, x, rtol=1e-6, atol=1e-9, msg=name)
        else:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], x, rtol=1e-5, atol=1e-6 * x.abs().max().item() + 1e-9, msg=name)


# ---- whole runs --------------------------------------------------------------------------------------------


def test_a_run_without_decoder_from_start_to_end(pretrain, flat_folder, tmp_path):
    log = pretrain("--data_path", flat_folder, "--w_mim 0 --monitor_freq 1 --max_steps 4")
    assert all("mim" not in line for line in log)
    assert any("bc" in line for line in log)
    assert any("rankme" in line for line in log)
    assert not (tmp_path / "run" / "pictures").exists()
    assert pretrain("--data_path", flat_folder, "--w_mim 0 --auto_resume")[-1]["step"] == 8


def test_dry_run_counts_what_is_switched_on(pretrain, flat_folder, capsys):
    shown = []
    for flags in ("", "--w_mim 0"):
        pretrain("--data_path", flat_folder, flags, "--dry_run")
        shown.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("GFLOP")))
    assert shown[0] != shown[1]
