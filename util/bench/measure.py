"""Compare variants of the update: check that their losses agree, then measure them in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from util.bench.limits import BANDWIDTH_BYTES, best_side, matrix_peaks, memory_bandwidth
from util.bench.step import Stepper, StepperProcess
from util.bench.timing import in_turn, ratios, spread
from util.bench.variant import Variant
from util.config.groups import as_dict
from util.runtime.errors import RunError

AnyStepper = Stepper | StepperProcess
TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative difference of two losses, by dtype
TRIAD = "memory triad"


def check_losses(steppers: Sequence[AnyStepper], updates: int) -> dict[str, list[float]]:
    """Take the first updates of each variant and return their losses by its name.

    Raises:
        RunError: the losses of two variants with equal work differ, so their speeds must not be compared.
    """
    losses = {stepper.variant.name: stepper.losses(updates) for stepper in steppers}
    for first, second in itertools.combinations((stepper.variant for stepper in steppers), 2):
        if first.work != second.work:
            continue
        allowed = max(TOLERANCE[first.dtype], TOLERANCE[second.dtype])
        pairs = zip(losses[first.name], losses[second.name], strict=True)
        for update, (x, y) in enumerate(pairs, start=1):
            difference = abs(x - y) / max(abs(x), abs(y), 1e-12)
            if not difference <= allowed:  # NaN must fail too
                raise RunError(
                    f"the losses differ, so nothing is compared: {first.name} {x:.7g} but"
                    f" {second.name} {y:.7g} at update {update} from the same weights and images"
                    f" (relative {difference:.1e}, allowed {allowed:g})"
                )
    return losses


def measure(steppers: Sequence[AnyStepper], title: str) -> list[dict[str, Any]]:
    """Return a row of results for each variant; speeds are compared with the first one.

    The peak rates of the machine are measured in the same rounds as the variants.

    Raises:
        RunError: see `check_losses`.
    """
    config, variants = steppers[0].variant.config, [stepper.variant for stepper in steppers]
    losses = check_losses(steppers, config.check_steps)
    for stepper in steppers:
        stepper.updates(config.warmup_steps)
    memory = [stepper.peak_memory() for stepper in steppers]  # before counting, which may take more than an update
    counts = [(stepper.flops_per_image(), stepper.traffic(), stepper.graphs()) for stepper in steppers]
    turns = {stepper.variant.name: stepper.turn for stepper in steppers}
    seconds = in_turn(turns | machine_probes(variants), config.rounds, title)
    parts = in_turn({stepper.variant.name: stepper.parts for stepper in steppers}, config.rounds, f"{title}, parts")
    first = variants[0]
    reference = [first.images / x for x in seconds[first.name]]
    return [
        {
            **rates(variant, seconds, reference, flops, traffic),
            "ms_of_parts": {
                part: spread([round_[part] for round_ in parts[variant.name]]) for part in parts[variant.name][0]
            },
            "memory_bytes": bytes_,
            "compiled_while_timed": stepper.graphs() - graphs,
            "losses": losses[variant.name],
            "settings": as_dict(variant.config),
        }
        for stepper, variant, bytes_, (flops, traffic, graphs) in zip(steppers, variants, memory, counts, strict=True)
    ]


def rates(
    variant: Variant, seconds: dict[str, list[float]], reference: list[float], flops: float, traffic: int
) -> dict[str, Any]:
    """Return the speed of a variant and its shares of the machine's peak rates.

    Args:
        seconds: seconds per update of each variant, and the rates of `machine_probes`, one value per round.
        reference: images/s of the first variant.
        flops: FLOPs per image.
        traffic: bytes per update.
    """
    own, peak, triad = seconds[variant.name], seconds[probe_name(variant)], seconds[TRIAD]
    images = [variant.images / x for x in own]
    tflops = [flops / 1e12 * speed for speed in images]
    return {
        "name": variant.name,
        "form": variant.form,
        "variant": variant.kind,
        "images": variant.images,
        "images_per_second": spread(images),
        "of_first": ratios(images, reference),
        "ms_per_step": spread([1000 * x for x in own]),
        "gflop_per_image": flops / 1e9,
        "tflops": spread(tflops),
        "share_of_matrix_peak": ratios(tflops, peak),
        "gb_per_image": traffic / 1e9 / variant.images,
        "share_of_bandwidth": ratios([traffic / 1e9 / x for x in own], triad),
        "numbers": variant.numbers,
        "matrix_peak_tflops": spread(peak),
        "bandwidth_gb_per_second": spread(triad),
        "seconds": own,
    }


def probe_name(variant: Variant) -> str:
    """Return the name of the probe that measures the peak of the variant's matrix products."""
    return f"{variant.numbers} matrix product"


def machine_probes(variants: Sequence[Variant]) -> dict[str, Callable[[], float]]:
    """Return functions that measure the peak of each number format in use (TFLOP/s), and the memory's (GB/s)."""
    device = variants[0].device
    probes = {TRIAD: lambda: memory_bandwidth(device, BANDWIDTH_BYTES, seconds=0.2)["triad"].median}
    for name, numbers in {probe_name(variant): variant.numbers for variant in variants}.items():
        sides = (best_side(matrix_peaks(numbers, device, seconds=0.3)),)
        probes[name] = lambda numbers=numbers, sides=sides: (
            matrix_peaks(numbers, device, sides, seconds=0.2)[sides[0]].median
        )
    return probes
