"""The kinds of runs: the script, what it is called, its settings, and the number that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from util.classifier_config import FinetuneConfig, LinprobeConfig
from util.pretrain_config import PretrainConfig
from util.probe_config import ProbeConfig
from util.segment_config import SegmentConfig


@dataclass(frozen=True)
class Main:
    """A script that does one kind of run."""

    program: str  # below the project's folder
    title: str
    settings: type
    metric: str  # of its `results.jsonl`


MAINS = {
    "pretrain": Main("main_pretrain.py", "pre-training", PretrainConfig, "knn"),
    "finetune": Main("main_finetune.py", "fine-tuning", FinetuneConfig, "top1"),
    "linprobe": Main("main_linprobe.py", "linear probing", LinprobeConfig, "top1"),
    "segment": Main("main_segment.py", "segmentation", SegmentConfig, "miou"),
    "probe": Main("scripts/probe.py", "probing of frozen features", ProbeConfig, "student, logistic, all labels"),
}
