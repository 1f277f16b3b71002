"""The run of a model that is trained on labels: what fine-tuning, probing and segmentation share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from util.config.command_line import as_flags, last_value, parse_config
from util.config.groups import DownstreamConfig, PixelConfig, as_dict, check
from util.config.same_run import KIND, kind_of
from util.data.loader import training_loader
from util.data.samples import BatchOrder
from util.optim.optimizer import build_optimizer
from util.results.results import append_result, hardware_info
from util.runtime.amp import autocast_dtype, choose_attention, grad_scaler
from util.runtime.distributed import Processes, is_main, start_processes
from util.runtime.errors import UserError
from util.runtime.sharding import check_sharding, shard
from util.train.cost import classifier_flops, count_parameters
from util.train.evaluation import Evaluation, Scores
from util.train.run import (
    check_batch,
    checkpoint_to_resume,
    fit_to_processes,
    open_log,
    open_store,
    restore_state,
    resumes,
    train,
    transform_blocks,
)
from util.train.trainer import Trainer, TrainState
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import load_weights

Config = TypeVar("Config")

# what --eval takes over from the run that it evaluates, where neither flags nor a recipe say otherwise
OF_THE_RUN = (
    *("model", "patch_size", "input_size", "in_chans", "mean", "std", "exif"),
    *("global_pool", "cls_token", "head_width"),
)


def parse_downstream(config_type: type[Config], arguments: Sequence[str], program: str) -> Config:
    """As `parse_config`, with --eval upon what makes the model and its input in the run of --resume or --finetune.

    Of a run with --model_ema, whose accuracy is that of the moving average, the average is evaluated.

    Raises:
        UserError: also where that run was of another kind.
    """
    before: list[str] = []
    given = {flag: path for flag in ("resume", "finetune") if (path := last_value(flag, arguments))}
    if "--eval" in arguments and len(given) == 1:
        ((flag, path),) = given.items()
        checkpoint = load_checkpoint(Path(path), f"--{flag}")
        saved = checkpoint.get("config")
        stage, own = (checkpoint.get("binding_settings") or {}).get(KIND), kind_of(config_type)
        if stage not in (None, own):
            fix = "train one from it first" if stage == "pretrain" else f"evaluate it by main_{stage}.py"
            raise UserError(f"--{flag} {path}: is of {stage}, and --eval here wants a model of {own}; {fix}")
        known = {field.name for field in dataclasses.fields(config_type)}
        if isinstance(saved, dict):
            of_the_run = {name: saved.get(name) for name in OF_THE_RUN if name in known}
            of_the_run |= {"weights": "momentum"} if saved.get("model_ema") is True else {}
            before = as_flags({name: value for name, value in of_the_run.items() if value not in (None, [])})
    return parse_config(config_type, arguments, program, before)


@dataclass(frozen=True)
class Prepared:
    """What can be wrong with the input, found before a model is built."""

    config: Any  # the batch fitted to the processes (--elastic)
    processes: Processes
    dtype: torch.dtype | None  # of autocast; None: fp32
    data: Any  # `train` (None for --eval) and `val`, sources of images
    order: BatchOrder


def prepare(config: Config, open_data: Callable[[Config, Processes], Any]) -> Prepared:
    """Processes, precision, data and batches of a run; every UserError that they may hold."""
    processes = start_processes(config.device, config.dist_backend)
    dtype = autocast_dtype(config.amp, processes.device)
    check_sharding(config.parallel, dtype, processes.device)
    data = open_data(config, processes)
    config = fit_to_processes(config)
    return Prepared(config, processes, dtype, data, training_order(config, data, processes))


def training_order(config: Any, data: Any, processes: Processes) -> BatchOrder:
    """Which images make up which batch; an epoch of none is an error."""
    images = len(data.train or data.val)
    shape = (config.batch_size, config.accum_iter, processes.rank, processes.world_size)
    order = BatchOrder(images, *shape, config.seed)
    if not config.eval:
        check_batch(config, order)
    return order


def start_from(model: torch.nn.Module, config: DownstreamConfig) -> str:
    """Load --finetune, or with --eval the whole model of --finetune or --resume; what to say of it."""
    if config.eval:
        flag, path = ("--resume", config.resume) if config.resume else ("--finetune", config.finetune)
        return f"{flag} {path}: {load_weights(model, Path(path), config.weights, flag, whole=True)}"
    if not config.finetune:
        check(config.weights == "student", "weights", config.weights, "is of --finetune, which is not given")
        return "no --finetune: from scratch"
    if resumes(config):
        return f"--finetune {config.finetune}: not read, a checkpoint of this run takes its place"
    report = load_weights(model, Path(config.finetune), config.weights, "--finetune")
    return f"--finetune {config.finetune}: {report}{other_normalisation(report.settings, config)}"


def other_normalisation(run: Mapping[str, Any], config: PixelConfig) -> str:
    """What to add where the run that wrote the weights normalised pixels otherwise than this one does."""
    if run.get("in_chans") != config.in_chans:
        return ""  # no run of ours, or the first layer was resampled, which is said already
    given = {name: tuple(run.get(name) or ()) for name in ("mean", "std")}
    before = PixelConfig(in_chans=config.in_chans, **given)
    if (before.resolved_mean, before.resolved_std) == (config.resolved_mean, config.resolved_std):
        return ""
    flags = as_flags({"mean": list(before.resolved_mean), "std": list(before.resolved_std)})
    return f"; pixels were normalised by other numbers there, {' '.join(flags)}: give the same here"


def adamw(model: nn.Module, config: DownstreamConfig) -> torch.optim.Optimizer:
    """For a model that is trained as a whole."""
    return build_optimizer(model, config.peak_lr, config.betas, config.weight_decay, config.layer_decay)


def fresh_state(
    model: nn.Module,
    prepared: Prepared,
    average: nn.Module | None = None,
    build: Callable[[nn.Module, DownstreamConfig], torch.optim.Optimizer] = adamw,
) -> TrainState:
    """A model as its run begins: sharded and compiled where asked, with its optimiser.

    Args:
        model: on the device already.
        average: a copy that will follow it.
        build: makes the optimiser.
    """
    config, device = prepared.config, prepared.processes.device
    for each in filter(None, (model, average)):
        choose_attention(each, prepared.dtype, device)
    shards = config.parallel == "fsdp" and not (config.eval or config.dry_run)
    skeleton = shard(model, average, device) if shards else None
    if not config.dry_run:
        transform_blocks(model, config)
    state = TrainState(model, average, build(model, config), grad_scaler(prepared.dtype, device), skeleton=skeleton)
    state.updates = config.start_epoch * prepared.order.updates_per_epoch
    return state


def train_and_evaluate(
    trainer: Trainer,
    prepared: Prepared,
    make_dataset: Callable[[], Dataset],
    make_evaluation: Callable[[], Evaluation],
    stage: str,
    said: str,
) -> Scores | None:
    """The whole run of a model that has been built: resume, epochs, evaluations, result; or --eval alone.

    Args:
        make_dataset: of the samples that the order names, called once for a run that trains.
        make_evaluation: called once the output folder is known to be ours.
        stage: as `finetune`, for results.jsonl.
        said: where the weights came from, for the log.
    """
    config, source, order = prepared.config, prepared.data.train, prepared.order
    store = open_store(config)
    evaluation = make_evaluation()
    if config.eval:
        return evaluation.alone(stage, said)
    resumed = checkpoint_to_resume(config, store)
    begins = resumed is None
    binding = restore_state(trainer.state, config, source, resumed)
    del resumed  # as large as the run's state, and nobody's any more
    loader = training_loader(
        make_dataset(),
        order,
        config.resolved_num_workers,
        config.pins(trainer.device),
        config.loader_timeout,
    )
    log = open_log(config, trainer, prepared.processes, len(source))
    if begins:
        log.text(said)
    state = trainer.state

    def look(epochs: int, last: bool) -> float | None:
        if not last and epochs % config.eval_freq:
            return None
        scores = evaluation.scores()
        metric = scores.values[evaluation.metric]
        evaluation.report(scores, epochs, max(metric, state.best_metric or metric), log, last)
        return metric

    train(trainer, loader, order, source, store, log, look, binding)
    scores = evaluation.latest
    if is_main() and scores is not None:
        metrics = scores.values | {f"best_{evaluation.metric}": state.best_metric}
        about = hardware_info(trainer.device, trainer.dtype)
        append_result(config.output_dir, stage, as_dict(config), metrics, log.seconds, about)
    log.close()
    return scores


def show_plan(trainer: Trainer, images: str, order: BatchOrder, make_dataset: Callable[[], Dataset] | None) -> None:
    """--dry_run, said once: the settings, what the run costs, and one real batch (None: none is made).

    Args:
        images: how many there are, in words.
    """
    if not is_main():
        return
    config = trainer.config
    print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    flops = classifier_flops(trainer.state.model, (config.in_chans, *config.resolved_input_size))
    per_epoch, total = order.updates_per_epoch, trainer.total_updates
    whole = per_epoch and total % per_epoch == 0
    spread = f"{per_epoch} per epoch x {total // per_epoch} epochs =" if whole else f"{per_epoch} per epoch, in all"
    facts = {
        "images": images,
        "updates": f"{spread} {total}",
        "effective batch": f"{config.effective_batch}, peak lr {config.peak_lr:.3g}",
        "parameters": f"{count_parameters(trainer.state.model) / 1e6:.2f} M",
        "GFLOP": f"{flops / 1e9:.2f} per image, forward and backward",
    }
    if make_dataset is not None:
        begin = time.perf_counter()
        batch = next(iter(training_loader(make_dataset(), order, 0, False, 0)))
        seconds = time.perf_counter() - begin
        facts["one batch"] = f"{tuple(batch.images.shape)}, made in {seconds:.2f} s by one process"
    for name, fact in facts.items():
        print(f"{name:<17}{fact}")
