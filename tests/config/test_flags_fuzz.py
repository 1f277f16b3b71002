"""Flags drawn at random, right and wrong, for every field of every config: status 0 or 2, one line, no traceback."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from scripts import analyze, convert, report, robustness, submit, visualize
from shared.flags import TINY, TINY_CLASSIFIER, TINY_SEGMENTER
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.config.probe import ProbeConfig
from util.config.segment import SegmentConfig
from util.runtime.errors import UserError, run_main

INTEGERS = ("0", "-1", "1", "2", "7", "99999999999999999999", "2147483648", "1.5", "1e20", "abc", "", "1_0", "0x10")
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e-320", "1e308", "-1e-9", "0.5", "1", "2", "1e30", "abc", "")
TEXTS = (
    "",
    "nope",
    "../..",
    "a\nb",
    "$(touch X)",
    "'",
    "-",
    "--",
    "x" * 300,
    "/dev/null",
    "é",
    "0",
    "\x1b[2J",
    "a\udce9",
)
MAINS = {
    "pretrain": (main_pretrain, PretrainConfig, f"{TINY} --dataset digits --in_chans 1 --input_size 32"),
    "finetune": (main_finetune, FinetuneConfig, f"{TINY_CLASSIFIER} --dataset digits --in_chans 1 --aa none"),
    "linprobe": (main_linprobe, LinprobeConfig, f"{TINY_CLASSIFIER} --dataset digits --in_chans 1"),
    "segment": (main_segment, SegmentConfig, TINY_SEGMENTER),
}
CONFIGS = [
    *(config for _, config, _ in MAINS.values()),
    *(ProbeConfig, submit.SubmitConfig, report.ReportConfig, convert.ConvertConfig, visualize.VisualizeConfig),
    *(robustness.RobustnessConfig, *analyze.COMMANDS.values()),
]
NOT_DRAWN = {"dry_run", "recipe", "output_dir", "log_dir"}  # the test gives these itself


def draw(rng: random.Random, hint: Any) -> list[str] | None:
    """Values for a flag of this type, None for a switch."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return draw(rng, arguments[0])
    if origin in (Union, types.UnionType):
        return ["None"] if rng.random() < 0.1 else draw(rng, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return [rng.choice([*map(str, arguments), "bogus", ""])]
    if origin is tuple:
        number = 2 if arguments[-1] is not Ellipsis and rng.random() < 0.8 else rng.choice([0, 1, 1, 2, 3, 5])
        return [value for _ in range(number) for value in draw(rng, arguments[0])]
    if hint is bool:
        return None
    return [rng.choice({int: INTEGERS, float: NUMBERS}.get(hint, TEXTS))]


def flags_of(rng: random.Random, config_type: type) -> list[str]:
    """Return one to three flags of a config."""
    hints = get_type_hints(config_type, include_extras=True)
    names = [field.name for field in dataclasses.fields(config_type) if field.name not in NOT_DRAWN]
    flags = []
    for name in rng.sample(names, rng.choice([1, 1, 2, 3])):
        values = draw(rng, hints[name])
        spelling = name if rng.random() < 0.7 else name.replace("_", "-")
        flags += [f"--{'no_' if values is None and rng.random() < 0.5 else ''}{spelling}", *(values or ())]
    return flags


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda config_type: config_type.__name__)
def test_drawn_flags_are_settings_or_one_line(config_type):
    rng = random.Random(config_type.__name__)
    for _ in range(60):
        flags = flags_of(rng, config_type)
        begin = time.monotonic()
        try:
            assert isinstance(parse_config(config_type, flags, "x.py"), config_type)
        except UserError as error:
            assert str(error), flags  # noqa: PT017
        assert time.monotonic() - begin < 10, flags


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", MAINS)
@pytest.mark.parametrize("seed", range(3))
def test_drawn_flags_of_a_dry_run_end_with_0_or_2(stage, seed, scenes, monkeypatch, tmp_path, capsys):
    rng = random.Random(f"{stage} {seed}")
    module, config_type, base = MAINS[stage]
    monkeypatch.chdir(tmp_path)  # what a path of the flags makes lies here
    data = ["--data_path", str(scenes)] if stage == "segment" else []
    for _ in range(12):
        flags = flags_of(rng, config_type)
        arguments = [*base.split(), *data, *flags, "--output_dir", str(tmp_path / "run"), "--dry_run"]
        monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
        begin, status = time.monotonic(), 0
        try:
            run_main(Path(module.__file__).name, module.main)
        except SystemExit as stop:
            status = stop.code or 0
        text = capsys.readouterr().err
        assert status in (0, 2), (flags, text)
        assert "Traceback" not in text, flags
        assert status == 0 or text.count("error: ") == 1, (flags, text)
        assert "\x1b[2J" not in text, flags
        assert time.monotonic() - begin < 120, flags


NAMED = {  # flag and value -> the start of the one line
    "--input_size 2147483648": "--input_size 2147483648: must be at most 16384",
    "--head_mlp_dim 99999999999999999999": "--head_mlp_dim 99999999999999999999: must be at most 1048576",
    "--predictor_depth 1e20": "--predictor_depth 1e20: must be a whole number",
    "--predictor_depth 1000": "--predictor_depth 1000: must be at most 100",
    f"--resume {'x' * 300}": f"--resume {'x' * 40}...: names of files have at most 255 bytes",
    f"--output_dir a/{'é' * 200}/b": "--output_dir a/",
    "--max_minutes 1e-320": "--max_minutes 1e-320: must lie in 0.0001..",
    "--start_epoch 2": "--start_epoch 2: must lie in 0..1, below --epochs",
    "--start_epoch -1": "--start_epoch -1: must be 0 or more",
    "--loader_timeout 1e30": "--loader_timeout 1e+30: must lie in 0 (never) .. 1000000000 seconds",
    "--num_workers 1000": "--num_workers 1000: must be at most 256",
    "--batch_size 2147483648": "--batch_size 2147483648: must be at most 2147483647",
}


@pytest.mark.parametrize("flags", NAMED)
def test_values_beyond_every_machine_are_one_line(flags):
    with pytest.raises(UserError) as error:
        parse_config(PretrainConfig, [*TINY.split(), *flags.split()], "main_pretrain.py")
    message = str(error.value)
    assert message.startswith(NAMED[flags])
    assert "\n" not in message


def test_a_start_after_the_end_is_one_line(pretrain, flat_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--start_epoch 1 --max_steps 4")
    assert stop.value.code == 2
    assert "--start_epoch 1: is update 4, --max_steps ends at 4" in capsys.readouterr().err
