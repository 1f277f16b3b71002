"""Attentive heads against explicit loops, grids of heads against heads one by one, and tasks that tell them apart."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from models_encoder import Encoder, patchify
from util.analysis.attentive import AttentiveHeads, AttentiveProbe, GridAdamW, LinearHeads, losses_of
from util.analysis.head_sweep import KINDS, BestHead, FrozenTokens, Grid, batches_of_epoch, sweep_heads, train_heads
from util.runtime.errors import UserError

CPU = torch.device("cpu")


def shaken(heads: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Different random weights in every head, so that no attention is uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return heads


def slow_pool(heads: AttentiveHeads, tokens: torch.Tensor, g: int, b: int) -> list[float]:
    """Pool the tokens of one head and image in loops over queries, attention heads, tokens and channels."""
    D = tokens.shape[2]
    Q, h = heads.query.shape[1], heads.num_heads
    pooled = []
    for q in range(Q):
        outputs = []
        for head in range(h or 1):
            scores = []
            for x in tokens[b]:
                if h:
                    key = heads.key[g, head] @ x  # [d]
                    scores.append(sum(a * c for a, c in zip(heads.query[g, q, head], key, strict=True)))
                else:
                    scores.append(sum(a * c for a, c in zip(heads.query[g, q], x, strict=True)))
            weights = [math.exp(score / math.sqrt(D // h if h else D)) for score in scores]
            for channel in range(D // (h or Q)):
                values = [(heads.value[g, head] @ x)[channel] if h else x[q * D // Q + channel] for x in tokens[b]]
                outputs.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        pooled.append(outputs)
    return [sum(each) / Q for each in zip(*pooled, strict=True)] if h else list(chain(*pooled))


@pytest.mark.parametrize(("num_queries", "num_heads"), [(1, None), (3, None), (1, 1), (1, 3), (2, 3)])
def test_an_attentive_head_equals_explicit_loops(num_queries, num_heads):
    B, L, D, K, G = 3, 5, 6, 4, 2
    heads = shaken(AttentiveHeads(G, D, K, num_queries, num_heads)).double().requires_grad_(False)
    tokens = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1)).double()
    pooled = heads.pool(tokens)
    assert pooled.shape == (B, G, D)
    for g in range(G):
        expected = [[float(x) for x in slow_pool(heads, tokens, g, b)] for b in range(B)]
        for b in range(B):
            assert pooled[b, g].tolist() == pytest.approx(expected[b], abs=1e-9)
        x = torch.tensor(expected, dtype=torch.float64)
        normed = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt()
        logits = normed @ heads.linear.weight[g] + heads.linear.bias[g]
        torch.testing.assert_close(heads(tokens)[g], logits, rtol=0, atol=1e-8)


def test_heads_start_alike_and_uniform():
    heads = AttentiveHeads(4, 12, 3, 2, 3, torch.Generator().manual_seed(0))
    assert all(torch.equal(p, p[:1].expand_as(p)) for p in heads.parameters())
    attention = heads.attend(torch.randn(2, 7, 12))
    assert attention.shape == (2, 4, 6, 7)
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 7), rtol=0.05, atol=0)


def test_adamw_of_a_grid_is_torchs_own_for_each_head():
    lrs, decays = torch.tensor([0.1, 0.01]), torch.tensor([0.5, 0.0])
    heads = shaken(LinearHeads(2, 5, 3)).double()
    alone = [shaken(LinearHeads(2, 5, 3)).double() for _ in lrs]
    optimizer = GridAdamW(heads, lrs.double(), decays.double())
    torch_optimizers = [
        torch.optim.AdamW(
            [dict(params=[a.weight], weight_decay=d.item()), dict(params=[a.bias], weight_decay=0.0)], lr=lr.item()
        )
        for a, lr, d in zip(alone, lrs, decays, strict=True)
    ]
    for step in range(5):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).double()
        y = torch.arange(8) % 3
        losses_of(heads(x), y).sum().backward()
        optimizer.step(0.5)
        for g, (a, optimizer_alone) in enumerate(zip(alone, torch_optimizers, strict=True)):
            for group in optimizer_alone.param_groups:
                group["lr"] = 0.5 * lrs[g].item()
            optimizer_alone.zero_grad()
            F.cross_entropy(a(x)[g], y).backward()
            optimizer_alone.step()
    for g, a in enumerate(alone):
        torch.testing.assert_close(heads.weight[g], a.weight[g], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(heads.bias[g], a.bias[g], rtol=1e-6, atol=1e-7)


def some_batches(number: int, L: int = 7, D: int = 12):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(16, 1 + L, D, generator=generator), torch.arange(16) % 3) for _ in range(number)]


@pytest.mark.parametrize(("num_queries", "num_heads"), [(2, None), (1, 3)])
def test_a_grid_equals_its_heads_trained_one_by_one(num_queries, num_heads):
    grid = Grid((1e-3, 1e-2, 3e-2), (0.0, 0.1), 1, 16, 5, num_queries, num_heads)
    heads = train_heads(iter(some_batches(12)), 12, 12, 3, grid, CPU)
    tokens = some_batches(1)[0][0]
    together = heads(tokens).unflatten(0, (3, -1))  # [kinds, G, B, K]
    for g, (lr, decay) in enumerate(grid.pairs.tolist()):
        single = grid._replace(lrs=(lr,), weight_decays=(decay,))
        alone = train_heads(iter(some_batches(12)), 12, 12, 3, single, CPU)(tokens)  # [kinds, B, K]
        torch.testing.assert_close(together[:, g], alone, rtol=1e-5, atol=1e-5)
    assert (together[2, 0] - together[2, -1]).abs().max() > 1e-2  # the pairs do differ


def test_batches_are_seeded_permutations_without_single_images():
    grid = Grid((1e-3,), (0.0,), 2, 4, 0)
    positions = torch.arange(10, 19)
    epochs = [batches_of_epoch(positions, grid, epoch) for epoch in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[5, 4]] * 2
    assert all(torch.equal(torch.cat(list(epoch)).sort().values, positions) for epoch in epochs)
    assert not torch.equal(torch.cat(list(epochs[0])), torch.cat(list(epochs[1])))
    assert torch.equal(epochs[0][0], batches_of_epoch(positions, grid, 0)[0])


# ---- a sweep over images ------------------------------------------------------------------------------------


class Pixels(torch.utils.data.Dataset):
    """Random images whose brightness is their label, brighter in each epoch."""

    def __init__(self, number: int, epoch: int | None):
        generator = torch.Generator().manual_seed(number)
        self.labels = torch.arange(number) % 3
        noise = torch.randint(0, 60, (number, 1, 16, 16), generator=generator)
        self.pixels = (noise + 60 * self.labels[:, None, None, None] + (epoch or 0)).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pixels[i], int(self.labels[i])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    shape = dict(embed_dim=24, depth=2, num_heads=3, img_size=(16, 16), patch_size=4, in_chans=1)
    return Encoder(**shape).eval().requires_grad_(False)


def sweep(encoder, keep=False, augment=False, val_labels=None, calls=None, **changes) -> dict[str, BestHead]:
    def encode(pixels):
        if calls is not None:
            calls.append(len(pixels))
        return encoder.encode(patchify(pixels / 255 - 0.5, 4))

    train, val = (FrozenTokens(partial(Pixels, n), encode, augment=augment and n == 90, keep=keep) for n in (90, 30))
    grid = Grid((1e-2, 1e-5), (0.0, 0.1), 6, 20, 0)._replace(**changes)
    labels = [Pixels(n, None).labels for n in (90, 30)]
    labels[1] = labels[1] if val_labels is None else val_labels
    return sweep_heads(train, labels[0], val, labels[1], width=24, grid=grid, device=CPU, title="test")


def test_a_sweep_is_seeded_leaves_the_encoder_and_does_not_depend_on_where_tokens_come_from(encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    calls, kept_calls = [], []
    encoded, stored = sweep(encoder, calls=calls), sweep(encoder, keep=True, calls=kept_calls)
    assert sum(calls) == 72 * 6 + 18 + 30  # every image once per epoch for all heads
    assert sum(kept_calls) == 90 + 30
    assert tuple(encoded) == KINDS
    for kind in KINDS:
        assert torch.equal(encoded[kind].held_out, stored[kind].held_out)
        assert encoded[kind].accuracy == stored[kind].accuracy
    assert encoded["linear_mean"].accuracy > 60  # chance is 33
    other = sweep(encoder, keep=True, seed=1)
    assert any(not torch.equal(other[kind].held_out, stored[kind].held_out) for kind in KINDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_augmented_images_are_encoded_in_every_epoch_and_centre_views_are_kept(encoder):
    calls = []
    sweep(encoder, augment=True, keep=True, calls=calls)
    assert sum(calls) == 72 * 6 + 90 + 30


def test_a_head_is_chosen_without_the_validation_images(encoder):
    honest = sweep(encoder, keep=True)
    wrong = (Pixels(30, None).labels + 1) % 3
    blind = sweep(encoder, keep=True, val_labels=wrong)
    for kind in KINDS:
        best = honest[kind]
        assert best.lr == pytest.approx(1e-2)
        assert best.held_out.shape == (4,)
        assert (best.lr, best.weight_decay) == (blind[kind].lr, blind[kind].weight_decay)
        assert torch.equal(best.held_out, blind[kind].held_out)


@pytest.mark.slow
@pytest.mark.parametrize(("num_queries", "num_heads"), [(1, None), (4, None), (1, 4), (2, 4)])
def test_a_label_in_one_random_patch_is_read_by_attention_and_not_by_the_mean(num_queries, num_heads):
    """Each token is a class code; a marker in one of them says that this is the image's class."""
    N, L, D, K = 6000, 64, 32, 10
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(K, D, generator=generator)
    marker = 3 * F.normalize(torch.randn(D, generator=generator), dim=0)
    classes = torch.randint(K, (N, L), generator=generator)
    tokens = codes[classes] + 0.3 * torch.randn(N, L, D, generator=generator)
    labelled = torch.randint(L, (N,), generator=generator)
    tokens[torch.arange(N), labelled] += marker
    labels = classes[torch.arange(N), labelled]
    tokens = torch.cat([torch.randn(N, 1, D, generator=generator), tokens], dim=1)  # cls knows nothing

    def frozen(rows: slice) -> tuple[FrozenTokens, torch.Tensor]:
        data = torch.utils.data.TensorDataset(tokens[rows], labels[rows])
        return FrozenTokens(lambda epoch: data, lambda x: x, keep=True), labels[rows]

    grid = Grid((1e-3, 1e-2, 3e-2), (0.0, 0.1), 15, 100, 0, num_queries, num_heads)
    best = sweep_heads(
        *frozen(slice(0, 5000)), *frozen(slice(5000, N)), width=D, grid=grid, device=CPU, title="made-up task"
    )
    print({kind: head.accuracy for kind, head in best.items()})
    assert best["linear_cls"].accuracy < 15
    assert best["linear_mean"].accuracy < 25
    assert best["attentive"].accuracy > 95


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [None, 6])
def test_forty_heads_of_each_kind_cost_less_than_twice_the_pass_with_one(num_heads):
    torch.manual_seed(0)
    shape = dict(embed_dim=384, depth=12, num_heads=6, img_size=(224, 224), patch_size=16, in_chans=3)
    encoder = Encoder(**shape).eval().requires_grad_(False)  # ViT-S/16
    patches, labels = torch.randn(16, 196, 768), torch.arange(16)
    seconds = {1: [], 40: []}
    for _ in range(3):
        for number, times in seconds.items():  # in turns; time of the processor, which other programs do not change
            grid = Grid((1e-3,) * number, (0.0,), 1, 16, 0, 1, num_heads)
            begin = time.process_time()
            batches = ((encoder.encode(patches), labels) for _ in range(2))
            train_heads(batches, 2, 384, 100, grid, CPU)
            times.append(time.process_time() - begin)
    ratio = min(seconds[40]) / min(seconds[1])
    print(f"40 heads of each kind: {ratio:.2f} x the pass with one")
    assert ratio < 2


