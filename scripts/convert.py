"""Turn a checkpoint into what another program reads.

    python scripts/convert.py RUN/checkpoint-399.pth --to timm --output vit.safetensors
    python scripts/convert.py mae_pretrain_vit_base.pth --to hf --output hub_folder --pool token
    python scripts/convert.py TUNED/checkpoint-best.pth --to onnx --output vit.onnx

IN is a checkpoint of ours, MAE's, LUT's release or timm's, .pth or .safetensors. Nothing in it is run. The call that
loads the result is printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.command_line import parse_config
from util.config.groups import DataConfig, check, check_image_size
from util.runtime.errors import UserError, run_main
from util.weights.export import shape_of, write_hub_folder, write_mae, write_onnx, write_timm
from util.weights.interop import Weights, is_linear_probe, read_weights

SUFFIXES = {"mae": ".pth", "timm": ".safetensors", "hf": "", "onnx": ".onnx"}


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a checkpoint into what another program reads."""

    input: Annotated[Positional[str], arg(metavar="IN")]
    """checkpoint to read"""
    to: Literal["mae", "timm", "hf", "onnx"]
    """mae: .pth with encoder and decoder; timm: .safetensors and .json; hf: folder for the Hub; onnx: graph"""
    output: str
    """file or folder to write"""
    weights: Weights | None = None
    """which of the two encoders; default: student, or of a classifier with --model_ema its moving average (momentum)"""
    pool: Literal["avg", "token"] = "avg"
    """what the exported encoder returns: mean of the patch tokens, or cls token; a classifier knows its own"""
    num_heads: int | None = None
    """attention heads; default: of the run's settings, or of the known model of that width"""
    input_size: tuple[int, ...] = ()
    """pixels, height and width; default: of the run's settings, or a square"""
    mean: tuple[float, ...] = ()
    """per channel, written into the result; default: of the run's settings, or as for pre-training"""
    std: tuple[float, ...] = ()
    """per channel, likewise"""

    def __post_init__(self) -> None:
        suffix, output = SUFFIXES[self.to], Path(self.output)
        check(output.suffix == suffix or not suffix, "output", self.output, f"--to {self.to} writes a {suffix} file")
        check(not (suffix and output.is_dir()), "output", self.output, "is a folder, give a file")
        check(not (self.to == "hf" and output.is_file()), "output", self.output, "is a file, give a folder")
        check_image_size(self.input_size)
        check(output.resolve() != Path(self.input).resolve(), "output", self.output, "would overwrite IN")


def main() -> None:
    """Read, write, and say how to load the result."""
    config = parse_config(ConvertConfig, sys.argv[1:], Path(__file__).name)
    file = read_weights(Path(config.input), config.weights, flag="IN")
    output = Path(config.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if config.to == "mae":
            said = write_mae(file, output)
        else:
            shape = shape_of(file, config.num_heads, config.input_size)
            pixels = pixel_statistics(config, file.config or {}, shape.in_chans)
            write = {"timm": write_timm, "hf": write_hub_folder, "onnx": write_onnx}[config.to]
            said = write(file, shape, config.pool, pixels.resolved_mean, pixels.resolved_std, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}), choose another") from error
    if is_linear_probe(file.state):
        said += "\nleft out: the head of the linear probe, whose BatchNorm no other program has"
    print(f"{config.input} ({file.layout}, {len(file.state)} tensors) -> {output}\n{said}")


def pixel_statistics(config: ConvertConfig, run: dict, in_chans: int) -> DataConfig:
    """Mean and deviation of the pixels: asked for, of the run, or the defaults."""
    mean, std = (tuple(getattr(config, name) or run.get(name) or ()) for name in ("mean", "std"))
    return DataConfig(in_chans=in_chans, mean=mean, std=std)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
