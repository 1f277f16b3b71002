"""Fine-tune a pre-trained encoder as a classifier, train one from scratch, or evaluate one.

    python main_finetune.py --recipe digits_finetune --finetune output/quickstart/checkpoint-79.pth
    torchrun --nproc_per_node=8 main_finetune.py --recipe finetune_vit_base --finetune RUN/checkpoint-1599.pth \
        --data_path IMAGENET --output_dir TUNED
    python main_finetune.py --eval --resume TUNED/checkpoint-best.pth --data_path IMAGENET

`--help` lists all flags, `--dry_run` shows what a command would do. To resume after an interruption, run the same
command with --auto_resume.
"""

from __future__ import annotations

import util.runtime.before_torch  # noqa: F401

import copy
import sys
from pathlib import Path

import torch
from timm.data import Mixup

from engine_finetune import ClassifierTrainer, run_classifier
from models_vit import Classifier
from util.config.classifier import FinetuneConfig
from util.runtime.distributed import stop_processes
from util.runtime.errors import run_main
from util.train.classification import open_labelled
from util.train.downstream import load_initial_weights, parse_downstream
from util.train.run import start_run
from util.train.state import data_parallel, initial_state


def main() -> None:
    """Read the settings, open the data, build the classifier, and train."""
    run = start_run(parse_downstream(FinetuneConfig, sys.argv[1:], Path(__file__).name), open_labelled)
    config, device, num_classes = run.config, run.device, run.data.num_classes

    # ---- model: images -> logits -----------------------------------------------------------------------
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = Classifier(**config.model_arguments(num_classes))
    origin = load_initial_weights(model, config, run.data.class_names)
    model.to(device)
    model_ema = copy.deepcopy(model).requires_grad_(False).eval() if config.model_ema else None
    state = initial_state(model, model_ema, config, run.dtype, device)

    # ---- the run ---------------------------------------------------------------------------------------
    trainer = ClassifierTrainer(
        config,
        state,
        data_parallel(model, config, device),
        device,
        run.dtype,
        run.order.updates_per_epoch,
        mix=Mixup(**config.mixup_arguments(num_classes)) if config.mixes else None,
        smoothing=config.smoothing,
        ema_decay=config.model_ema_decay,
    )
    run_classifier(run, trainer, origin)
    stop_processes()


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
