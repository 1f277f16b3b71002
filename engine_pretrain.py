"""One update of pre-training.

`PretrainTrainer.update` reads like the paper: schedule, target, student, the sum of losses, backward, optimiser step,
one momentum update. Letters: B images, C channels, H x W pixels of a view, D width, G views of the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models_lut import Targets
from util.config.pretrain import PretrainConfig
from util.data.cache import CachedImages
from util.data.device_views import apply_photometry_rows, cut_resized, cut_simple
from util.data.samples import Batch, DrawnBatch
from util.data.views import Normalise
from util.optim.schedules import momentum_decay
from util.train.state import data_parallel
from util.train.trainer import Trainer, TrainState


@dataclass
class PretrainTrainer(Trainer):
    """Train the student `state.model` with targets of the momentum encoder `state.model_ema`, g (None: MAE)."""

    config: PretrainConfig
    images: CachedImages | None = None  # on the device (--cache device)
    normalise: Normalise = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.normalise = Normalise(self.config.resolved_mean, self.config.resolved_std, self.device)

    def batch_to_device(self, batch: Batch | DrawnBatch) -> Batch:
        """Copy views [B, num_views, C, H, W] uint8 and noise to the device; do there what the loader left undone."""
        noise = batch.noise.to(self.device, non_blocking=True)
        if isinstance(batch, DrawnBatch):
            views = self.cut(batch)
        else:
            views = batch.views.to(self.device, non_blocking=True)
        if batch.photometry.numel():
            views = torch.stack([views[:, 0], apply_photometry_rows(views[:, 1], batch.photometry)], dim=1)
        return Batch(views, noise, batch.index, batch.read_index, batch.photometry)

    def cut(self, batch: DrawnBatch) -> Tensor:
        """Return views [B, num_views, C, H, W] uint8 of images that lie on the device, before photometry."""
        images = self.images.at(batch.read_index.to(self.device, non_blocking=True))
        crops = batch.crops.to(self.device, non_blocking=True)
        if self.config.resolved_crop == "src":
            return cut_simple(images, crops, self.config.resolved_input_size)
        largest = batch.crops[..., 2:4].amax(dim=(0, 1))  # still on the CPU
        return cut_resized(images, crops, self.config.resolved_input_size, tuple(largest.tolist()))

    def update(self, batches: list[Batch]) -> None:
        """Take one optimiser step on the mean loss over `accum_iter` batches of equal size, on the device already.

        With accumulation the heads' BatchNorm sees one batch at a time; all else equals one large batch.
        """
        config, state = self.config, self.state
        self.begin_update()
        all_targets = self.targets_of_update(batches) if config.distance == "infonce" and len(batches) > 1 else None
        for i, batch in enumerate(batches):
            views = self.normalise(batch.views).transpose(0, 1)  # [2, B, C, H, W]
            with self.gradients_stay_local(unless=i == len(batches) - 1), self.autocast():
                targets = next(all_targets) if all_targets else self.context_targets(views, batch.noise)  # v̂
                student_views = views if config.views == "symmetric" and targets is not None else views[:1]
                losses = self.model(student_views, batch.noise, targets)
                loss = config.w_mim * losses.mim + config.resolved_alpha * losses.bc  # Eq. 3
            state.scaler.scale(loss / len(batches)).backward()
            self.record(loss=loss)
            if config.w_mim > 0:
                self.record(mim=losses.mim)
            if targets is not None:
                self.record(bc=losses.bc)
        taken = self.step_optimizer(batches)
        if taken and state.model_ema is not None:
            decay = momentum_decay(state.updates, self.total_updates, config.momentum, config.momentum_end)
            state.model_ema.update(state.model, decay)
        state.updates += 1

    def context_targets(self, views: Tensor, noise: Tensor) -> Targets | None:
        """Return the momentum encoder's targets: for each view that the student sees, from the other view."""
        momentum_encoder = self.state.model_ema
        if momentum_encoder is None:
            return None
        return momentum_encoder(views[1:] if self.config.views == "asymmetric" else views.flip(0), noise)

    def targets_of_update(self, batches: list[Batch]) -> Iterator[Targets]:
        """Yield the targets of each batch, followed by those of the others, which are InfoNCE's further negatives."""
        with self.autocast():
            each = [self.context_targets(self.normalise(batch.views).transpose(0, 1), batch.noise) for batch in batches]
        own = [targets.context for targets in each]  # one [G, B, D] for each batch
        for i in range(len(own)):  # joined when needed: all at once would take the square of their number
            yield Targets(torch.cat([own[i], *own[:i], *own[i + 1 :]], dim=1), None)


def build_trainer(
    config: PretrainConfig,
    state: TrainState,
    dtype: torch.dtype | None,
    device: torch.device,
    updates_per_epoch: int,
    images: CachedImages | None = None,
) -> PretrainTrainer:
    """Return the trainer of a state, with gradients averaged over the processes."""
    model = data_parallel(state.model, config, device)
    return PretrainTrainer(config, state, model, device, dtype, updates_per_epoch, images=images)
