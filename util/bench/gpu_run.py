"""Stages `quickstart`, `loader` and `fsdp` of the GPU check: whole runs of main_pretrain.py by their commands."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch

from util.bench.gpu_runner import Recorder
from util.bench.limits import decode_rate, sample_photos
from util.runtime.errors import RunError
from util.runtime.files import ROOT

POINT = 1.0  # by which kNN accuracies may differ, in per cent


def start(script: str, *flags: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start a script of the project in the background."""
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process; RunError if it fails."""
    if status := process.wait():
        raise RunError(f"{' '.join(process.args)}: ended with status {status}")


def lines_of(folder: Path, key: str) -> list[dict[str, Any]]:
    """Return the log lines of a run that hold a value under the key."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if key in line]


# --------------------------------------------------------------------------------------------------------
# The quick start
# --------------------------------------------------------------------------------------------------------


def quickstart(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Run the quick start, kill it after its first checkpoint, resume it, and compare its kNN with that of the CPU."""
    folder, epochs = recorder.path.parent.resolve(), 2 if tiny else 80
    flags = (
        "--recipe",
        "quickstart",
        "--epochs",
        epochs,
        "--warmup_epochs",
        epochs / 10,
        "--save_freq",
        max(1, epochs // 4),
    )
    flags = (*flags, "--monitor_freq", epochs, "--auto_resume", "--output_dir")
    on_cpu = start("main_pretrain.py", *flags, folder / "run-cpu", "--device", "cpu")
    run = folder / "run-device"
    begin = time.monotonic()
    process = start("main_pretrain.py", *flags, run, "--device", device)
    while not list(run.glob("checkpoint-*.pth.json")) and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.wait()
    killed = [line["step"] for line in lines_of(run, "loss")]
    finish(start("main_pretrain.py", *flags, run, "--device", device))
    steps = [line["step"] for line in lines_of(run, "loss")]
    complete = steps == sorted(set(steps)) and bool(killed) and killed[-1] < steps[-1]
    recorder.row("killed and resumed", passed=complete, seconds=time.monotonic() - begin, updates=steps[-1])
    knn = lines_of(run, "knn")[-1]["knn"]
    recorder.row("kNN on the device", knn=knn)
    finish(on_cpu)
    expected = lines_of(folder / "run-cpu", "knn")[-1]["knn"]
    recorder.row("kNN on the CPU", passed=abs(knn - expected) <= POINT, knn=expected)


# --------------------------------------------------------------------------------------------------------
# The data loader
# --------------------------------------------------------------------------------------------------------


def write_photos(folder: Path, number: int) -> None:
    """Write JPEGs of 500x375 pixels as files below folder/files and as folder/tar/images.tar."""
    photos = sample_photos()
    (folder / "files").mkdir(parents=True)
    (folder / "tar").mkdir()
    for i in range(number):
        (folder / "files" / f"{i:05}.jpg").write_bytes(photos[i % 2])
    with tarfile.open(folder / "tar" / "images.tar", "w") as archive:
        archive.add(folder / "files", arcname="images")


def loader(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Measure runs from JPEGs, a tar and prepared shards, with some numbers of workers; then decoding on the GPU."""
    folder = recorder.path.parent.resolve() / "photos"
    write_photos(folder, 64 if tiny else 4096)
    recorder.attempt(
        "JPEG decoding, one CPU core", lambda: {"images_per_second": decode_rate(sample_photos(), 1).median}
    )
    if device.type == "cuda":
        recorder.attempt("JPEG decoding on the GPU", lambda: {"images_per_second": gpu_decode_rate(device)})
    workers = (1,) if tiny else (16, 8, 4)
    measured = [("files", n, "") for n in workers] + [
        ("files", workers[0], "--augment_on device"),
        ("tar", workers[0], ""),
    ]
    for source, number, flags in measured:
        recorder.attempt(
            f"{source}, {number} workers {flags}".strip(),
            lambda s=source, n=number, f=flags: waiting(folder / s, device, n, f, tiny),
        )

    def prepared() -> dict[str, Any]:
        finish(start("scripts/prepare_data.py", "--data_path", folder / "files", "--output_dir", folder / "shards"))
        return waiting(folder / "shards", device, workers[0], "", tiny)

    recorder.attempt(f"prepared shards, {workers[0]} workers", prepared)


def waiting(data: Path, device: torch.device, workers: int, flags: str, tiny: bool) -> dict[str, Any]:
    """Return images/s and the share of waiting for data of a short run, without its first log line."""
    run = data.parent / f"run-{data.name}-{workers}{flags.replace(' ', '')}"
    size = (
        "nano_patch4 --input_size 32 --batch_size 8 --max_steps 4"
        if tiny
        else "small_patch16 --batch_size 256 --max_steps 30"
    )
    size += " --print_freq 2" if tiny else " --print_freq 10"
    arguments = f"--model lut_vit_{size} --epochs 10 --warmup_epochs 0 --monitor_freq 0 --num_workers {workers} {flags}"
    finish(start("main_pretrain.py", *arguments.split(), "--data_path", data, "--output_dir", run, "--device", device))
    lines = lines_of(run, "images_per_second")[1:]
    return {name: sum(line[name] for line in lines) / len(lines) for name in ("images_per_second", "data_wait")}


def gpu_decode_rate(device: torch.device) -> float:
    """Return images/s of torchvision's JPEG decoder on the GPU, in batches of 64."""
    from torchvision.io import decode_jpeg

    from util.bench.limits import rate

    files = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in sample_photos()] * 32
    return rate(lambda: decode_jpeg(files, device=device), len(files), device, 2.0).median


def fsdp(device: torch.device, recorder: Recorder, tiny: bool) -> None:
    """Train two epochs of the quick start in one process with --parallel ddp and fsdp, and compare the losses."""
    losses = []
    for parallel in ("ddp", "fsdp"):
        run = recorder.path.parent.resolve() / f"run-{parallel}"
        flags = f"--recipe quickstart --epochs 2 --warmup_epochs 0 --monitor_freq 0 --amp fp32 --parallel {parallel}"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
        arguments = (*flags.split(), "--output_dir", run, "--device", device.type)
        finish(start("main_pretrain.py", *arguments, launcher=launcher))
        losses.append(lines_of(run, "loss")[-1]["loss"])
    difference = abs(losses[0] - losses[1]) / losses[0]
    recorder.row("loss with ddp and fsdp", passed=difference < 1e-3, ddp=losses[0], fsdp=losses[1])
