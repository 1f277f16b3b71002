"""The bare update under the clock: ours and the plain baseline, in all forms, in turn and from the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine_pretrain import PretrainTrainer, build_trainer
from util.bench.baseline import PlainBatch, PlainTrainer
from util.bench.config import Form, Kind, StepConfig, titled
from util.bench.counting import count_flops, count_traffic
from util.bench.limits import BANDWIDTH_BYTES, Numbers, best_side, matrix_peaks, memory_bandwidth
from util.bench.timing import PartTimer, compiled_graphs, in_turn, patched, ratios, spread, synchronise
from util.config.groups import as_dict
from util.data.device_views import Normalise
from util.data.samples import Batch, BatchOrder, DrawnBatch
from util.data.sources import ArraySource, ImageSource
from util.runtime.amp import autocast_dtype
from util.runtime.distributed import choose_device
from util.runtime.errors import RunError, UserError
from util.runtime.logs import peak_memory_bytes
from util.runtime.stop import end_with_parent
from util.train.pretraining import build_loader, build_state, cached

MOST_DISTINCT_IMAGES = 64  # of a batch; larger ones repeat them
DISTINCT_UPDATES = 2  # batches are used again after so many
UPDATES_PER_EPOCH = 1000  # of the imagined run whose schedules set learning rate and momentum
TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of two losses, relative

# Settings that give an update other work to do: losses are compared between variants that share all of these. Any
# other flag must leave the losses as they are, and is none of the plain baseline's business, but for these and amp.
WORK = (
    *("model", "method", "depth", "decoder_depth", "patch_size", "input_size", "in_chans", "mean", "std"),
    *("mask_ratio", "mask_unit", "norm_pix_loss", "views", "alpha", "w_mim", "head_depth", "predictor_depth"),
    *("head_mlp_dim", "head_norm_layer", "head_act_layer", "steered_tokens", "context_token", "supervision"),
    *("distance", "infonce_temperature", "context_mask_ratio", "crop", "shared_crop", "hflip", "photometric"),
    *("batch_size", "accum_iter", "lr", "blr", "min_lr", "epochs", "warmup_epochs", "betas", "weight_decay"),
    *("layer_decay", "clip_grad", "momentum", "momentum_end", "seed", "init_from", "init_weights"),
)
PLAIN_KNOWS = (*WORK, "amp", "device")


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    name: str
    form: Form
    kind: Kind
    config: StepConfig

    @property
    def work(self) -> tuple:
        """Variants in which this is equal must have equal losses."""
        return (self.form, *(getattr(self.config, name) for name in WORK))

    @property
    def images(self) -> int:
        """Of one update."""
        return self.config.effective_batch

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return choose_device(self.config.device)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast; None: fp32."""
        return autocast_dtype(self.config.amp, self.device)


def step_variants(settings: dict[str, StepConfig]) -> list[Variant]:
    """Form by form, ours before plain; plain once for all values of the flags that it does not know."""
    found: dict[str, Variant] = {}
    first = next(iter(settings.values()))
    for form, kind, (title, config) in itertools.product(first.forms, first.variants, settings.items()):
        mine = config.in_form(form)
        name = f"{form} {titled(kind, title, PLAIN_KNOWS if kind == 'plain' else None)}"
        found.setdefault(name, Variant(name, form, kind, mine))
    return list(found.values())


# --------------------------------------------------------------------------------------------------------
# One variant at work
# --------------------------------------------------------------------------------------------------------


