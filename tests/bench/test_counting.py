"""Counted FLOPs and bytes are those of the cost model, and of sums by hand."""

from __future__ import annotations

import pytest
import torch

from shared.bench import FORMS, variants
from util.bench.counting import count_flops, count_traffic
from util.bench.step import Stepper
from util.train.cost import pretrain_cost


@pytest.mark.parametrize("form", FORMS)
def test_counted_flops_are_those_of_the_cost_model(form):
    ours, plain = (Stepper(variant) for variant in variants(f"--forms {form}"))
    config, flops = ours.variant.config, ours.flops_per_image()
    cost = pretrain_cost(config.model_arguments, config.views == "symmetric")
    assert flops == pytest.approx(cost.flops_per_image, rel=0.02)
    assert 1.01 * flops < plain.flops_per_image() < 1.3 * flops  # what the exact savings save
    assert plain.traffic() > ours.traffic()


def test_traffic_by_hand():
    a, b, out = torch.ones(1000), torch.ones(1000), torch.ones(1000)
    x, weight = torch.ones(10, 20), torch.ones(20, 30)
    for work, numbers in (
        (lambda: out.copy_(a), 2000),
        (lambda: a + b, 3000),
        (lambda: a.add_(b), 3000),
        (lambda: torch.add(a, b, out=out), 3000),
        (lambda: x @ weight, 200 + 600 + 300),
        (lambda: a.view(10, 100).t()[1:], 0),
        (lambda: torch.empty(1000), 0),
        (lambda: a.zero_(), 1000),
        (lambda: torch.zeros_like(a), 1000),
        (lambda: b[:1].expand(1000) + a, 1 + 1000 + 1000),
        (lambda: b[:500] + a[500:], 1500),
        (lambda: torch._foreach_mul_([a, b], 2.0), 4000),
    ):
        assert count_traffic(work) == 4 * numbers


def test_counting_sees_through_compilation():
    calls = []
    model = torch.nn.Linear(4, 8)
    model.compile(backend=lambda graph, inputs: calls.append(1) or graph)
    x = torch.ones(2, 4)
    assert count_flops(lambda: model(x)) == 2 * 2 * 4 * 8
    assert count_traffic(lambda: model(x)) == 4 * (2 * 4 + 4 * 8 + 8 + 2 * 8)
    assert not calls
