"""Profile some updates: a trace, the most expensive operators, and the time in which the GPU waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from util.bench.timing import synchronise

WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item",
                 "aten::_local_scalar_dense")  # fmt: skip
GAP_MICROSECONDS = 5.0  # shorter pauses between two kernels are those of the hardware


@dataclass(frozen=True)
class Profile:
    """Numbers of a profile, per update; those of the GPU are 0 on a CPU."""

    operators: str  # table of the most expensive ones
    waits: dict[str, float]  # calls that make the host wait for the device
    kernels: float
    copies: float  # copies between host and device
    busy_ms: float  # time in which the GPU runs at least one kernel or copy
    gaps: float  # pauses of the GPU of more than GAP_MICROSECONDS
    gap_ms: float


def profile_updates(update: Callable[[], object], device: torch.device, number: int, trace: Path | None) -> Profile:
    """Profile this many updates, and write the trace as JSON if a path is given.

    A call is counted under each of its names: `aten::item` calls `_local_scalar_dense`, which synchronises a stream.
    """
    on_gpu = device.type == "cuda"
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(number):
            with record_function("update"):
                update()
        if on_gpu:
            synchronise(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    updates = [event.time_range for event in events if event.name == "update" and event.device_type.name == "CPU"]
    waits = dict.fromkeys(WAITING_CALLS, 0)
    for event in events:
        if event.name in waits:  # the wait after the last update is not part of it
            waits[event.name] += any(span.start <= event.time_range.start <= span.end for span in updates)
    on_device = [event for event in events if event.device_type.name == "CUDA" and event.name != "update"]
    spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
    busy, gaps = busy_and_gaps(spans)
    operators = profiler.key_averages().table(
        sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=15, max_name_column_width=50
    )
    return Profile(
        operators=operators,
        waits={name: count / number for name, count in waits.items() if count},
        kernels=len(on_device) / number,
        copies=sum(event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for event in on_device) / number,
        busy_ms=busy / 1000 / number,
        gaps=len(gaps) / number,
        gap_ms=sum(gaps) / 1000 / number,
    )


def busy_and_gaps(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """Return the time that sorted spans (start, end) cover, and the pauses between them above GAP_MICROSECONDS."""
    busy, gaps, last = 0.0, [], None
    for start, end in spans:
        if last is not None and start - last > GAP_MICROSECONDS:
            gaps.append(start - last)
        begin = start if last is None else max(start, last)
        busy += max(0.0, end - begin)
        last = end if last is None else max(last, end)
    return busy, gaps
