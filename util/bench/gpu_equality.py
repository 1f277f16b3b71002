"""Stage `equality` of the GPU check: an update of each task on the device equals that of the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from engine_finetune import ClassifierTrainer
from engine_segment import SegmenterTrainer
from models_upernet import UperNet
from models_vit import Classifier, LinearProbe
from util.bench.config import StepConfig
from util.bench.gpu_runner import Recorder
from util.bench.step import Stepper
from util.bench.variant import step_variants
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.segment import SegmentConfig
from util.data.labelled import LabelledBatch
from util.data.masked_samples import MaskedBatch
from util.data.views import Normalise
from util.optim.optimizer import build_lars
from util.runtime.amp import autocast_dtype
from util.train.state import adamw, initial_state

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # relative, of losses and gradient norms
CLASSES, UPDATES = 10, 2
SMALL = "--model lut_vit_small_patch16 --depth 4 --input_size 96 --batch_size 8 --variants ours"
TINY = "--model lut_vit_nano_patch4 --patch_size 8 --depth 2 --head_mlp_dim 16 --batch_size 6 --variants ours"
PRETRAINING = {
    "LUT, paper": "--forms asymmetric",
    "LUT, release": "--forms symmetric",
    "MAE": "--forms mae",
    "SimMIM": "--forms mae --method simmim",
    "LUT, augmented on the device": "--forms asymmetric --augment_on device",
    "LUT, cached on the device": "--forms asymmetric --augment_on device --cache device",
}


def equality(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Compare masks and views bit by bit, then losses and gradient norms of two updates, in fp32 and mixed precision.

    Args:
        tiny: use the smallest models, for a rehearsal on a CPU.
    """
    torch.backends.cudnn.allow_tf32 = False  # the patch projection is a convolution
    size = TINY if tiny else SMALL
    lowered = autocast_dtype("auto", device)
    formats = ["fp32"] if lowered is None else ["fp32", "bf16" if lowered is torch.bfloat16 else "fp16"]
    for name, flags in PRETRAINING.items():
        recorder.attempt(f"{name}, masks and views", lambda f=flags: compare_draws(f"{size} {f}", device))
    for amp in formats:
        for name, flags in PRETRAINING.items():
            recorder.attempt(
                f"{name}, {amp}",
                lambda f=flags, a=amp: compare_updates(lambda d, p: losses_of(f"{size} {f}", d, p), device, a),
            )
        for name, build in DOWNSTREAM.items():
            recorder.attempt(f"{name}, {amp}", lambda b=build, a=amp: compare_updates(b, device, a))


def compare_updates(
    run: Callable[[torch.device, str], list[dict[str, float]]], device: torch.device, amp: str
) -> dict[str, Any]:
    """Return the largest relative difference of any loss or gradient norm to the CPU's in fp32."""
    expected, actual = run(torch.device("cpu"), "fp32"), run(device, amp)
    difference = max(
        abs(one[name] - other[name]) / max(abs(one[name]), 1e-6)
        for one, other in zip(expected, actual, strict=True)
        for name in one
    )
    passed = math.isfinite(difference) and difference <= TOLERANCE[amp]
    return {"passed": passed, "difference": difference, "allowed": TOLERANCE[amp], "loss": actual[0]["loss"]}


def stepper_of(flags: str, device: torch.device, amp: str) -> Stepper:
    """Return the Stepper of one variant."""
    arguments = [*flags.split(), "--device", str(device), "--amp", amp, "--num_workers", "0"]
    (variant,) = step_variants({"": parse_config(StepConfig, arguments, "check_gpu.py")})
    return Stepper(variant)


def losses_of(flags: str, device: torch.device, amp: str) -> list[dict[str, float]]:
    """Return the losses and the gradient norm of the first updates of a pre-training."""
    stepper = stepper_of(flags, device, amp)
    return [drained(stepper.trainer, stepper.next_group()) for _ in range(UPDATES)]


def drained(trainer: Any, batches: list) -> dict[str, float]:
    """Take an update and return its losses and gradient norm."""
    trainer.update(batches)
    return trainer.meter.drain()


