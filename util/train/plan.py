"""What --dry_run prints: the settings, the cost of the run, and one real batch."""

from __future__ import annotations

import time
from collections.abc import Mapping

import yaml
from torch.utils.data import Dataset, IterableDataset

from util.config.groups import as_dict
from util.data.loader import training_loader
from util.runtime.distributed import is_main
from util.train.cost import classifier_flops, count_parameters
from util.train.run import Run
from util.train.trainer import Trainer


def show_downstream_plan(run: Run, trainer: Trainer, dataset: Dataset | None, origin: str) -> None:
    """Print the plan of a classifier or segmenter that has been built, and where its weights came from."""
    data, model = run.data, trainer.state.model
    flops = classifier_flops(model, (run.config.in_chans, *run.config.resolved_input_size))
    facts = {
        "parameters": f"{count_parameters(model) / 1e6:.2f} M",
        "GFLOP": f"{flops / 1e9:.2f} per image, forward and backward",
        "weights": origin,
    }
    images = f"{0 if data.train is None else len(data.train)} training, {len(data.val)} validation"
    show_plan(run, f"{images}, {data.num_classes} classes", trainer.total_updates, facts, dataset)


def show_plan(run: Run, images: str, total_updates: int, cost: Mapping[str, str], dataset: Dataset | None) -> None:
    """Print the plan of a run on rank 0.

    Args:
        images: how many there are, and of what.
        dataset: yields the samples that `run.order` names; of a stream, or without one (--eval), no batch is made.
    """
    if not is_main():
        return
    config, per_epoch = run.config, run.order.updates_per_epoch
    print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    epochs, rest = divmod(total_updates, per_epoch) if per_epoch else (0, total_updates)
    spread = f"{per_epoch} per epoch, in all" if rest else f"{per_epoch} per epoch x {epochs} epochs ="
    facts = {
        "images": images,
        "updates": f"{spread} {total_updates}",
        "effective batch": f"{config.effective_batch}, peak lr {config.peak_lr:.3g}",
        **cost,
    }
    if dataset is not None and not isinstance(dataset, IterableDataset):
        begin = time.perf_counter()
        batch = next(iter(training_loader(dataset, run.order, num_workers=0, pin_memory=False, timeout=0)))
        seconds = time.perf_counter() - begin
        facts["one batch"] = f"{tuple(batch[0].shape)} {str(batch[0].dtype).removeprefix('torch.')}"
        facts["one batch"] += f", made in {seconds:.2f} s by one process"
    for name, fact in facts.items():
        print(f"{name:<17}{fact}")
