"""Measure how fast the code is, and how near it comes to the limits of the machine.

    python scripts/bench.py step --model lut_vit_small_patch16 --batch_size 8 --amp fp32 --json step.json
    python scripts/bench.py step --forms asymmetric --variants ours --vary compile=none,block amp=fp32,bf16
    python scripts/bench.py step --sweep batch=8,16,32,64 --json batch.json
    python scripts/bench.py loader --data_path IMAGES --scale_to 500x375
    python scripts/bench.py epoch --data_path IMAGES --vary num_workers=0,2 --max_steps 100
    python scripts/bench.py limits
    python scripts/bench.py saving --folder /scratch

`step` measures the update on images in memory, `loader` the data loader from files to views, `epoch` whole runs of
main_pretrain.py, `limits` the machine alone, and `saving` the cost of checkpoints. The first three take the flags of
main_pretrain.py (`step --help`), and --vary compares values of any of them. Variants take turns, so that other work on
the machine affects all alike; numbers are medians, with quartiles in brackets.
"""

# A benchmark imports what it needs itself: --help and a wrong flag should not wait for matplotlib or scikit-learn.

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from util.bench.config import EpochConfig, LimitsConfig, LoaderConfig, SavingConfig, StepConfig, titled, vary
from util.bench.timing import Spread, in_turn, percent, ratios, short, spread, table, write_report
from util.config.checks import check
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, nearest, run_main
from util.runtime.files import writable_folder

if TYPE_CHECKING:
    from util.bench.step import StepperProcess
    from util.bench.variant import Variant

PROGRAM = Path(__file__).name


