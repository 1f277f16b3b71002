"""Train a pre-trained encoder with UperNet to segment images, train both from scratch, or evaluate what was trained.

    torchrun --nproc_per_node=8 main_segment.py --recipe segment_vit_base --finetune RUN/checkpoint-1599.pth \
        --data_path ADE20K --output_dir SEGMENTED
    python main_segment.py --recipe camvid_segment --finetune RUN/checkpoint-299.pth --data_path CAMVID
    python main_segment.py --eval --resume SEGMENTED/checkpoint-best.pth --data_path ADE20K

`--help` lists all flags, `--dry_run` reads all masks and shows what a command would do. To resume after an
interruption, run the same command with --auto_resume.
"""

from __future__ import annotations

import util.runtime.before_torch  # noqa: F401

import sys
from pathlib import Path

import torch

from engine_segment import SegmenterTrainer, run_segmenter
from models_upernet import UperNet
from util.config.segment import SegmentConfig
from util.data.views import Normalise
from util.runtime.distributed import stop_processes, synchronise_batch_norm
from util.runtime.errors import run_main
from util.train.downstream import load_initial_weights, parse_downstream
from util.train.run import start_run
from util.train.segmentation import open_checked
from util.train.state import data_parallel, initial_state


def main() -> None:
    """Read the settings, open images and masks, build the segmenter, and train."""
    run = start_run(parse_downstream(SegmentConfig, sys.argv[1:], Path(__file__).name), open_checked)
    config, device = run.config, run.device

    # ---- model: images -> logits of each pixel ---------------------------------------------------------
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = UperNet(**config.model_arguments(run.data.num_classes))
    origin = load_initial_weights(model, config, run.data.class_names)
    model = synchronise_batch_norm(model, device).to(device)
    state = initial_state(model, None, config, run.dtype, device)

    # ---- the run ---------------------------------------------------------------------------------------
    trainer = SegmenterTrainer(
        config,
        state,
        data_parallel(model, config, device),
        device,
        run.dtype,
        run.order.updates_per_epoch,
        normalise=Normalise(config.resolved_mean, config.resolved_std, device),
    )
    run_segmenter(run, trainer, origin)
    stop_processes()


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