class Stepper:
    """A variant with its weights and its batches in the memory of the host."""

    def __init__(self, variant: Variant):
        config = variant.config
        self.variant, self.device = variant, variant.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        state, _ = build_state(config, variant.dtype, self.device)
        if variant.kind == "plain":
            total = config.epochs * UPDATES_PER_EPOCH
            self.trainer = PlainTrainer(config, state.model, self.device, variant.dtype, total)
        else:
            self.trainer = build_trainer(config, state, variant.dtype, self.device, UPDATES_PER_EPOCH)
            self.trainer.model.train()
        self.images = random_images(self.config)
        if self.config.cache == "device":
            self.trainer.images = self.images.to(self.device)
        self.groups: Iterator[list] = itertools.cycle(self.batches(config.batch_size))

    @property
    def config(self) -> StepConfig:
        """The settings by which batches are made: plain ones are finished on the host."""
        plain = dict(cache="none", augment_on="worker") if self.variant.kind == "plain" else {}
        return dataclasses.replace(self.variant.config, num_workers=0, **plain)

    def batches(self, size: int) -> list[list]:
        """Those of a few updates, which `groups` repeats."""
        config = dataclasses.replace(self.config, batch_size=size)
        found = host_batches(config, self.images, self.device)
        if self.variant.kind == "plain":
            found = [normalised_on_host(config, batch, self.device) for batch in found]
        return [found[i::DISTINCT_UPDATES] for i in range(DISTINCT_UPDATES)]

    def next_group(self) -> list:
        """The batches of the next update, brought to the device as a run would."""
        return self.brought(next(self.groups))

    def brought(self, group: list) -> list:
        """The batches on the device; the baseline brings its own."""
        if isinstance(self.trainer, PlainTrainer):
            return group
        return self.trainer.to_device(group)

    def updates(self, number: int) -> None:
        """So many optimiser steps, and one line of log, which waits for the device."""
        for _ in range(number):
            self.trainer.update(self.next_group())
        if isinstance(self.trainer, PretrainTrainer):
            self.trainer.meter.drain()
            self.trainer.watch.reset()
        synchronise(self.device)

    def losses(self, number: int) -> list[float]:
        """Those of the next updates, which are taken."""
        if isinstance(self.trainer, PlainTrainer):
            return [self.trainer.update(self.next_group())["loss"] for _ in range(number)]
        found = []
        for _ in range(number):
            self.trainer.update(self.next_group())
            found.append(self.trainer.meter.drain()["loss"])
        return found

    def turn(self) -> float:
        """Seconds per update, over those of a turn."""
        steps = self.variant.config.steps
        synchronise(self.device)
        begin = time.perf_counter()
        self.updates(steps)
        return (time.perf_counter() - begin) / steps

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part of one update."""
        timer = PartTimer(self.device)
        synchronise(self.device)
        timer.start()
        if isinstance(self.trainer, PlainTrainer):
            self.trainer.update(self.next_group(), timer.mark)
        else:
            with boundaries(self.trainer, timer.mark):
                self.trainer.update(self.next_group())
        return timer.milliseconds()

    def flops_per_image(self) -> float:
        """Counted on few images, to which it is proportional: the count takes more memory than an update."""
        few = min(self.variant.config.batch_size, 8)
        group = self.brought(self.batches(few)[0])
        return count_flops(lambda: self.trainer.update(group)) / (few * len(group))

    def traffic(self) -> int:
        """Bytes that the operators of an update read and write."""
        return count_traffic(lambda: self.updates(1))

    def peak_memory(self) -> int:
        """Bytes: of tensors during an update on a GPU, else of this process so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.updates(1)
        return peak_memory_bytes(self.device)

    def graphs(self) -> int:
        """How many torch.compile has made so far in this process."""
        return compiled_graphs()

    def profile(self, folder: Path) -> tuple[str, dict[str, float]]:
        """See `profile`."""
        return profile(self, folder)


class StepperProcess:
    """A Stepper in a process of its own, so that no variant meets what another one has left: memory, compiled code.

    All methods of Stepper are there, and wait for their results. Use it as a context.
    """

    def __init__(self, variant: Variant):
        self.variant = variant
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)
        self._pool.submit(_call, variant, "graphs", ())  # builds it, while others are built too

    def __getattr__(self, method: str) -> Callable:
        def call(*arguments: Any) -> Any:
            try:
                return self._pool.submit(_call, self.variant, method, arguments).result()
            except BrokenProcessPool as error:
                raise RunError(f"{self.variant.name}: its process died, most likely for want of memory") from error

        return call

    def __enter__(self) -> StepperProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()


_stepper: Stepper | None = None  # of the process of a StepperProcess


def _call(variant: Variant, method: str, arguments: tuple) -> Any:
    """In the process: build the Stepper when it is first asked for anything."""
    global _stepper
    try:
        _stepper = _stepper or Stepper(variant)
        return getattr(_stepper, method)(*arguments)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size {variant.config.batch_size}: {variant.name} does not fit into the GPU's memory beside the"
            " other variants, make it smaller (--find_batch says what fits alone)"
        ) from error


