"""Measure the peak rates of a machine: matrix products, memory, disk, JPEG decoding."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from util.bench.pil_pipeline import jpeg
from util.bench.timing import Spread, spread, synchronise
from util.data.decode import decode

Numbers = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048)}
BANDWIDTH_BYTES = 2**28  # size of one array; larger than the caches


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the mean seconds of one call, over `repeats` calls between two waits for the device."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - begin) / repeats


def rate(
    work: Callable[[], object], amount: float, device: torch.device, seconds: float, most_samples: int = 25
) -> Spread:
    """Return `amount` per second of `work`, from samples that take about `seconds` in all after one warm-up call."""
    work()
    once = timed(work, device, 1)
    repeats = max(1, round(seconds / most_samples / once))
    samples = max(3, min(most_samples, round(seconds / once)))
    return spread([amount / timed(work, device, repeats) for _ in range(samples)])


@contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 for products of fp32 matrices in the context."""
    before, wanted = torch.get_float32_matmul_precision(), "high" if allowed else "highest"
    if before == wanted:  # setting the same value again would recompile compiled models
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matrix_product(numbers: Numbers, side: int, device: torch.device) -> tuple[Callable[[], object], float]:
    """Return a function that multiplies two square matrices, and its TFLOP (2 per multiply-add)."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(DTYPES[numbers]) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3 / 1e12


def matrix_peaks(
    numbers: Numbers, device: torch.device, sides: Sequence[int] = (), seconds: float = 1.0
) -> dict[int, Spread]:
    """Return TFLOP/s by the side of the matrices; after a product that takes longer than `seconds` none is larger."""
    peaks: dict[int, Spread] = {}
    with tensor_float(numbers == "tf32"):
        for side in sides or MATRIX_SIDES[device.type]:
            product, tflop = matrix_product(numbers, side, device)
            peaks[side] = rate(product, tflop, device, seconds)
            if tflop / peaks[side].median > seconds:
                break
    return peaks


def best_side(peaks: dict[int, Spread]) -> int:
    """Return the side of the matrices at which the machine is fastest."""
    return max(peaks, key=lambda side: peaks[side].median)


def memory_bandwidth(device: torch.device, size: int, seconds: float = 1.0) -> dict[str, Spread]:
    """Return GB/s (read and written) of `copy` (a = b) and `triad` (a = b + 2c), on arrays of `size` bytes."""
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    gigabytes = a.nbytes / 1e9
    return {
        "copy": rate(lambda: a.copy_(b), 2 * gigabytes, device, seconds),
        "triad": rate(lambda: torch.add(b, c, alpha=2, out=a), 3 * gigabytes, device, seconds),
    }


def disk_write(folder: Path, size: int = 2**28, repeats: int = 3) -> Spread:
    """Return MiB/s of writing `size` random bytes to a file, fsync included."""
    content = os.urandom(size)
    path = folder / f".bench-{os.getpid()}"

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    try:
        return spread([size / 2**20 / timed(write, torch.device("cpu"), 1) for _ in range(repeats)])
    finally:
        path.unlink(missing_ok=True)


def decode_rate(files: Sequence[bytes], seconds: float = 2.0) -> Spread:
    """Return how many images per second one core decodes to uint8 RGB."""
    with one_thread():
        return rate(lambda: [decode(file, 3) for file in files], len(files), torch.device("cpu"), seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU core in the context, as a data loader worker does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sample_photos(size: tuple[int, int] = (500, 375), quality: int = 90) -> list[bytes]:
    """Return scikit-learn's two sample photographs as JPEGs of that width and height; ImageNet's median by default."""
    from sklearn.datasets import load_sample_images

    return [jpeg(Image.fromarray(pixels), size, quality) for pixels in load_sample_images().images]
