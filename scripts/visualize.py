"""Reconstructions: image | masked | reconstruction | reconstruction with the visible patches pasted in.

    python scripts/visualize.py RUN/checkpoint-399.pth --image cat.jpg dog.jpg --mask_ratio 0.5 0.75 0.9 --seed 0 1
    python scripts/visualize.py mae_visualize_vit_base.pth --target pixels --image cat.jpg
    python scripts/visualize.py --animate RUN --output RUN/growth.gif

The checkpoint is one of pre-training with its decoder: ours, MAE's or LUT's release. --animate draws all checkpoints in
a run's folder (keep more of them with --save_periods last every_10_epochs). The errors are written beside --output, as
.json.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from tyro.conf import Positional, arg

from util.analysis.images import Images, find_images
from util.analysis.reconstruction import (
    Target,
    open_autoencoder,
    reconstruction_figure,
    reconstruction_numbers,
    reconstructions,
)
from util.config.checks import check, check_image_size
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.figures.figure import save_figure
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, run_main
from util.runtime.files import write_durably
from util.runtime.progress import progress
from util.weights.checkpoint import complete_checkpoints
from util.weights.vit import NamedViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 500, 2500
GIF_DPI = 100


@dataclass(frozen=True)
class VisualizeConfig:
    """Reconstruct images with a checkpoint, or with all checkpoints of a run."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """a checkpoint of pre-training with its decoder"""
    animate: str = ""
    """instead of a checkpoint: the folder of a run; draws a GIF over its checkpoints"""
    target: Target = "run"
    """what the decoder predicts: normalised patches (--norm_pix_loss) or pixels; run: as the file says"""
    num_heads: int | None = None
    """attention heads of the encoder; default: as the file or its layout tells"""
    decoder_num_heads: int | None = None
    """attention heads of the decoder; default: of the known model of that width"""

    image: tuple[str, ...] = ()
    """image files; default: --show images of a data set"""
    data_path: str = ""
    """images as for main_pretrain.py"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py; default without --image and --data_path: digits"""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it, or turn the pixels as it says"""
    split: Literal["train", "val"] = "val"
    """split of the data set"""
    show: int = 4
    """number of images taken from the data set"""
    input_size: Annotated[tuple[int, ...], arg(aliases=["--img_size"])] = ()
    """pixels, one number or height and width; default: the model's own"""
    mask_ratio: tuple[float, ...] = (0.75,)
    """fractions of patches to hide"""
    seed: tuple[int, ...] = (0,)
    """seeds of the masks; the first one also chooses images from a data set"""

    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    output: str = ""
    """picture to write; default: output/reconstruction.png, with --animate .gif"""

    def __post_init__(self) -> None:
        check(bool(self.checkpoint) != bool(self.animate), "animate", self.animate, "give CHECKPOINT or --animate RUN")
        check(
            not (self.image and (self.data_path or self.dataset)),
            "image",
            self.image,
            "give it or a data set, not both",
        )
        check(self.show >= 1, "show", self.show, "must be 1 or more")
        check_image_size(self.input_size)
        for flag in ("mask_ratio", "seed"):
            check(bool(getattr(self, flag)), flag, "", "give at least one")
        for ratio in self.mask_ratio:
            check(0 < ratio < 1, "mask_ratio", ratio, "must lie between 0 and 1, as 0.75")
        for seed in self.seed:
            check(0 <= seed < 2**32, "seed", seed, "must lie in 0..2^32 - 1")
        suffix = self.path.suffix.lower()
        check(suffix == self.required_suffix, "output", self.output, f"must end in {self.required_suffix}")

    @property
    def required_suffix(self) -> str:
        """The suffix of the output file."""
        return ".gif" if self.animate else ".png"

    @property
    def path(self) -> Path:
        """The value of --output, or its default."""
        return Path(self.output or f"output/reconstruction{self.required_suffix}")


def main() -> None:
    """Draw the reconstructions and write them with their errors."""
    config = parse_config(VisualizeConfig, sys.argv[1:], Path(__file__).name)
    images = find_images(
        config.image, config.data_path, config.dataset, config.split, most=config.show, show=config.show,
        seed=config.seed[0], exif=config.exif,
    )  # fmt: skip
    try:
        numbers = animate(config, images) if config.animate else draw(config, images)
        text = json.dumps({"config": as_dict(config), "reconstructions": numbers}, indent=1) + "\n"
        write_durably(config.path.with_suffix(".json"), lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"--output {config.path}: cannot be written ({error.strerror or error})") from error
    print(f"{config.path} and {config.path.with_suffix('.json').name}")


def open_model(config: VisualizeConfig, path: Path) -> NamedViT:
    """Open a checkpoint with its decoder."""
    heads = (config.num_heads, config.decoder_num_heads)
    return open_autoencoder(path, config.target, config.input_size, heads, choose_device(config.device))


def draw(config: VisualizeConfig, images: Images) -> list[dict]:
    """Write one picture and return the errors."""
    vit = open_model(config, Path(config.checkpoint))
    print(vit.origin)
    reconstructed = reconstructions(vit, images, config.mask_ratio, config.seed)
    figure = reconstruction_figure(vit, images, reconstructed, f"Reconstructions by {vit.label}")
    save_figure(figure, config.path)
    return reconstruction_numbers(images, reconstructed)


def animate(config: VisualizeConfig, images: Images) -> list[dict]:
    """Write a frame for each checkpoint of a run, oldest first, and return the errors of all."""
    folder = Path(config.animate)
    checkpoints = complete_checkpoints(folder)
    if len(checkpoints) < 2:
        raise UserError(
            f"--animate {folder}: holds {len(checkpoints)} complete checkpoints, two are needed;"
            " a run keeps more with --save_periods last every_10_epochs"
        )
    frames, numbers = [], []
    for path, manifest in progress(checkpoints, len(checkpoints), f"frames of {folder}", "checkpoints"):
        vit = open_model(config, path)
        reconstructed = reconstructions(vit, images, config.mask_ratio, config.seed)
        progress_made = f"update {manifest.step}" if "-step" in path.name else f"epoch {manifest.epoch + 1}"
        title = f"{folder.resolve().name}, after {progress_made}"
        frames.append(frame(reconstruction_figure(vit, images, reconstructed, title)))
        numbers += [{"checkpoint": path.name, **each} for each in reconstruction_numbers(images, reconstructed)]
    config.path.parent.mkdir(parents=True, exist_ok=True)
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_FRAME_MILLISECONDS]
    gif = io.BytesIO()
    frames[0].save(gif, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_durably(config.path, lambda file: file.write(gif.getbuffer()))
    return numbers


def frame(figure: Figure) -> Image.Image:
    """Render a figure as an image of 256 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=GIF_DPI)
    return Image.open(buffer).convert("RGB").quantize(256)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
