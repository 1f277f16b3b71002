"""Stages `speed` and `large` of the GPU check: updates of ViT-S to ViT-H, their memory, a trace, saving."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from util.bench.gpu_equality import stepper_of
from util.bench.gpu_runner import Recorder
from util.bench.limits import best_side, matrix_peaks
from util.bench.saving import measure_saving
from util.bench.timing import compiled_graphs
from util.runtime.amp import autocast_dtype, name_of
from util.train.cost import pretrain_cost

STEPS, TRACED_UPDATES, MOST_IMAGES = 10, 20, 4096
OURS, PLAIN = "--variants ours", "--variants plain"
# In the order of value; the first of a model is the one with which ratios are computed.
SPEEDS = (
    ("base", 256, f"--forms asymmetric {OURS}"),
    ("base", 256, f"--forms mae {OURS}"),
    ("base", 256, f"--forms asymmetric {OURS} --compile block"),
    ("base", 256, f"--forms asymmetric {PLAIN}"),
    ("small", 512, f"--forms asymmetric {OURS}"),
    ("small", 512, f"--forms mae {OURS}"),
    ("large", 128, f"--forms asymmetric {OURS}"),
    ("large", 128, f"--forms mae {OURS}"),
    ("large", 128, f"--forms asymmetric {OURS} --compile block"),
    ("small", 512, f"--forms asymmetric {OURS} --compile block"),
    ("base", 256, f"--forms asymmetric {OURS} --compile whole"),
    ("base", 256, f"--forms asymmetric {OURS} --amp fp32"),
    ("small", 512, f"--forms asymmetric {PLAIN}"),
    ("large", 128, f"--forms asymmetric {PLAIN}"),
)
TINY_SPEEDS = tuple(("nano", 4, flags) for _, _, flags in SPEEDS[:4] if "compile" not in flags)


class Speeds:
    """Measure variants one after the other in this process, and compare each with the first of its model."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device = device
        self.steps = 1 if tiny else STEPS
        self.amp = name_of(autocast_dtype("auto", device))
        self.first: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def flags(self, model: str, batch_size: int, flags: str) -> str:
        """Return the flags of a variant; nano is the smallest model, for a rehearsal."""
        patches = "4 --input_size 32 --patch_size 8" if model == "nano" else "14" if model == "huge" else "16"
        return f"--model lut_vit_{model}_patch{patches} --batch_size {batch_size} --steps {self.steps} {flags}"

    def measure(self, model: str, batch_size: int, flags: str, trace: bool = False) -> dict[str, Any]:
        """Return images/s, share of the matrix peak, and peak memory beside the estimate of --dry_run."""
        amp = "fp32" if "--amp fp32" in flags else self.amp
        release_memory()
        stepper = stepper_of(self.flags(model, batch_size, flags.replace("--amp fp32", "")), self.device, amp)
        stepper.updates(3)
        graphs = compiled_graphs()
        speed = batch_size / min(stepper.turn() for _ in range(3))
        variant = stepper.variant
        if variant.numbers not in self.peaks:
            peaks = matrix_peaks(variant.numbers, self.device, seconds=0.3)
            self.peaks[variant.numbers] = peaks[best_side(peaks)].median
        row = {"images_per_second": speed, "of_first": speed / self.first.setdefault(model, speed)}
        config = variant.config
        symmetric, checkpointed = config.views == "symmetric", config.checkpoint_activations
        cost = pretrain_cost(config.model_arguments, symmetric, config.student_type, checkpointed)
        row["share_of_matrix_peak"] = cost.flops_per_image * speed / 1e12 / self.peaks[variant.numbers]
        row["gib"] = stepper.peak_memory() / 2**30
        row["gib_of_dry_run"] = cost.memory_bytes(batch_size, 4 if variant.dtype is None else 2) / 2**30
        row["compiled_while_timed"] = compiled_graphs() - graphs
        if trace:
            profile = stepper.profile(None, self.steps * TRACED_UPDATES // STEPS or 1)
            row |= {key: value for key, value in dataclasses.asdict(profile).items() if key != "operators"}
        return row


def release_memory() -> None:
    """Free the models and the compiled code of the last variant."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speed(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Measure the variants, then fill the card: double the batch of ViT-B until it does not fit."""
    speeds = Speeds(device, tiny)
    for i, (model, batch_size, flags) in enumerate(TINY_SPEEDS if tiny else SPEEDS):
        name = f"{model}, batch {batch_size}, {flags.replace('--forms ', '').replace('--variants ', '')}"
        recorder.attempt(name, lambda v=(model, batch_size, flags), trace=i == 0: speeds.measure(*v, trace=trace))
    model, batch_size = ("nano", 8) if tiny else ("base", 512)
    while batch_size <= (8 if tiny else MOST_IMAGES):
        try:
            row = speeds.measure(model, batch_size, f"--forms asymmetric {OURS}")
        except torch.cuda.OutOfMemoryError:
            recorder.row(f"{model}, batch {batch_size}: does not fit")
            break
        recorder.row(f"{model}, batch {batch_size}", **row)
        batch_size *= 2


def large(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Measure activation checkpointing, ViT-H, and what saving in the background costs."""
    speeds = Speeds(device, tiny)
    base, huge, forms = "nano" if tiny else "base", "nano" if tiny else "huge", f"--forms asymmetric {OURS}"
    batch = 8 if tiny else 256
    recorder.attempt(base, lambda: speeds.measure(base, batch, forms))
    checkpointed = f"{forms} --checkpoint_activations"
    recorder.attempt(f"{base}, --checkpoint_activations", lambda: speeds.measure(base, batch, checkpointed))
    recorder.attempt(f"{huge}, --checkpoint_activations", lambda: speeds.measure(huge, batch // 4, checkpointed))
    recorder.attempt(huge, lambda: speeds.measure(huge, batch // 4, forms))

    def saving() -> dict[str, Any]:
        model = f"lut_vit_{base}_patch{4 if tiny else 16}"
        with tempfile.TemporaryDirectory() as folder:
            return measure_saving(model, device, Path(folder), 1, 0.0)._asdict()

    recorder.attempt("saving, seconds", saving)