# ---- the module for main_linprobe.py ------------------------------------------------------------------------


@pytest.mark.parametrize("projections", [True, False])
def test_an_attentive_probe_trains_its_head_alone(projections):
    architecture = dict(embed_dim=24, depth=2, num_heads=3)
    vit = dict(img_size=(16, 16), patch_size=8, in_chans=3)
    torch.manual_seed(0)
    probe = AttentiveProbe(architecture, num_classes=5, num_queries=2, projections=projections, **vit).train()
    assert not probe.blocks.training
    assert probe.head.training
    trained = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in probe.named_parameters() if name.startswith("head.")}
    images = torch.randn(4, 3, 16, 16)
    logits = probe(images)
    assert logits.shape == (4, 5)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad.abs().max() > 0 for n, p in probe.named_parameters() if n.startswith("head.linear"))
    assert all((p.grad is not None) == p.requires_grad for p in probe.parameters())
    tokens = probe.forward_features(images)[:, 1:]
    torch.testing.assert_close(probe.eval()(images), probe.head(tokens)[0])


@pytest.mark.parametrize(
    ("queries", "heads", "message"),
    [(5, None, "--attentive_queries 5: does not divide the width"), (1, 5, "attention heads 5: does not divide")],
)
def test_queries_and_heads_divide_the_width(queries, heads, message):
    with pytest.raises(UserError, match=message):
        AttentiveHeads(1, 24, 3, queries, heads)