def compare_draws(flags: str, device: torch.device) -> dict[str, Any]:
    """Compare masks, noise and crops with the CPU's, bit by bit, and the pixels of augmented views."""
    steppers = [stepper_of(flags, place, "fp32") for place in (torch.device("cpu"), device)]
    expected, actual = (stepper.next_group()[0] for stepper in steppers)
    pairs = zip(steppers, (expected, actual), strict=True)
    masks = [stepper.trainer.state.model.mask(batch.noise).shuffle.cpu() for stepper, batch in pairs]
    difference = (expected.views.int() - actual.views.cpu().int()).abs()
    equal = torch.equal(*masks) and torch.equal(expected.noise, actual.noise.cpu())
    grey_levels = int(difference.max())
    return {
        "passed": equal and grey_levels <= 2,
        "masks_equal": equal,
        "most_grey_levels": grey_levels,
        "share_of_other_pixels": float((difference > 0).float().mean()),
    }


def finetuning(device: torch.device, amp: str) -> list[dict[str, float]]:
    """Return the losses of the first updates of a classifier."""
    return classifier_losses(FinetuneConfig, "main_finetune.py", Classifier, adamw, device, amp)


def linear_probing(device: torch.device, amp: str) -> list[dict[str, float]]:
    """Return the losses of the first updates of a linear probe."""

    def lars(model: LinearProbe, config: LinprobeConfig) -> torch.optim.Optimizer:
        return build_lars(model, config.peak_lr, config.weight_decay)

    return classifier_losses(LinprobeConfig, "main_linprobe.py", LinearProbe, lars, device, amp)


def classifier_losses(
    config_type: type, program: str, model_type: type, optimizer: Callable, device: torch.device, amp: str
) -> list[dict[str, float]]:
    """Return the losses and gradient norms of the first updates of a classifier on random images."""
    flags = "--model vit_nano_patch4 --patch_size 8 --input_size 32 --data_path x --batch_size 8 --num_workers 0"
    config = parse_config(config_type, [*flags.split(), "--device", str(device), "--amp", amp], program)
    torch.manual_seed(0)
    model, dtype = model_type(**config.model_arguments(CLASSES)).to(device), autocast_dtype(amp, device)
    state = initial_state(model, None, config, dtype, device, optimizer)
    trainer = ClassifierTrainer(config, state, model.train(), device, dtype, 10, smoothing=0.1)
    generator, index = torch.Generator().manual_seed(0), torch.arange(8)
    batch = LabelledBatch(torch.randn(8, 3, 32, 32, generator=generator), index, index, index)
    return [drained(trainer, trainer.to_device([batch])) for _ in range(UPDATES)]


def segmentation(device: torch.device, amp: str) -> list[dict[str, float]]:
    """Return the losses and gradient norms of the first updates of a segmenter on random images."""
    flags = "--model vit_nano_patch4 --patch_size 8 --input_size 32 --head_width 8 --batch_size 4 --data_path x"
    arguments = [*flags.split(), "--drop_path", "0", "--dropout", "0", "--device", str(device), "--amp", amp]
    config = parse_config(SegmentConfig, arguments, "main_segment.py")
    torch.manual_seed(0)
    model, dtype = UperNet(**config.model_arguments(CLASSES)).to(device), autocast_dtype(amp, device)
    state = initial_state(model, None, config, dtype, device)
    normalise = Normalise(config.resolved_mean, config.resolved_std, device)
    trainer = SegmenterTrainer(config, state, model.train(), device, dtype, 10, normalise=normalise)
    generator, index = torch.Generator().manual_seed(0), torch.arange(4)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    masks = torch.randint(CLASSES, (4, 32, 32), dtype=torch.uint8, generator=generator)
    return [drained(trainer, trainer.to_device([MaskedBatch(images, masks, index, index)])) for _ in range(UPDATES)]


DOWNSTREAM = {"finetune": finetuning, "linprobe": linear_probing, "segment": segmentation}