def main() -> None:
    """Run the benchmark that the first argument names."""
    benchmarks = {function.__name__: function for function in (step, loader, epoch, limits, saving)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in benchmarks:
        raise UserError(f"{name}: unknown benchmark{nearest(name, benchmarks)} (one of {', '.join(benchmarks)})")
    else:
        benchmarks[name](sys.argv[2:])


# --------------------------------------------------------------------------------------------------------
# step
# --------------------------------------------------------------------------------------------------------


def step(arguments: list[str]) -> None:
    """Measure updates of each form and variant and print a table; or sweep a flag, or find the largest batch."""
    program = f"{PROGRAM} step"
    config = parse_config(StepConfig, arguments, program)
    from util.bench.measure import measure
    from util.bench.step import StepperProcess
    from util.bench.variant import step_variants

    if config.sweep:
        sweep(config, arguments, program)
        return
    variants = step_variants(vary(StepConfig, arguments, config.vary, program))
    if config.find_batch:
        find_batch(config, variants)
        return
    folder = writable_folder(config.profile, "profile") if config.profile else None
    check(len({variant.device for variant in variants}) == 1, "vary", "device", "must name one device")
    with contextlib.ExitStack() as stack:
        steppers = [stack.enter_context(StepperProcess(variant)) for variant in variants]
        rows = measure(steppers, "step")
        show_steps(rows)
        write_report(config.json, "step", variants[0].device, as_dict(config), rows=rows)
        for stepper in steppers if folder else ():
            show_profile(stepper, folder)


def show_steps(rows: list[dict[str, Any]]) -> None:
    """Print speeds, shares of the machine's peak rates, parts of the update, and comparisons of the variants."""
    print(
        table(
            [
                {
                    "variant": row["name"],
                    "images/s": row["images_per_second"].text(),
                    "ms/step": short(row["ms_per_step"].median),
                    "x first": row["of_first"].text(),
                    "GiB": short(row["memory_bytes"] / 2**30),
                    "GFLOP/image": short(row["gflop_per_image"]),
                    "TFLOP/s": short(row["tflops"].median),
                    "of matrix peak": percent(row["share_of_matrix_peak"].median),
                    "GB/image": short(row["gb_per_image"]),
                    "of bandwidth": percent(row["share_of_bandwidth"].median),
                }
                for row in rows
            ]
        )
    )
    print("\nmilliseconds of the parts of an update, timed separately:")
    parts = [{part: short(x.median) for part, x in row["ms_of_parts"].items()} for row in rows]
    print(table([{"variant": row["name"], **part} for row, part in zip(rows, parts, strict=True)]))
    peaks = {row["numbers"]: f"{row['numbers']} {short(row['matrix_peak_tflops'].median)} TFLOP/s" for row in rows}
    bandwidth = short(rows[0]["bandwidth_gb_per_second"].median)
    print(
        f"\nmatrix products {', '.join(peaks.values())}, memory {bandwidth} GB/s, measured in the same rounds;"
        " GB/image: what eager operators read and write"
    )
    for row in rows:
        if row["compiled_while_timed"]:
            print(f"WARNING: {row['name']} was compiled {row['compiled_while_timed']} times while it was timed")
    for line in comparisons(rows):
        print(line)


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence about ours against plain for each form, and about each form of LUT against MAE."""
    sentences = []
    for row, other in itertools.permutations(rows, 2):
        if row["variant"] == "ours" and row["form"] == other["form"] and other["variant"] == "plain":
            sentences.append(f"{row['name']}: {speed_ratio(row, other).text()} times as fast as {other['name']}")
        if row["form"] != "mae" and other["form"] == "mae" and row["variant"] == other["variant"] == "ours":
            sentences.append(f"{row['name']}: takes {speed_ratio(other, row).text()} times as long as {other['name']}")
    return sentences


def speed_ratio(row: dict[str, Any], other: dict[str, Any]) -> Spread:
    """Return the ratio of the images/s of two rows, round by round."""
    return ratios(*([one["images"] / seconds for seconds in one["seconds"]] for one in (row, other)))


def sweep(config: StepConfig, arguments: list[str], program: str) -> None:
    """Repeat the measurement for each value of a flag: a table and JSON after each value, and a plot at the end."""
    from util.bench.measure import measure
    from util.bench.plot import plot_sweep
    from util.bench.step import StepperProcess
    from util.bench.variant import step_variants

    flag, _, values = config.sweep_axis.partition("=")
    picture = Path(config.plot or (str(Path(config.json).with_suffix(".png")) if config.json else f"bench-{flag}.png"))
    writable_folder(picture.parent, "plot")
    rows: dict[str, list[dict[str, Any]]] = {}
    for value in values.split(","):
        flags = [*arguments, f"--{flag}", *value.split()]
        variants = step_variants(vary(StepConfig, flags, config.vary, program))
        print(f"\n{flag} {value}", flush=True)
        with contextlib.ExitStack() as stack:
            steppers = [stack.enter_context(StepperProcess(variant)) for variant in variants]
            rows[value] = measure(steppers, f"{flag} {value}")
        show_steps(rows[value])
        write_report(config.json, "step", variants[0].device, as_dict(config), swept=flag, rows=rows)
    plot_sweep(flag, rows, picture)
    print(f"\nplot: {picture}")


def find_batch(config: StepConfig, variants: list[Variant]) -> None:
    """Find the largest batch of each variant and print a table."""
    from util.bench.memory import largest_batch

    device = choose_device(config.device)
    fix = "on a CPU add --memory_gib, the memory that a process may use"
    check(device.type == "cuda" or config.memory_gib is not None, "find_batch", "", fix)
    check(
        device.type != "cuda" or config.memory_gib is None,
        "memory_gib",
        config.memory_gib,
        "works on a CPU only, leave it out",
    )
    rows = []
    for variant in variants:

        def report(batch_size: int, fits: bool, name: str = variant.name) -> None:
            print(f"{name}: batch {batch_size} {'fits' if fits else 'does not fit'}", flush=True)

        rows.append({"name": variant.name, "batch_size": largest_batch(variant, report)})
        write_report(config.json, "find_batch", device, as_dict(config), rows=rows)
    print(table([{"variant": row["name"], "largest batch": str(row["batch_size"] or "none")} for row in rows]))


def show_profile(stepper: StepperProcess, folder: Path) -> None:
    """Write the trace; print the most expensive operators and the calls that wait for the GPU."""
    profile = stepper.profile(folder)
    print(f"\n{stepper.variant.name}: trace in {folder}\n{profile.operators}")
    if stepper.variant.device.type == "cuda":
        calls = ", ".join(f"{name} {number:g}" for name, number in profile.waits.items()) or "none"
        print(f"calls per update that make the host wait for the device: {calls}")
        print(f"the GPU pauses {profile.gaps:g} times per update, {profile.gap_ms:.2f} ms in all")


# --------------------------------------------------------------------------------------------------------
# loader
# --------------------------------------------------------------------------------------------------------


def loader(arguments: list[str]) -> None:
    """Measure the data loader from files to views, in images/s per core."""
    program = f"{PROGRAM} loader"
    config = parse_config(LoaderConfig, arguments, program)
    from util.bench.limits import one_thread
    from util.bench.loader import PIL_KNOWS, bench_images, pipeline

    turns: dict[str, Callable[[], float]] = {}
    for title, settings in vary(LoaderConfig, arguments, config.vary, program).items():
        images = bench_images(settings)
        for kind in settings.pipelines:
            turns.setdefault(
                titled(kind, title, PIL_KNOWS if kind == "pil" else None), pipeline(kind, settings, images)
            )
    with one_thread():
        for turn in turns.values():
            turn()  # starts the workers, and fills the file system's cache
        seconds = in_turn(turns, config.rounds, "loader")
    speeds = {name: [1 / x for x in values] for name, values in seconds.items()}
    first = next(iter(speeds.values()))
    rows = [
        {"name": name, "images_per_second_and_core": spread(values), "of_first": ratios(values, first)}
        for name, values in speeds.items()
    ]
    scaled = f", re-encoded at {config.scale_to} (JPEG, quality 90) in memory" if config.scale_to else ""
    print(f"{len(images)} images{scaled}; {config.num_views} views of {config.resolved_input_size}")
    cells = [
        {
            "pipeline": row["name"],
            "images/s and core": row["images_per_second_and_core"].text(),
            "x first": row["of_first"].text(),
        }
        for row in rows
    ]
    print(table(cells))
    print("ours delivers uint8; the device normalises, as part of the update")
    write_report(config.json, "loader", torch.device("cpu"), as_dict(config), images=len(images), rows=rows)


# --------------------------------------------------------------------------------------------------------
# epoch
# --------------------------------------------------------------------------------------------------------


def epoch(arguments: list[str]) -> None:
    """Measure whole runs, each in a process of its own."""
    program = f"{PROGRAM} epoch"
    config = parse_config(EpochConfig, arguments, program)
    variants = vary(EpochConfig, arguments, config.vary, program)
    from util.bench.epoch import PARTS, run_variant

    device = choose_device(config.device)
    finished: dict[str, list[dict[str, float]]] = {title or "run": [] for title in variants}

    def run(title: str, settings: EpochConfig) -> dict[str, float]:
        finished[title].append(run_variant(settings))
        write_report(config.json, "epoch", device, as_dict(config), runs=finished)  # a later failure loses nothing
        return finished[title][-1]

    in_turn({name or "run": partial(run, name or "run", one) for name, one in variants.items()}, config.rounds, "epoch")
    first = [run["images_per_second"] for run in next(iter(finished.values()))]
    rows = []
    for title, runs in finished.items():
        speeds = [run["images_per_second"] for run in runs]
        shares = {part: spread([run[part] / run["total"] for run in runs]) for part in PARTS}
        row = {"name": title, "images_per_second": spread(speeds), "of_first": ratios(speeds, first), "shares": shares}
        row["images_per_second_whole_run"] = spread([run["images_per_second_whole_run"] for run in runs])
        maxima = {key: max(run[key] for run in runs) for key in ("memory_bytes", "compiled_later")}
        rows.append(row | maxima | {"runs": runs})
    print(
        table(
            [
                {
                    "run": row["name"],
                    "images/s": row["images_per_second"].text(),
                    "x first": row["of_first"].text(),
                    "with all": short(row["images_per_second_whole_run"].median),
                    **{part: percent(share.median) for part, share in row["shares"].items()},
                    "GiB": short(row["memory_bytes"] / 2**30),
                    "recompiled": str(row["compiled_later"]),
                }
                for row in rows
            ]
        )
    )
    print("images/s are those of updates and data after the first log line; shares are those of the whole run's time")
    write_report(config.json, "epoch", device, as_dict(config), rows=rows)


# --------------------------------------------------------------------------------------------------------
# limits
# --------------------------------------------------------------------------------------------------------


def limits(arguments: list[str]) -> None:
    """Measure the peak rates of the machine."""
    config = parse_config(LimitsConfig, arguments, f"{PROGRAM} limits")
    from util.bench.limits import DTYPES, decode_rate, disk_write, matrix_peaks, memory_bandwidth

    device = choose_device(config.device)
    folder = writable_folder(config.folder, "folder")
    known = DTYPES if device.type == "cuda" else [numbers for numbers in DTYPES if numbers != "tf32"]
    for numbers in config.numbers:
        check(numbers in known, "numbers", numbers, f"does not exist on a {device.type.upper()}")
    rows = []

    def add(name: str, value: Spread, unit: str) -> None:
        rows.append({"what": name, "value": value, "unit": unit})
        print(f"{name:<28}{value.text():>28} {unit}", flush=True)

    for numbers in config.numbers or known:
        for side, peak in matrix_peaks(numbers, device, config.sides, config.seconds).items():
            add(f"matrix product, {numbers}, {side}", peak, "TFLOP/s")
    for name, bandwidth in memory_bandwidth(device, config.array_mib * 2**20, config.seconds).items():
        add(f"memory, {name}", bandwidth, "GB/s")
    add("disk, write and fsync", disk_write(folder, config.file_mib * 2**20), "MiB/s")
    add("JPEG decoding, one core", decode_rate(files_to_decode(config), config.seconds), "images/s")
    write_report(config.json, "limits", device, asdict(config), rows=rows)


def files_to_decode(config: LimitsConfig) -> list[bytes]:
    """Return some images of --data_path, or photographs that come with scikit-learn."""
    from util.bench.limits import sample_photos
    from util.data.datasets import open_images

    if not config.data_path:
        return sample_photos()
    source = open_images(config.data_path, "", "train")
    return [source.read(index) for index in range(0, len(source), max(1, len(source) // 64))]


# --------------------------------------------------------------------------------------------------------
# saving
# --------------------------------------------------------------------------------------------------------


def saving(arguments: list[str]) -> None:
    """Measure how long saving a checkpoint blocks and slows the training."""
    config = parse_config(SavingConfig, arguments, f"{PROGRAM} saving")
    from util.bench.saving import bench_saving

    bench_saving(config)


if __name__ == "__main__":
    run_main(PROGRAM, main)
