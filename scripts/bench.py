"""How fast is it, and how near to what the machine can do?

    python scripts/bench.py step --model lut_vit_small_patch16 --batch_size 8 --amp fp32 --json step.json
    python scripts/bench.py step --forms asymmetric --variants ours --vary compile=none,block amp=fp32,bf16
    python scripts/bench.py step --sweep batch=8,16,32,64 --json batch.json
    python scripts/bench.py loader --data_path IMAGES --scale_to 500x375
    python scripts/bench.py epoch --data_path IMAGES --vary num_workers=0,2 --max_steps 100
    python scripts/bench.py limits
    python scripts/bench.py saving --folder /scratch

step is the bare update on images that are in memory, loader the way from files to views, epoch whole runs of
main_pretrain.py, limits the machine alone, saving the cost of checkpoints. The first three take the flags of
main_pretrain.py (`step --help`), and --vary compares values of any of them. What is compared takes turns, so that
whatever else the machine does meets all alike; numbers are medians, with quartiles in brackets.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from util.bench.config import EpochConfig, LimitsConfig, LoaderConfig, StepConfig, titled, vary
from util.bench.epoch import PARTS, run_variant
from util.bench.limits import DTYPES, decode_rate, disk_write, matrix_peaks, memory_bandwidth, one_thread, sample_photos
from util.bench.loader import PIL_KNOWS, bench_images, pipeline
from util.bench.memory import largest_batch
from util.bench.plot import plot_sweep
from util.bench.saving import SavingConfig, bench_saving
from util.bench.step import StepperProcess, Variant, measure, step_variants
from util.bench.timing import Spread, in_turn, percent, ratios, short, spread, table, write_report
from util.config.command_line import parse_config
from util.config.groups import as_dict, check
from util.data.datasets import open_images
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, nearest, run_main
from util.runtime.files import writable_folder

PROGRAM = Path(__file__).name


def main() -> None:
    """The benchmark that the first argument names."""
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
    """Updates of each form and variant: a table, or a sweep, or the largest batch."""
    program = f"{PROGRAM} step"
    config = parse_config(StepConfig, arguments, program)
    if config.sweep:
        sweep(config, arguments, program)
        return
    variants = step_variants(vary(StepConfig, arguments, config.vary, program))
    if config.find_batch:
        find_batch(config, variants)
        return
    folder = writable_folder(config.profile, "profile") if config.profile else None
    check(len({variant.device for variant in variants}) == 1, "vary", "device", "one machine at a time")
    with contextlib.ExitStack() as stack:
        steppers = [stack.enter_context(StepperProcess(variant)) for variant in variants]
        rows = measure(steppers, "step")
        show_steps(rows)
        write_report(config.json, "step", variants[0].device, as_dict(config), rows=rows)
        for stepper in steppers if folder else ():
            show_profile(stepper, folder)


def show_steps(rows: list[dict[str, Any]]) -> None:
    """Speed, share of what the machine can do, parts, and how the variants of a form compare."""
    print(
        table(
            [
                {
                    "variant": row["name"],
                    "images/s": row["images_per_second"].said(),
                    "ms/step": short(row["ms_per_step"].median),
                    "x first": row["of_first"].said(),
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
    print("\nms of its parts, timed apart:")
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
            print(f"WARNING: {row['name']} was compiled anew while it was timed, {row['compiled_while_timed']} times")
    for line in comparisons(rows):
        print(line)


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for ours against plain in each form, and for each form of ours against MAE."""
    said = []
    for row, other in itertools.permutations(rows, 2):
        if row["variant"] == "ours" and row["form"] == other["form"] and other["variant"] == "plain":
            said.append(f"{row['name']}: {speed_ratio(row, other).said()} times as fast as {other['name']}")
        if row["form"] != "mae" and other["form"] == "mae" and row["variant"] == other["variant"] == "ours":
            said.append(f"{row['name']}: takes {speed_ratio(other, row).said()} times as long as {other['name']}")
    return said


def speed_ratio(row: dict[str, Any], other: dict[str, Any]) -> Spread:
    """Images/s of one over those of the other, round by round."""
    return ratios(*([one["images"] / seconds for seconds in one["seconds"]] for one in (row, other)))


