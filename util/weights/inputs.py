"""Check the files that a run would read before it is submitted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from models_upernet import UperNet
from models_vit import Classifier, LinearProbe
from util.data.datasets import open_images
from util.weights.interop import load_weights

DOWNSTREAM = {"finetune": Classifier, "linprobe": LinearProbe, "segment": UperNet}


def check_inputs(stage: str, settings: Any, may_be_missing: bool) -> list[str]:
    """Match the weights of --init_from or --finetune with the model, count the images of --val_path; a line for each.

    Args:
        stage: pretrain, finetune, linprobe or segment; other stages have no such flags.
        settings: those of the stage.
        may_be_missing: another run may write the weights first.

    Raises:
        UserError: a file cannot be read, or the weights do not fit the model.
    """
    flag = "init_from" if stage == "pretrain" else "finetune"
    path, val_path, lines = getattr(settings, flag, ""), getattr(settings, "val_path", ""), []
    if path and may_be_missing and not os.path.exists(path):
        lines.append(f"--{flag} {path}: not checked, it does not exist yet")
    elif path:
        weights = settings.init_weights if stage == "pretrain" else settings.weights
        model = build_model(stage, settings)
        report = load_weights(model, Path(path), weights, f"--{flag}", num_heads=settings.num_heads)
        lines.append(f"--{flag} {path}: {report}")
    if val_path:
        lines.append(f"--val_path {val_path}: {len(open_images(val_path, '', 'val', '--val_path'))} images")
    return lines


def build_model(stage: str, settings: Any) -> nn.Module:
    """Return the model of a stage; a classifier or segmenter has two classes."""
    if stage == "pretrain":
        return settings.student_type(**settings.model_arguments)
    return DOWNSTREAM[stage](**settings.model_arguments(num_classes=2))
