"""Learning rates of the recipes at 20 points each, as numbers of the programs that the recipes name."""

from __future__ import annotations

import pytest

from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.optim.schedules import learning_rate, polynomial_rate

# MAE (util/lr_sched.py): linear warm-up, then a half cosine, both over fractional epochs. Epoch -> rate.
EPOCHS = {
    "mae_vit_base": {  # PRETRAIN.md: blr 1.5e-4 per 256 at batch 4096, 40 of 1600 epochs
        0: 0.0, 10: 0.0006, 20: 0.0012, 39: 0.00234, 40: 0.0024, 60: 0.00239903, 100: 0.00239125, 150: 0.00237068,
        200: 0.00233824, 300: 0.00223923, 400: 0.00209821, 500: 0.00192089, 600: 0.00171443, 700: 0.00148718,
        800: 0.00124832, 1000: 0.000774474, 1200: 0.000368731, 1400: 9.60247e-05, 1500: 2.42512e-05,
        1599: 2.43333e-09,
    },
    "linprobe_vit_base": {  # FINETUNE.md: blr .1 per 256 at batch 16384, 10 of 90 epochs
        0: 0.0, 1: 0.64, 2: 1.28, 5: 3.2, 9: 5.76, 10: 6.4, 12: 6.39014, 15: 6.33851, 20: 6.15641, 25: 5.8607,
        30: 5.46274, 35: 4.97782, 40: 4.42459, 45: 3.82429, 50: 3.2, 60: 1.97541, 70: 0.937258, 80: 0.243585,
        85: 0.0614871, 89: 0.00246708,
    },
    "finetune_vit_base": {  # Table D: blr 2.5e-4 per 256 at batch 1024, 5 of 100 epochs; MAE's end, 1e-6
        0: 0.0, 1: 0.0002, 2: 0.0004, 3: 0.0006, 4: 0.0008, 5: 0.001, 6: 0.000999727, 8: 0.000997544,
        10: 0.000993187, 15: 0.000972936, 20: 0.000939797, 30: 0.000838802, 40: 0.000701147, 50: 0.000541748,
        60: 0.00037788, 70: 0.000227299, 80: 0.000106324, 90: 2.80643e-05, 95: 7.81253e-06, 99: 1.2731e-06,
    },
}  # fmt: skip
MAINS = {"mae": PretrainConfig, "linprobe": LinprobeConfig, "finetune": FinetuneConfig}

# mmsegmentation, ViT-B with MAE on ADE20K, 160k updates. Update -> rate.
UPDATES_1_X = {  # mmengine's LinearLR (start_factor 1e-6, end 1500) and PolyLR (power 1, begin 1500, end 160000)
    0: 1e-10, 1: 6.68111e-08, 10: 6.67211e-07, 100: 6.67121e-06, 500: 3.33556e-05, 1000: 6.67112e-05, 1499: 1e-4,
    1500: 1e-4, 1501: 9.99994e-05, 2000: 9.96845e-05, 5000: 9.77918e-05, 10000: 9.46372e-05, 20000: 8.8328e-05,
    40000: 7.57096e-05, 60000: 6.30912e-05, 80000: 5.04729e-05, 100000: 3.78545e-05, 120000: 2.52361e-05,
    140000: 1.26177e-05, 159999: 0.0,
}  # fmt: skip
UPDATES_0_X = {  # mmcv's poly with linear warm-up (ratio 1e-6): it decays from update 0 on
    0: 1e-10, 1: 6.67662e-08, 10: 6.66724e-07, 100: 6.66259e-06, 500: 3.32292e-05, 1000: 6.625e-05,
    1499: 9.89971e-05, 1500: 9.90625e-05, 1501: 9.90619e-05, 2000: 9.875e-05, 5000: 9.6875e-05, 10000: 9.375e-05,
    20000: 8.75e-05, 40000: 7.5e-05, 60000: 6.25e-05, 80000: 5e-05, 100000: 3.75e-05, 120000: 2.5e-05,
    140000: 1.25e-05, 159999: 6.25e-10,
}  # fmt: skip


@pytest.mark.parametrize("recipe", EPOCHS)
def test_half_cosines_are_mae_s(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # which the recipes are for
    flags = ["--recipe", recipe, "--data_path", "x", *["--finetune", "y"] * (not recipe.startswith("mae"))]
    config = parse_config(MAINS[recipe.partition("_")[0]], flags, "main.py")
    per_epoch = 1_281_167 // config.effective_batch
    total, warmup = config.epochs * per_epoch, config.warmup_epochs * per_epoch
    for epoch, expected in EPOCHS[recipe].items():
        rate = learning_rate(epoch * per_epoch, total, warmup, config.peak_lr, config.min_lr)
        assert rate == pytest.approx(expected, rel=1e-5, abs=1e-14), epoch


@pytest.mark.parametrize(("points", "most"), [(UPDATES_1_X, 0.0007), (UPDATES_0_X, 0.0094)])
def test_the_polynomial_is_mmsegmentation_1_x_to_a_1500th_of_its_peak(points, most):
    """1.x divides by one update less (its last update has rate 0); 0.x is .94 % lower when the warm-up ends."""
    config = parse_config(SegmentConfig, ["--recipe", "segment_vit_base", "--data_path", "x"], "main_segment.py")
    schedule = (config.max_updates, config.warmup_updates, config.peak_lr, config.min_lr, config.power)
    differences = [abs(polynomial_rate(update, *schedule) - rate) / 1e-4 for update, rate in points.items()]
    assert len(differences) == 20
    assert most - 1e-4 < max(differences) < most