def sweep(config: StepConfig, arguments: list[str], program: str) -> None:
    """The same measurement for each value of a flag, one after the other; a table, a picture, and JSON after each."""
    flag, _, values = config.sweep_axis.partition("=")
    picture = Path(config.plot or (str(Path(config.json).with_suffix(".png")) if config.json else f"bench-{flag}.png"))
    writable_folder(picture.parent, "plot")
    found: dict[str, list[dict[str, Any]]] = {}
    for value in values.split(","):
        flags = [*arguments, f"--{flag}", *value.split()]
        variants = step_variants(vary(StepConfig, flags, config.vary, program))
        print(f"\n{flag} {value}", flush=True)
        with contextlib.ExitStack() as stack:
            steppers = [stack.enter_context(StepperProcess(variant)) for variant in variants]
            found[value] = measure(steppers, f"{flag} {value}")
        show_steps(found[value])
        write_report(config.json, "step", variants[0].device, as_dict(config), swept=flag, rows=found)
    plot_sweep(flag, found, picture)
    print(f"\nsee {picture}")


def find_batch(config: StepConfig, variants: list[Variant]) -> None:
    """The largest batch of each variant."""
    device = choose_device(config.device)
    fix = "a CPU's memory is everybody's: say with --memory_gib how much a process may use"
    check(device.type == "cuda" or config.memory_gib is not None, "find_batch", "", fix)
    check(device.type != "cuda" or config.memory_gib is None, "memory_gib", config.memory_gib, "is for CPUs")
    rows = []
    for variant in variants:

        def report(batch_size: int, fits: bool, name: str = variant.name) -> None:
            print(f"{name}: batch {batch_size} {'fits' if fits else 'does not fit'}", flush=True)

        rows.append({"name": variant.name, "batch_size": largest_batch(variant, report)})
        write_report(config.json, "find_batch", device, as_dict(config), rows=rows)
    print(table([{"variant": row["name"], "largest batch": str(row["batch_size"] or "none")} for row in rows]))


def show_profile(stepper: StepperProcess, folder: Path) -> None:
    """Write the trace, print the dearest operators and the calls that wait."""
    dearest, waits = stepper.profile(folder)
    print(f"\n{stepper.variant.name}: trace in {folder}\n{dearest}")
    if stepper.variant.device.type == "cuda":
        said = ", ".join(f"{name} {number:g}" for name, number in waits.items()) or "none"
        print(f"calls per update that make the host wait for the device: {said}")


# --------------------------------------------------------------------------------------------------------
# loader
# --------------------------------------------------------------------------------------------------------


def loader(arguments: list[str]) -> None:
    """Images/s and core from files to views."""
    program = f"{PROGRAM} loader"
    config = parse_config(LoaderConfig, arguments, program)
    turns: dict[str, Callable[[], float]] = {}
    for title, settings in vary(LoaderConfig, arguments, config.vary, program).items():
        images = bench_images(settings)
        for kind in settings.pipelines:
            turns.setdefault(
                titled(kind, title, PIL_KNOWS if kind == "pil" else None), pipeline(kind, settings, images)
            )
    with one_thread():
        for turn in turns.values():
            turn()  # starts the loader processes, fills caches of the file system
        found = in_turn(turns, config.rounds, "loader")
    speeds = {name: [1 / seconds for seconds in values] for name, values in found.items()}
    first = next(iter(speeds.values()))
    rows = [
        {"name": name, "images_per_second_and_core": spread(values), "of_first": ratios(values, first)}
        for name, values in speeds.items()
    ]
    scaled = f", re-encoded at {config.scale_to} (JPEG, quality 90) in memory" if config.scale_to else ""
    print(f"{len(images)} images{scaled}; {config.num_views} views of {config.resolved_input_size}")
    shown = [
        {
            "pipeline": row["name"],
            "images/s and core": row["images_per_second_and_core"].said(),
            "x first": row["of_first"].said(),
        }
        for row in rows
    ]
    print(table(shown))
    print("ours delivers uint8 and leaves the normalisation to the device, where it is part of the update")
    write_report(config.json, "loader", torch.device("cpu"), as_dict(config), images=len(images), rows=rows)


