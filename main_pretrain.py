"""Pre-train LUT or MAE.

    python main_pretrain.py --recipe quickstart
    torchrun --nproc_per_node=8 main_pretrain.py --recipe paper_vit_base --data_path IMAGENET --output_dir RUN

`--help` lists all flags, `--dry_run` shows what a command would do. To resume after an interruption, run the same
command with --auto_resume.
"""

from __future__ import annotations

import util.runtime.before_torch  # noqa: F401

import sys
from dataclasses import replace
from pathlib import Path

from engine_pretrain import build_trainer
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.runtime.distributed import stop_processes
from util.runtime.errors import run_main
from util.train.monitor import Monitor
from util.train.plan import show_plan
from util.train.pretraining import (
    build_state,
    cached,
    check_inputs,
    open_training_images,
    planned_cost,
    pretrain_dataset,
)
from util.train.run import start_run, train_and_evaluate


def main() -> None:
    """Read the settings, open the data, build the models, and train."""
    run = start_run(parse_config(PretrainConfig, sys.argv[1:], Path(__file__).name), open_training_images)
    config, source, order = run.config, run.data.train, run.order
    if config.dry_run:
        updates = config.epochs * order.updates_per_epoch
        dataset = pretrain_dataset(replace(config, cache="none"), source, order.rank)
        facts = planned_cost(config, updates, run.dtype) | check_inputs(config, run.data)
        show_plan(run, str(len(source)), updates, facts, dataset)
        stop_processes()
        return

    # ---- data: disk -> views ---------------------------------------------------------------------------
    images = cached(config, source)
    dataset = pretrain_dataset(config, images, order.rank)

    # ---- models: views -> losses -----------------------------------------------------------------------
    state, origin = build_state(config, run.dtype, run.device)
    device_images = images.to(run.device) if config.cache == "device" else None
    del images  # with --cache device no loader needs the copy in the host's memory
    trainer = build_trainer(config, state, run.dtype, run.device, order.updates_per_epoch, device_images)

    # ---- the run ---------------------------------------------------------------------------------------
    evaluation = Monitor(trainer, run.data, trainer.normalise)
    train_and_evaluate(run, trainer, dataset, evaluation, origin)
    stop_processes()


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
