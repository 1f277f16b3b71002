"""The default path, frozen: no switch may change a bit of what LUT and MAE compute without it.

Below stands the whole of it as it was before there was any switch: weights, losses and updates, op for op. Runs of the
present code must equal it to the bit on the same machine, and committed numbers within rounding on any.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from engine_pretrain import PretrainTrainer
from shared.flags import TINY
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.data.samples import Batch
from util.optim.optimizer import build_optimizer
from util.optim.schedules import momentum_decay
from util.runtime.amp import grad_scaler
from util.train.pretraining import build_state
from util.train.trainer import TrainState

CPU = torch.device("cpu")
UPDATES = 12
FORMS = {  # flags of each form, losses of its updates, and how far its models went
    "paper": (
        "--alpha 0.25 --norm_pix_loss",
        [1.97438, 2.014045, 1.965228, 1.928809, 1.863242, 1.83432, 1.776787, 1.71011, 1.713105, 1.714236, 1.657511,
         1.655305],
        [589.8243, 3.767617],
    ),
    "symmetric": (
        "--alpha 1 --views symmetric",
        [3.37208, 3.430868, 3.301967, 3.350574, 3.309293, 3.360908, 3.152328, 3.236154, 3.133712, 3.106901, 2.986258,
         2.993695],
        [563.3815, 3.372353],
    ),
    "mae": (
        "--alpha 0",
        [1.424098, 1.496819, 1.38659, 1.406083, 1.408409, 1.436199, 1.216407, 1.312784, 1.245828, 1.178207, 1.128216,
         1.139316],
        [813.3178],
    ),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------
# Frozen: models
# --------------------------------------------------------------------------------------------------------


def sines(dim: int, grid: tuple[int, int]) -> Tensor:
    table = build_sincos2d_pos_embed(list(grid), dim)
    table = table.reshape(-1, 2, 2, dim // 4).transpose(1, 2).flip(1).reshape(-1, dim)
    return torch.cat([torch.zeros(1, dim), table]).unsqueeze(0)


def block(dim: int, heads: int) -> Block:
    return Block(dim, heads, 4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def cut(images: Tensor, p: int) -> Tensor:
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def rows(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def two_layers(dim: int, hidden: int) -> nn.Sequential:
    first, last = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), last)


def xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim > 2 else module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FrozenEncoder(nn.Module):
    """The nano model at patch 8, 32 pixels."""

    D, HEADS, DEPTH, SIZE, P = 96, 3, 6, (32, 32), 8

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.D))
        self.register_buffer("pos_embed", sines(self.D, (4, 4)))
        self.patch_embed = PatchEmbed(self.SIZE, self.P, 3, self.D)
        self.blocks = nn.ModuleList(block(self.D, self.HEADS) for _ in range(self.DEPTH))
        self.norm = nn.LayerNorm(self.D, eps=1e-6)

    def encode(self, patches: Tensor, ids: Tensor | None = None) -> Tensor:
        positions = self.pos_embed[:, 1:].expand(patches.shape[0], -1, -1)
        if ids is not None:
            patches, positions = rows(patches, ids), rows(positions, ids)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        kernel = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        x = torch.cat([cls, F.linear(patches, kernel, self.patch_embed.proj.bias) + positions], dim=1)
        for layer in self.blocks:
            x = layer(x)
        return self.norm(x)


class FrozenStudent(FrozenEncoder):
    """MAE's decoder of one block, 64 wide; heads 16 wide unless it is MAE."""

    E, V = 64, 4

    def __init__(self, heads: bool, norm_pix_loss: bool):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(self.D, self.E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.E))
        self.register_buffer("decoder_pos_embed", sines(self.E, (4, 4)))
        self.decoder_blocks = nn.ModuleList([block(self.E, 2)])
        self.decoder_norm = nn.LayerNorm(self.E, eps=1e-6)
        self.decoder_pred = nn.Linear(self.E, self.P**2 * 3)
        self.apply(xavier)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if heads:
            self.head = two_layers(self.D, 16).apply(xavier)
            self.predictor = two_layers(self.D, 16).apply(xavier)

    def forward(self, views: Tensor, noise: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        shuffle = noise.argsort(dim=1, stable=True)
        patches = cut(views.flatten(0, 1), self.P)
        ids = torch.cat([shuffle[:, g * self.V : (g + 1) * self.V] for g in range(len(views))])
        latents = self.encode(patches, ids).unflatten(0, views.shape[:2])
        mim = self.mim(latents[0], patches[: views.shape[1]], shuffle)
        if targets is None:
            return mim, torch.zeros_like(mim)
        distances = []
        for latent, target in zip(latents, targets, strict=True):
            predicted = self.predictor(self.head(latent[:, 1:].mean(dim=1)))
            distances.append((2 - 2 * F.cosine_similarity(predicted.float(), target.float(), dim=-1)).mean())
        return mim, torch.stack(distances).mean()

    def mim(self, latent: Tensor, patches: Tensor, shuffle: Tensor) -> Tensor:
        target = rows(patches, shuffle[:, self.V :])
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        x = self.decoder_embed(latent)
        B, hidden = len(x), shuffle.shape[1] - self.V
        positions = self.decoder_pos_embed[:, 1:].expand(B, -1, -1)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(B, hidden, self.E)], dim=1)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(B, -1, -1), rows(positions, shuffle)], 1)
        x = self.last_block(self.decoder_blocks[0], x, hidden)
        return F.mse_loss(self.decoder_pred(self.decoder_norm(x)).float(), target.float())

    def last_block(self, layer: Block, x: Tensor, last: int) -> Tensor:
        """Return the last tokens, which attend to all."""
        weight, bias, heads = layer.attn.qkv.weight, layer.attn.qkv.bias, layer.attn.num_heads
        normed = layer.norm1(x)
        q = F.linear(normed[:, -last:], weight[: self.E], bias[: self.E]).unflatten(-1, (heads, -1))
        kv = F.linear(normed, weight[self.E :], bias[self.E :]).unflatten(-1, (2, heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        x = x[:, -last:] + layer.attn.proj(attended.transpose(1, 2).reshape(len(x), last, self.E))
        return x + layer.mlp(layer.norm2(x))


class FrozenMomentum(FrozenEncoder):
    """Encoder and projector, in eval mode."""

    def __init__(self, student: FrozenStudent):
        super().__init__()
        self.head = copy.deepcopy(student.head)
        state = student.state_dict()
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(cut(images, self.P))[:, 1:].mean(dim=1))

    @torch.no_grad()
    def update(self, student: FrozenStudent, decay: float) -> None:
        averages, weights = self.state_dict(), student.state_dict()
        moving = [n for n in averages if not n.endswith(("pos_embed", "num_batches_tracked"))]
        torch._foreach_lerp_([averages[n] for n in moving], [weights[n] for n in moving], 1 - decay)


# --------------------------------------------------------------------------------------------------------
# Frozen: one update
# --------------------------------------------------------------------------------------------------------


class FrozenTrainer(PretrainTrainer):
    """The update as it was; optimiser and learning rate are not of this file."""

    def update(self, batches: list[Batch]) -> None:
        config, state = self.config, self.state
        self.begin_update()
        (batch,) = batches
        views = self.normalise(batch.views).transpose(0, 1)
        symmetric, targets = config.views == "symmetric", None
        if state.model_ema is not None and symmetric:
            targets = state.model_ema(views.flip(0).flatten(0, 1)).unflatten(0, views.shape[:2])
        elif state.model_ema is not None:
            targets = state.model_ema(views[1]).unsqueeze(0)
        mim, bc = self.model(views if symmetric else views[:1], batch.noise, targets)
        loss = config.w_mim * mim + config.resolved_alpha * bc
        loss.backward()
        self.record(loss=loss)
        self.step_optimizer(batches)
        if state.model_ema is not None:
            decay = momentum_decay(state.updates, self.total_updates, config.momentum, config.momentum_end)
            state.model_ema.update(state.model, decay)
        state.updates += 1


def frozen_state(config: PretrainConfig) -> TrainState:
    torch.manual_seed(config.seed)
    student = FrozenStudent(config.resolved_alpha > 0, config.norm_pix_loss)
    momentum_encoder = FrozenMomentum(student) if config.resolved_alpha > 0 else None
    optimizer = build_optimizer(student, config.peak_lr, config.betas, config.weight_decay)
    return TrainState(student, momentum_encoder, optimizer, grad_scaler(None, CPU))


# --------------------------------------------------------------------------------------------------------
# The present code against it
# --------------------------------------------------------------------------------------------------------


def batch(update: int) -> Batch:
    """Smooth random images, 8 of them, and noise; the same with every version of NumPy."""
    rng = np.random.Generator(np.random.Philox(update))
    corners = torch.from_numpy(rng.random((16, 3, 4, 4), dtype=np.float32))
    views = (F.interpolate(corners, 32, mode="bilinear") * 255).byte().unflatten(0, (8, 2))
    noise = torch.from_numpy(rng.random((8, 16), dtype=np.float32))
    return Batch(views, noise, torch.arange(8), torch.arange(8), torch.empty(8, 0))


def train(trainer_type: type[PretrainTrainer], config: PretrainConfig, state: TrainState) -> list[float]:
    """Train, and return the losses of all updates."""
    trainer, losses = trainer_type(config, state, state.model, CPU, None, updates_per_epoch=UPDATES // 2), []
    for update in range(UPDATES):
        trainer.update([batch(update)])
        losses.append(trainer.meter.drain()["loss"])
    return losses


def weights(state: TrainState) -> dict[str, dict[str, Tensor]]:
    models = {"student": state.model, "momentum encoder": state.model_ema}
    return {name: {n: x.clone() for n, x in m.state_dict().items()} for name, m in models.items() if m is not None}


def assert_equal_bits(current: dict[str, dict[str, Tensor]], frozen: dict[str, dict[str, Tensor]]) -> None:
    assert current.keys() == frozen.keys()
    for model in frozen:
        assert list(current[model]) == list(frozen[model])
        different = [name for name, x in frozen[model].items() if not torch.equal(x, current[model][name])]
        assert not different, f"{model}: {different[:4]}"


def distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Sum of absolute differences."""
    return sum((after[name] - x).double().abs().sum().item() for name, x in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_default_path_is_unchanged_to_the_bit(form):
    flags, losses, distances = FORMS[form]
    config = parse_config(PretrainConfig, [*TINY.split(), *flags.split()], "main_pretrain.py")
    current, frozen = build_state(config, None, CPU)[0], frozen_state(config)
    before = weights(current)
    assert_equal_bits(before, weights(frozen))  # names, their order and initial values
    curve = train(PretrainTrainer, config, current)
    assert curve == train(FrozenTrainer, config, frozen)
    after = weights(current)
    assert_equal_bits(after, weights(frozen))

    assert curve == pytest.approx(losses, rel=1e-4)
    assert [distance(before[m], after[m]) for m in before] == pytest.approx(distances, rel=1e-3)