# --------------------------------------------------------------------------------------------------------
# epoch
# --------------------------------------------------------------------------------------------------------


def epoch(arguments: list[str]) -> None:
    """Whole runs, each in a process of its own."""
    program = f"{PROGRAM} epoch"
    config = parse_config(EpochConfig, arguments, program)
    variants = vary(EpochConfig, arguments, config.vary, program)
    device = choose_device(config.device)
    kept: dict[str, list[dict[str, float]]] = {title or "run": [] for title in variants}

    def run(title: str, settings: EpochConfig) -> dict[str, float]:
        kept[title].append(run_variant(settings))
        write_report(config.json, "epoch", device, as_dict(config), runs=kept)  # nothing is lost with the next run
        return kept[title][-1]

    runs = {title or "run": partial(run, title or "run", settings) for title, settings in variants.items()}
    found = in_turn(runs, config.rounds, "epoch")
    first = [run["images_per_second"] for run in next(iter(found.values()))]
    rows = []
    for title, values in found.items():
        speeds = [run["images_per_second"] for run in values]
        shares = {part: spread([run[part] / run["total"] for run in values]) for part in PARTS}
        row = {"name": title, "images_per_second": spread(speeds), "of_first": ratios(speeds, first), "shares": shares}
        row["images_per_second_whole_run"] = spread([run["images_per_second_whole_run"] for run in values])
        most = {key: max(run[key] for run in values) for key in ("memory_bytes", "compiled_later")}
        rows.append(row | most | {"runs": values})
    print(
        table(
            [
                {
                    "run": row["name"],
                    "images/s": row["images_per_second"].said(),
                    "x first": row["of_first"].said(),
                    "with all": short(row["images_per_second_whole_run"].median),
                    **{part: percent(share.median) for part, share in row["shares"].items()},
                    "GiB": short(row["memory_bytes"] / 2**30),
                    "compiled anew": str(row["compiled_later"]),
                }
                for row in rows
            ]
        )
    )
    print("images/s of the updates and their data, after the first line of log; shares of the whole run's time")
    write_report(config.json, "epoch", device, as_dict(config), rows=rows)


# --------------------------------------------------------------------------------------------------------
# limits
# --------------------------------------------------------------------------------------------------------


def limits(arguments: list[str]) -> None:
    """What the machine can do at best."""
    config = parse_config(LimitsConfig, arguments, f"{PROGRAM} limits")
    device = choose_device(config.device)
    folder = writable_folder(config.folder, "folder")
    known = DTYPES if device.type == "cuda" else [numbers for numbers in DTYPES if numbers != "tf32"]
    for numbers in config.numbers:
        check(numbers in known, "numbers", numbers, f"is not for {device.type}")
    rows = []

    def add(what: str, value: Spread, unit: str) -> None:
        rows.append({"what": what, "value": value, "unit": unit})
        print(f"{what:<28}{value.said():>28} {unit}", flush=True)

    for numbers in config.numbers or known:
        for side, peak in matrix_peaks(numbers, device, config.sides, config.seconds).items():
            add(f"matrix product, {numbers}, {side}", peak, "TFLOP/s")
    for name, bandwidth in memory_bandwidth(device, config.array_mib * 2**20, config.seconds).items():
        add(f"memory, {name}", bandwidth, "GB/s")
    add("disk, write and fsync", disk_write(folder, config.file_mib * 2**20), "MiB/s")
    add("JPEG decoding, one core", decode_rate(files_to_decode(config), config.seconds), "images/s")
    write_report(config.json, "limits", device, asdict(config), rows=rows)


def files_to_decode(config: LimitsConfig) -> list[bytes]:
    """Some of the images of --data_path, or photographs that come with scikit-learn."""
    if not config.data_path:
        return sample_photos()
    source = open_images(config.data_path, "", "train")
    return [source.read(index) for index in range(0, len(source), max(1, len(source) // 64))]


# --------------------------------------------------------------------------------------------------------
# saving
# --------------------------------------------------------------------------------------------------------


def saving(arguments: list[str]) -> None:
    """How long a checkpoint keeps the training waiting."""
    bench_saving(parse_config(SavingConfig, arguments, f"{PROGRAM} saving"))


if __name__ == "__main__":
    run_main(PROGRAM, main)
