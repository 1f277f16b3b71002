"""Which type a device computes in, what is refused, and when the loss is scaled."""

from __future__ import annotations

import builtins
import io

import pytest
import torch

from models_architectures import ARCHITECTURES
from models_lut import LUT
from util.runtime import amp
from util.runtime.amp import autocast_dtype, choose_attention, computes_in_bf16, cpu_flags, grad_scaler
from util.runtime.errors import UserError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
BF16, FP16 = torch.bfloat16, torch.float16
WITH, WITHOUT = {"fpu", "avx512_bf16"}, {"fpu", "avx2", "avx512f"}


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a processor with these instruction sets, and a GPU of this generation."""

    def pretend(flags: set[str], generation: int = 0) -> None:
        monkeypatch.setattr(amp, "cpu_flags", lambda: flags)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of generation {generation}")

    return pretend


@pytest.mark.parametrize(
    ("choice", "device", "flags", "generation", "dtype"),
    [
        ("auto", CPU, WITH, 0, BF16),
        ("auto", CPU, {"amx_bf16"}, 0, BF16),
        ("auto", CPU, {"asimd", "bf16"}, 0, BF16),  # Arm
        ("auto", CPU, WITHOUT, 9, None),
        ("auto", CPU, set(), 0, None),
        ("bf16", CPU, WITH, 0, BF16),
        ("fp32", CPU, WITH, 0, None),
        ("auto", CUDA, WITHOUT, 8, BF16),
        ("auto", CUDA, WITH, 7, FP16),  # emulated bf16 would be slower than fp32
        ("bf16", CUDA, WITHOUT, 9, BF16),
        ("fp16", CUDA, WITHOUT, 9, FP16),
        ("fp32", CUDA, WITH, 9, None),
        ("auto", MPS, WITH, 0, None),
    ],
)
def test_the_type_that_a_device_computes_in(machine, choice, device, flags, generation, dtype):
    machine(flags, generation)
    assert autocast_dtype(choice, device) is dtype


@pytest.mark.parametrize(
    ("choice", "device", "message"),
    [
        ("bf16", CPU, "--amp bf16: this CPU does not compute in bf16, use --amp auto"),
        ("bf16", CUDA, "--amp bf16: GPU of generation 7 does not compute in bf16, use --amp auto"),
        ("bf16", MPS, "--amp bf16: this MPS does not compute in bf16, use --amp auto"),
        ("fp16", CPU, "--amp fp16: needs a GPU, "),
    ],
)
def test_a_type_that_a_device_cannot_compute_in(machine, choice, device, message):
    machine(WITHOUT, 7)
    with pytest.raises(UserError, match=message) as error:
        autocast_dtype(choice, device)
    assert str(error.value).endswith("use --amp auto")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor: 1\nflags\t\t: fpu\n",
            {"fpu", "avx2", "avx512_bf16"},
        ),
        ("processor : 0\nFeatures : fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor : 0\nmodel name : without any\n", set()),
        (None, set()),
    ],
)
def test_instruction_sets_are_the_kernel_s(monkeypatch, text, flags):
    def kernel(path):
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(builtins, "open", kernel)
    actual, bf16 = cpu_flags(), computes_in_bf16(CPU)
    monkeypatch.undo()
    assert actual == flags
    assert bf16 == bool(flags & {"avx512_bf16", "bf16"})


@pytest.mark.parametrize(("dtype", "scales"), [(FP16, True), (BF16, False), (None, False)])
def test_the_loss_is_scaled_for_fp16_only(dtype, scales):
    scaler, loss = grad_scaler(dtype, CPU), torch.tensor(3.0, requires_grad=True)
    assert scaler.is_enabled() == scales
    scaled = scaler.scale(loss).item()
    assert scaled == 3 * scaler.get_scale()
    assert (scaled > 1000) == scales


@pytest.mark.parametrize("dtype", [BF16, None])
def test_a_scaler_that_is_off_steps_as_if_it_were_not_there(dtype):
    weight = torch.ones(2, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), grad_scaler(dtype, CPU)
    scaler.scale((weight * torch.tensor([1.0, 2.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, 0.0]
    assert scaler.get_scale() == 1
    assert scaler.state_dict() == {}


@pytest.mark.parametrize(("dtype", "device", "fused"), [(BF16, CPU, False), (None, CPU, True), (BF16, CUDA, True)])
def test_attention_is_fused_but_for_bf16_on_a_cpu(dtype, device, fused):
    model = LUT(**ARCHITECTURES["vit_nano_patch4"] | dict(img_size=(16, 16), in_chans=3))
    choose_attention(model, dtype, device)
    assert {block.attn.fused_attn for block in [*model.blocks, *model.decoder_blocks]} == {fused}


def test_both_ways_of_attention_have_the_same_losses_and_gradients():
    torch.manual_seed(0)
    model = LUT(**ARCHITECTURES["vit_nano_patch4"] | dict(img_size=(16, 16), in_chans=3))
    views, noise = torch.randn(1, 3, 3, 16, 16), torch.rand(3, 16)
    results = []
    for dtype in (None, BF16):  # chosen for bf16, computed in fp32
        choose_attention(model, dtype, CPU)
        model.zero_grad()
        loss = model(views, noise).mim
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 50
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-7)
