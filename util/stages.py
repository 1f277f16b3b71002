"""The kinds of runs: main_STAGE.py, what it is called, its settings, and the number that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from util.classifier_config import FinetuneConfig, LinprobeConfig
from util.pretrain_config import PretrainConfig
from util.segment_config import SegmentConfig


@dataclass(frozen=True)
class Main:
    """One of the mains."""

    title: str
    settings: type
    metric: str  # of its `results.jsonl`


MAINS = {
    "pretrain": Main("pre-training", PretrainConfig, "knn"),
    "finetune": Main("fine-tuning", FinetuneConfig, "top1"),
    "linprobe": Main("linear probing", LinprobeConfig, "top1"),
    "segment": Main("segmentation", SegmentConfig, "miou"),
}