def random_images(config: StepConfig) -> ImageSource:
    """As many as the batches of a few updates need, cached where --cache asks for it."""
    number = config.accum_iter * DISTINCT_UPDATES * min(config.batch_size, MOST_DISTINCT_IMAGES)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (number, config.in_chans, *config.resolved_input_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return cached(config, ArraySource(pixels, None, None, "random"))


def host_batches(config: StepConfig, images: ImageSource, device: torch.device) -> list[Batch | DrawnBatch]:
    """The images in batches as the loader makes them, page-locked where that helps."""
    distinct = min(config.batch_size, MOST_DISTINCT_IMAGES)
    order = BatchOrder(len(images), distinct, 1, rank=0, world_size=1, seed=config.seed)
    places = torch.arange(config.batch_size) % distinct
    pinned = (lambda x: x.pin_memory()) if device.type == "cuda" else (lambda x: x)
    return [type(batch)(*(pinned(x[places]) for x in batch)) for batch in build_loader(config, images, order, device)]


def normalised_on_host(config: StepConfig, batch: Batch, device: torch.device) -> PlainBatch:
    """The same images as a loader that normalises would deliver them."""
    normalise = Normalise(config.resolved_mean, config.resolved_std, torch.device("cpu"))
    views = normalise(batch.views).transpose(0, 1).contiguous()  # [2, B, C, H, W]
    return PlainBatch(views.pin_memory() if device.type == "cuda" else views, batch.noise)


@contextlib.contextmanager
def boundaries(trainer: PretrainTrainer, mark: Callable[[str], None]) -> Iterator[None]:
    """Let an update of ours call `mark` at the end of each of its parts."""

    def marked(before: str = "", after: str = "") -> Callable[[Callable], Callable]:
        def wrap(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if before:
                    mark(before)
                result = function(*args, **kwargs)
                if after:
                    mark(after)
                return result

            return call

        return wrap

    with contextlib.ExitStack() as stack:
        for name, wrap in {
            "context_targets": marked("data", "target"),
            "model": marked(after="student"),
            "record": marked("backward"),  # the losses are recorded as soon as their gradient is there
            "step_optimizer": marked(after="optimiser"),
            "update": marked(after="momentum"),
        }.items():
            stack.enter_context(patched(trainer, name, wrap))
        yield


AnyStepper = Stepper | StepperProcess

# --------------------------------------------------------------------------------------------------------
# Do they do the same?
# --------------------------------------------------------------------------------------------------------


def check_losses(steppers: Sequence[AnyStepper], updates: int) -> dict[str, list[float]]:
    """Losses of the first updates of each variant, by its name.

    Raises:
        RunError: two variants that do the same work differ: their speed is not to be compared.
    """
    losses = {stepper.variant.name: stepper.losses(updates) for stepper in steppers}
    for first, second in itertools.combinations((stepper.variant for stepper in steppers), 2):
        if first.work != second.work:
            continue
        allowed = max(TOLERANCE[first.dtype], TOLERANCE[second.dtype])
        pairs = zip(losses[first.name], losses[second.name], strict=True)
        for update, (x, y) in enumerate(pairs, start=1):
            off = abs(x - y) / max(abs(x), abs(y), 1e-12)
            if not off <= allowed:  # nan is never allowed
                raise RunError(
                    f"the losses differ, so nothing is compared: {first.name} {x:.7g} but"
                    f" {second.name} {y:.7g} at update {update} from the same weights and images"
                    f" (relative {off:.1e}, allowed {allowed:g})"
                )
    return losses


# --------------------------------------------------------------------------------------------------------
# Where the time goes
# --------------------------------------------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item",
         "aten::_local_scalar_dense")  # fmt: skip
PROFILED_UPDATES = 3


def profile(stepper: Stepper, folder: Path) -> tuple[str, dict[str, float]]:
    """Write a trace of some updates; the dearest operators as a table, and calls per update that make the host wait.

    One call is counted under each of its names: `aten::item` calls `_local_scalar_dense`, which synchronises a stream.
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as record

    on_gpu = stepper.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronise(stepper.device)
    with record(activities=activities) as profiler:
        for _ in range(PROFILED_UPDATES):
            with record_function("update"):
                stepper.trainer.update(stepper.next_group())
    profiler.export_chrome_trace(str(folder / f"{stepper.variant.name.replace(' ', '-')}.json"))
    events = profiler.events()
    inside = [event.time_range for event in events if event.name == "update" and event.device_type.name == "CPU"]
    waits = {
        name: sum(
            any(span.start <= event.time_range.start <= span.end for span in inside)
            for event in events
            if event.name == name
        )
        / PROFILED_UPDATES
        for name in WAITS
    }
    dearest = profiler.key_averages().table(
        sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=15, max_name_column_width=50
    )
    return dearest, {name: number for name, number in waits.items() if number}


# --------------------------------------------------------------------------------------------------------
# All together
# --------------------------------------------------------------------------------------------------------

TRIAD = "memory triad"


def measure(steppers: Sequence[AnyStepper], title: str) -> list[dict[str, Any]]:
    """A row of figures for each variant, the first one the reference.

    The machine's own peaks take their turns among the variants.

    Raises:
        RunError: as `check_losses`.
    """
    config = steppers[0].variant.config
    losses = check_losses(steppers, config.check_steps)
    for stepper in steppers:
        stepper.updates(config.warmup_steps)
    memory = [stepper.peak_memory() for stepper in steppers]  # before the counts, which may take more than an update
    flops = [stepper.flops_per_image() for stepper in steppers]
    traffic = [stepper.traffic() for stepper in steppers]
    graphs = [stepper.graphs() for stepper in steppers]
    turns = {stepper.variant.name: stepper.turn for stepper in steppers}
    found = in_turn(turns | machine_probes([stepper.variant for stepper in steppers]), config.rounds, title)
    parts = in_turn({stepper.variant.name: stepper.parts for stepper in steppers}, config.rounds, f"{title}, parts")
    images = [[stepper.variant.images / x for x in found[stepper.variant.name]] for stepper in steppers]
    rows = []
    for i, (stepper, own) in enumerate(zip(steppers, images, strict=True)):
        name, numbers = stepper.variant.name, numbers_of(stepper.variant)
        seconds, peak, triad = found[name], found[f"{numbers} matrix product"], found[TRIAD]
        tflops = [flops[i] / 1e12 * speed for speed in own]
        rows.append(
            {
                "name": name,
                "form": stepper.variant.form,
                "variant": stepper.variant.kind,
                "images": stepper.variant.images,
                "images_per_second": spread(own),
                "of_first": ratios(own, images[0]),
                "ms_per_step": spread([1000 * x for x in seconds]),
                "ms_of_parts": {part: spread([one[part] for one in parts[name]]) for part in parts[name][0]},
                "memory_bytes": memory[i],
                "compiled_while_timed": stepper.graphs() - graphs[i],
                "gflop_per_image": flops[i] / 1e9,
                "tflops": spread(tflops),
                "share_of_matrix_peak": ratios(tflops, peak),
                "gb_per_image": traffic[i] / 1e9 / stepper.variant.images,
                "share_of_bandwidth": ratios([traffic[i] / 1e9 / x for x in seconds], triad),
                "numbers": numbers,
                "matrix_peak_tflops": spread(peak),
                "bandwidth_gb_per_second": spread(triad),
                "losses": losses[name],
                "seconds": seconds,
                "settings": as_dict(stepper.variant.config),
            }
        )
    return rows


def numbers_of(variant: Variant) -> Numbers:
    """What its matrix products are computed in."""
    if variant.dtype is None:
        in_tf32 = variant.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if in_tf32 else "fp32"
    return "bf16" if variant.dtype is torch.bfloat16 else "fp16"


def machine_probes(variants: Sequence[Variant]) -> dict[str, Callable[[], float]]:
    """The machine's best at matrix products of each type that occurs, TFLOP/s, and at reading and writing, GB/s."""
    device = variants[0].device
    probes = {TRIAD: lambda: memory_bandwidth(device, BANDWIDTH_BYTES, seconds=0.2)["triad"].median}
    for numbers in {numbers_of(variant) for variant in variants}:
        sides = (best_side(matrix_peaks(numbers, device, seconds=0.3)),)
        probes[f"{numbers} matrix product"] = lambda numbers=numbers, sides=sides: (
            matrix_peaks(numbers, device, sides, seconds=0.2)[sides[0]].median
        )
    return probes
