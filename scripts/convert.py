"""Write a checkpoint in the layout of another program.

    python scripts/convert.py RUN/checkpoint-399.pth --to timm --output vit.safetensors
    python scripts/convert.py mae_pretrain_vit_base.pth --to hf --output hub_folder --pool token
    python scripts/convert.py TUNED/checkpoint-best.pth --to onnx --output vit.onnx

IN is a checkpoint of ours or of a program that docs/MODELS.md lists, .pth or .safetensors. No code in it is run. The
call that loads the result is printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.checks import check, check_image_size
from util.config.command_line import parse_config
from util.config.groups import DataConfig
from util.runtime.errors import RunError, run_main
from util.weights.checkpoint import run_folder_of
from util.weights.export import Export, depth_remark, shape_of, write_hub_folder, write_mae, write_onnx, write_timm
from util.weights.interop import WeightsFile, read_weights
from util.weights.layouts import Weights, is_linear_probe

SUFFIXES = {"mae": ".pth", "timm": ".safetensors", "hf": "", "onnx": ".onnx"}


@dataclass(frozen=True)
class ConvertConfig:
    """Write a checkpoint in the layout of another program."""

    input: Annotated[Positional[str], arg(metavar="IN")]
    """checkpoint to read"""
    to: Literal["mae", "timm", "hf", "onnx"]
    """mae: .pth with encoder and decoder; timm: .safetensors and .json; hf: folder for the Hub; onnx: graph"""
    output: str
    """file or folder to write, outside of any run's folder"""
    weights: Weights | None = None
    """which of the file's two networks; default: student, or for a classifier with --model_ema its EMA
    (momentum)"""
    pool: Literal["avg", "token"] = "avg"
    """what the exported encoder returns: mean of the patch tokens, or cls token; a classifier knows its own"""
    num_heads: int | None = None
    """attention heads; default: as the file or its layout tells"""
    input_size: tuple[int, ...] = ()
    """pixels, height and width; default: those of the run's settings, or a square"""
    mean: tuple[float, ...] = ()
    """per channel, written into the result; default: those of the run's settings, or as for pre-training"""
    std: tuple[float, ...] = ()
    """per channel, likewise"""

    def __post_init__(self) -> None:
        suffix, output = SUFFIXES[self.to], Path(self.output)
        check(output.suffix == suffix or not suffix, "output", self.output, f"--to {self.to} writes a {suffix} file")
        check(not (suffix and output.is_dir()), "output", self.output, "is a folder, give a file")
        check(not (self.to == "hf" and output.is_file()), "output", self.output, "is a file, give a folder")
        check_image_size(self.input_size)
        check(not is_same_file(output, Path(self.input)), "output", self.output, "would overwrite IN")
        run = run_folder_of(output)
        check(run is None, "output", self.output, f"lies in the folder of a run, {run}, whose files it could replace")


def is_same_file(first: Path, second: Path) -> bool:
    """True if two paths name one file, also by a symbolic or hard link."""
    return first.exists() and second.exists() and first.samefile(second)


def main() -> None:
    """Read, write, and print how to load the result."""
    config = parse_config(ConvertConfig, sys.argv[1:], Path(__file__).name)
    file = read_weights(Path(config.input), config.weights, flag="IN")
    output = Path(config.output)
    try:
        usage = write(config, file, output)
    except OSError as error:
        raise RunError(f"--output {output}: cannot be written ({error.strerror or error}), choose another") from error
    if is_linear_probe(file.state):
        usage += "\nleft out: the head of the linear probe, whose BatchNorm no other program has"
    print(f"{config.input} ({file.layout}, {len(file.state)} tensors) -> {output}\n{usage}")


def write(config: ConvertConfig, file: WeightsFile, output: Path) -> str:
    """Write the export completely or not at all; return how to load it."""
    if config.to == "mae":
        output.parent.mkdir(parents=True, exist_ok=True)
        return write_mae(file, config.num_heads, output)
    shape = shape_of(file, config.num_heads, config.input_size)
    run = file.config or {}
    mean, std = (tuple(getattr(config, name) or run.get(name) or ()) for name in ("mean", "std"))
    pixels = DataConfig(in_chans=shape.in_chans, mean=mean, std=std)
    export = Export(file, shape, config.pool, pixels.resolved_mean, pixels.resolved_std)
    remark = depth_remark(shape).removeprefix("; ")
    if remark:
        print(f"WARNING: IN: {remark}", file=sys.stderr)
    output.parent.mkdir(parents=True, exist_ok=True)
    return {"timm": write_timm, "hf": write_hub_folder, "onnx": write_onnx}[config.to](export, output)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
