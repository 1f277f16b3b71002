"""Prove in some minutes that a GPU computes what the CPU does, and measure how fast it is.

    python scripts/check_gpu.py --minutes 9 --output check_gpu

It needs no network and no data. Stages run in processes of their own, in order of value; OUTPUT/results.json and
OUTPUT/index.html are written after each, whatever happens to the next. `--device cpu` rehearses with tiny models.
Status 1: a stage did not pass.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# stage -> title, time limit in seconds of 9 minutes, module of util.bench that has a function of that name
STAGES = {
    "equality": ("Updates, masks and views equal those of the CPU", 100, "gpu_equality"),
    "quickstart": ("The quick start, killed and resumed", 110, "gpu_run"),
    "speed": ("Speed and memory of the update", 170, "gpu_speed"),
    "loader": ("Waiting for data", 110, "gpu_run"),
    "fsdp": ("FSDP in one process", 60, "gpu_run"),
    "large": ("Activation checkpointing, ViT-H, saving", 90, "gpu_speed"),
}


def main() -> int:
    """Run the stages, or with --stage the one that is named, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages (default: 9)")
    parser.add_argument("--output", type=Path, default=Path("check_gpu"), help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run (default: all)"
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.stage:
        return run_in_this_process(arguments.stage, arguments.device, arguments.output)
    from util.bench.gpu_runner import Stage, run_stages

    shared = ("--device", arguments.device, "--output", str(arguments.output))
    stages = []
    for name in arguments.stages:
        title, seconds, _ = STAGES[name]
        command = (sys.executable, "-u", __file__, "--stage", name, *shared)
        stages.append(Stage(name, title, seconds * arguments.minutes / 9, command))
    results = run_stages(stages, arguments.output, arguments.minutes)
    print(f"results: {arguments.output / 'index.html'}")
    return int(any(result["state"] != "passed" for result in results))


def run_in_this_process(name: str, device_name: str, output: Path) -> int:
    """Run a stage; status 1 if one of its rows failed."""
    import importlib

    import torch

    from util.bench.gpu_runner import Recorder
    from util.runtime.distributed import choose_device

    device, recorder = choose_device(device_name), Recorder(output, name)
    recorder.row(
        "device", torch=torch.__version__, device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    )
    getattr(importlib.import_module(f"util.bench.{STAGES[name][2]}"), name)(device, recorder, tiny=device.type == "cpu")
    return int(bool(recorder.failed))


if __name__ == "__main__":
    raise SystemExit(main())
