"""Train a linear layer, or an attentive head, on a frozen encoder.

The linear layer follows MAE's protocol: LARS, BatchNorm without affine parameters, crop and flip only.

    python main_linprobe.py --recipe digits_linprobe --finetune output/quickstart/checkpoint-79.pth
    torchrun --nproc_per_node=8 main_linprobe.py --recipe linprobe_vit_base --finetune RUN/checkpoint-1599.pth \
        --data_path IMAGENET --output_dir PROBED

The cls token is probed, with --pool avg the mean of the patch tokens, or with --pool attentive all patch tokens by
learned queries. scripts/probe.py is the quick way: it computes the features once. `--help` lists all flags; to resume
after an interruption, run the same command with --auto_resume.
"""

from __future__ import annotations

import util.runtime.before_torch  # noqa: F401

import sys
from pathlib import Path

import torch

from engine_finetune import ClassifierTrainer, run_classifier
from models_vit import LinearProbe
from util.analysis.attentive import AttentiveProbe
from util.config.classifier import LinprobeConfig
from util.optim.optimizer import build_lars
from util.runtime.distributed import stop_processes, synchronise_batch_norm
from util.runtime.errors import run_main
from util.train.classification import open_labelled
from util.train.downstream import load_initial_weights, parse_downstream
from util.train.run import start_run
from util.train.state import adamw, data_parallel, initial_state


def main() -> None:
    """Read the settings, open the data, build the probe, and train."""
    run = start_run(parse_downstream(LinprobeConfig, sys.argv[1:], Path(__file__).name), open_labelled)
    config, device = run.config, run.device

    # ---- model: images -> frozen features -> logits ----------------------------------------------------
    torch.manual_seed(config.seed)  # the same weights on every rank
    probe = AttentiveProbe if config.attentive else LinearProbe
    model = probe(**config.model_arguments(run.data.num_classes))
    origin = load_initial_weights(model, config, run.data.class_names)
    model = synchronise_batch_norm(model, device).to(device)
    state = initial_state(model, None, config, run.dtype, device, make_optimizer=adamw if config.attentive else lars)

    # ---- the run ---------------------------------------------------------------------------------------
    parallel_model = data_parallel(model, config, device)
    trainer = ClassifierTrainer(config, state, parallel_model, device, run.dtype, run.order.updates_per_epoch)
    run_classifier(run, trainer, origin)
    stop_processes()


def lars(model: LinearProbe, config: LinprobeConfig) -> torch.optim.Optimizer:
    """Return LARS for the head alone, as MAE does."""
    return build_lars(model, config.peak_lr, config.weight_decay)


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
