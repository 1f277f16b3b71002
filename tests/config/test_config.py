"""Settings: flags of other programs, recipes and what wins, derived defaults, and checks."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from models_lut import MomentumEncoder
from shared.calls import one_line
from util.config.command_line import parse_config
from util.config.groups import as_dict, config_from_dict
from util.config.pretrain import PretrainConfig
from util.runtime.errors import UserError
from util.runtime.files import ROOT

ALL_RECIPES = {path.stem: path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))}
RECIPES = {name: text for name, text in ALL_RECIPES.items() if re.search("^model: (lut|mae)_", text, re.M)}
FULL_SIZE = [name for name in RECIPES if name.startswith(("paper_", "release_", "mae_"))]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def parse(*arguments: object) -> PretrainConfig:
    """Return the settings of a command line; strings are cut at spaces, paths are not."""
    flags = [part for a in arguments for part in (a.split() if isinstance(a, str) else [str(a)])]
    return parse_config(PretrainConfig, flags, "main_pretrain.py")


def changed(config: PretrainConfig) -> dict:
    """Return the fields that differ from their defaults."""
    default = as_dict(PretrainConfig())
    return {name: value for name, value in as_dict(config).items() if value != default[name]}


# ---- flags -------------------------------------------------------------------------------------------------

OWN_NAMES = dict(  # MAE's and the release's, unchanged
    batch_size=32, accum_iter=2, model="mae_vit_large_patch16", mask_ratio=0.6, epochs=800, warmup_epochs=20.0,
    blr=0.001, lr=0.0002, min_lr=0.01, weight_decay=0.1, data_path="some/where", output_dir="a", log_dir="b",
    device="cpu", seed=5, resume="c.pth", start_epoch=3, num_workers=4, head_mlp_dim=64, head_norm_layer="LN",
    head_act_layer="GELU",
)  # fmt: skip
FLAGS = {f"--{name} {value}": {name: value} for name, value in OWN_NAMES.items()} | {
    "--norm_pix_loss": dict(norm_pix_loss=True),
    "--no_pin_mem": dict(pin_mem=False),
    "--pin_mem": {},
    "--input_size 192": dict(input_size=[192]),
    "--w_bc 0.5": dict(alpha=0.5),
    "--w_mae 0.5": dict(w_mim=0.5),
    "--model_ema": {},
    "--model_ema_decay 0.99": dict(momentum=0.99),
    "--depth_head 3": dict(head_depth=3),
    "--depth_pred 1": dict(predictor_depth=1),
    "--auto_resume": dict(auto_resume=True),
    "--save_periods last every_50_epochs": dict(save_periods=["last", "every_50_epochs"]),
    # ours
    "--no_model_ema --alpha 0": dict(model_ema=False, alpha=0.0),
    "--input_size 192 128": dict(input_size=[192, 128]),
    "--betas .9 .999": dict(betas=[0.9, 0.999]),
    "--lr None": {},
    "--batch_size 3 --batch_size 4": dict(batch_size=4),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_both_spellings(flags):
    assert changed(parse(flags)) == FLAGS[flags]
    dashes = re.sub(r"--\w+", lambda match: match[0].replace("_", "-"), flags)
    assert changed(parse(dashes)) == FLAGS[flags]
    if flags.count(" ") == 1:
        assert changed(parse(flags.replace(" ", "="))) == FLAGS[flags]


WRONG = {
    "--bach-size=4": ("--bach-size", "--batch_size"),
    "--model-ema-dekay 0.9": ("--model-ema-dekay", "--model_ema_decay"),
    "--no_norm_pix_los": ("--no_norm_pix_los", "--no_norm_pix_loss"),
    "--epochs 1.5": ("--epochs", "1.5"),
    "--views both": ("--views both: unknown", "asymmetric", "symmetric"),
    "--batch_size": ("--batch_size",),
    "--recipe paper_vit_bse": ("--recipe paper_vit_bse", "did you mean paper_vit_base?"),
    "--recipe=cifar-lut": ("--recipe cifar-lut", "did you mean cifar_lut?"),
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_one_line(flags, capsys):
    with pytest.raises(UserError) as error:
        parse(flags)
    message = one_line(error)
    assert all(word in message for word in WRONG[flags]), message
    assert capsys.readouterr() == ("", "")  # nothing is drawn beside it


def test_no_flags_are_the_defaults():
    assert parse() == PretrainConfig()


def test_help_prints_every_flag_and_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in as_dict(PretrainConfig()))
    assert all(alias in shown for alias in ("--w_bc", "--w_mae", "--depth_head", "--depth_pred", "--model_ema_decay"))


# ---- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_every_recipe_says_what_it_takes_and_gives(name):
    header = "".join(line for line in ALL_RECIPES[name].splitlines(True) if line.startswith("#"))
    fields = set(re.findall(r"^# (\w+): +\S", header, re.M))
    assert {"Command", "Hardware", "Hours", "Expected"} <= fields
    assert set(re.findall(r"--recipe (\w+)", header)) <= {name}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_taken_as_written_and_builds(name):
    config, written = parse("--recipe", name), yaml.safe_load(RECIPES[name])
    assert set(changed(config)) <= {*written, "recipe"}
    for key, value in written.items():
        value = float(value) if re.fullmatch(r"[\d.]+e-\d+", str(value)) else value  # YAML 1.1 reads 1e-3 as text
        actual = as_dict(config)[key]
        assert actual == ([value] if isinstance(actual, list) and not isinstance(value, list) else value), key
    with torch.device("meta"):
        student = config.student_type(**config.model_arguments)
        assert not config.has_momentum_encoder or MomentumEncoder(student).head


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_recipes_are_the_papers(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, (kind, _, size) = parse("--recipe", name), name.split("_")
    assert config.effective_batch == 4096
    assert config.peak_lr == pytest.approx(1.5e-4 * 16)
    assert (config.epochs, config.warmup_epochs, config.min_lr, config.weight_decay) == (1600, 40, 0, 0.05)
    assert (config.mask_ratio, config.norm_pix_loss, config.resolved_input_size) == (0.75, True, (224, 224))
    assert config.model == f"{'mae' if kind == 'mae' else 'lut'}_vit_{size}_patch16"
    assert config.betas == ((0.9, 0.999) if kind == "paper" else (0.9, 0.95))
    assert config.layer_decay == (0.65 if kind == "paper" else 1)
    assert config.views == ("symmetric" if kind == "release" else "asymmetric")
    assert config.resolved_alpha == (0 if kind == "mae" else 1 if size == "small" else 0.25)
    assert (config.momentum, config.momentum_end, config.head_norm_layer) == (0.996, 1, "BN")
    assert config.resolved_crop == ("rrc" if kind == "mae" else "src")


def test_rows_of_a_table_share_their_optimiser():
    """MAE's and LUT's too: what differs is the method."""
    rows = [parse("--recipe", name) for name in ALL_RECIPES if name.startswith("ablation_")]
    assert len(rows) > 15
    assert {(row.betas, row.layer_decay, row.blr, row.weight_decay, row.warmup_epochs) for row in rows} == {
        ((0.9, 0.95), 1, 1.5e-4, 0.05, 40)
    }


def recipe(folder: Path, text: str | bytes) -> Path:
    path = folder / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "batch_size: 16\nepochs: 70\nnorm_pix_loss: true\nbetas: [0.5, 0.6]\nalpha: 0.1")
    for flags in (["--epochs 80 --recipe", path], ["--recipe", path, "--epochs 80"], [f"--recipe={path} --epochs=80"]):
        config = parse(*flags)
        assert (config.batch_size, config.epochs, config.accum_iter, config.recipe) == (16, 80, 1, str(path))
    config = parse("--recipe", path, "--no_norm_pix_loss --betas .7 .8 --w_bc 0.2")
    assert (config.norm_pix_loss, config.betas, config.alpha) == (False, (0.7, 0.8), 0.2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n---\n", {}),
        ("norm_pix_loss: true\npin_mem: false", dict(norm_pix_loss=True, pin_mem=False)),
        ("input_size: [64, 32]", dict(input_size=[64, 32])),
        ("save_periods: [last]", dict(save_periods=["last"])),
        ("lr: 1e-3", dict(lr=1e-3)),
        ("lr: null", {}),
        ("mean: [-0.5, 0, 0.5]", dict(mean=[-0.5, 0.0, 0.5])),
        ("data_path: a folder/with spaces", dict(data_path="a folder/with spaces")),
        ("head_norm_layer: none", dict(head_norm_layer="none")),
    ],
)
def test_recipes_of_ones_own(tmp_path, text, expected):
    path = recipe(tmp_path, text)
    assert changed(parse("--recipe", path)) == expected | dict(recipe=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 4", "unknown key bach_size, did you mean batch_size?"),
        ("batch-size: 4", "unknown key batch-size, did you mean batch_size?"),
        ("7: 4", "unknown key 7"),
        ("- a\n- b", "must hold one `key: value` per line"),
        ("batch_size", "must hold one `key: value` per line"),
        (b"\xff\xfe", "cannot be read as YAML"),
        ("a: [1", "cannot be read as YAML"),
        ("[]", "must hold one `key: value` per line"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(f"--recipe {path}: {message}")) as error:
        parse("--recipe", path)
    one_line(error)


def test_the_settings_that_a_run_saves_are_a_recipe(tmp_path):
    config = parse("--recipe quickstart --lr 1e-6 --save_periods last --clip_grad 0.5")
    path = recipe(tmp_path, yaml.safe_dump(as_dict(config)))
    assert as_dict(parse("--recipe", path)) == as_dict(config) | dict(recipe=str(path))


# ---- derived settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "alpha"),
    [
        ("lut_vit_small_patch4", 1.0),
        ("lut_vit_small_patch16", 1.0),
        ("lut_vit_medium_patch16", 0.25),
        ("lut_vit_base_patch16", 0.25),
        ("lut_vit_huge_patch14", 0.25),
        ("mae_vit_base_patch16", 0.0),
    ],
)
def test_defaults_of_the_model(model, alpha):
    config = PretrainConfig(model=model)
    assert config.resolved_alpha == alpha
    assert config.resolved_crop == ("src" if alpha else "rrc")
    assert config.resume_settings(9)["crop"] == config.resolved_crop
    assert (config.has_momentum_encoder, config.num_views) == ((True, 2) if alpha else (False, 1))
    assert (config.model_arguments["heads"] is None) == (alpha == 0)
    side, patch = {"h4": (32, 4), "16": (224, 16), "14": (224, 14)}[model[-2:]]
    assert (config.resolved_input_size, config.resolved_patch_size, config.num_patches) == (
        (side, side),
        patch,
        (side // patch) ** 2,
    )
    for given in (0.0, 0.7):
        own = PretrainConfig(model=model, alpha=given)
        assert (own.resolved_alpha, own.num_views) == (given, 2 if given else 1)


def test_sizes_that_are_given_win_over_the_model_s():
    config = PretrainConfig(input_size=(96, 64), patch_size=8, decoder_depth=2, in_chans=1)
    assert (config.resolved_input_size, config.resolved_patch_size, config.num_patches) == ((96, 64), 8, 96)
    expected = dict(img_size=(96, 64), patch_size=8, decoder_depth=2, in_chans=1, embed_dim=768, decoder_embed_dim=512)
    assert config.model_arguments == config.model_arguments | expected


@pytest.mark.parametrize(("processes", "batch"), [("1", 192), ("4", 768)])
def test_peak_lr_is_linear_in_the_effective_batch(monkeypatch, processes, batch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    config = PretrainConfig(batch_size=64, accum_iter=3, blr=1e-3)
    assert config.effective_batch == batch
    assert config.peak_lr == pytest.approx(1e-3 * batch / 256)
    assert PretrainConfig(batch_size=64, accum_iter=3, lr=0.0).peak_lr == 0


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.5,), (0.25,)), (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (4, (0.5,) * 4, (0.25,) * 4)],
)
def test_pixel_statistics(channels, mean, std):
    config = PretrainConfig(in_chans=channels, photometric=False)
    assert (config.resolved_mean, config.resolved_std) == (mean, std)
    given = PretrainConfig(in_chans=channels, photometric=False, mean=(0.1,) * channels, std=(2.0,) * channels)
    assert (given.resolved_mean, given.resolved_std) == ((0.1,) * channels, (2.0,) * channels)


def test_loader_workers_and_what_is_kept():
    assert PretrainConfig(num_workers=0).resolved_num_workers == 0
    assert 1 <= PretrainConfig().resolved_num_workers <= 10
    assert PretrainConfig().keep_every is None
    assert PretrainConfig(save_periods=("last", "every_100_epochs")).keep_every == 100


# ---- checks ------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD = {  # flag: values of which each alone is refused
    **{name: [0, -3] for name in ("batch_size", "accum_iter", "epochs", "save_freq", "keep_last", "print_freq")},
    **{name: [0, -1] for name in ("max_steps", "patch_size", "decoder_depth")},
    **{name: [0, -1] for name in ("head_depth", "predictor_depth", "head_mlp_dim")},
    **{name: [-1] for name in ("start_epoch", "num_workers", "monitor_freq")},
    "monitor_images": [0, -1],
    **{name: [-0.1, NAN, INF] for name in ("blr", "lr", "min_lr", "weight_decay", "alpha", "w_mim")},
    **{name: [-0.1, 1.1, NAN] for name in ("momentum", "momentum_end", "hflip")},
    "in_chans": [0, 2, 5],
    "input_size": [(7,), (64, 4), (16, 16, 16), (224, 230), (0,)],
    "mean": [(0.5,), (0.5, NAN, 0.5), (INF, 0.5, 0.5)],
    "std": [(1.0,) * 4, (1.0, 0.0, 1.0), (1.0, 1.0, -1.0), (NAN, 1.0, 1.0), (INF, 1.0, 1.0)],
    "loader_timeout": [-1.0, NAN],
    "warmup_epochs": [-1.0, 400.5, NAN],
    "betas": [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)],
    "layer_decay": [0.0, 1.1, -0.5, NAN],
    "clip_grad": [0.0, -1.0, NAN],
    "seed": [-1, 2**32],
    "save_periods": [("first",), ("every_0_epochs",), ("every_epochs",), ("every_x_epochs",), ("every_5",)],
    "model": ["lut_vit_bsae_patch16", ""],
    "mask_ratio": [0.0, 1.0, -0.5, 1.5, NAN, 0.9999, 1e-17],  # the last two leave none hidden or none visible
    "head_norm_layer": ["bn", "GN"],
    "head_act_layer": ["relu", "SiLU"],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_flag_and_value(flag, value):
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    with pytest.raises(UserError) as error:
        PretrainConfig(**{flag: value})
    assert one_line(error).startswith(f"--{flag} {shown}".rstrip() + ": ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(alpha=0.0, w_mim=0.0), "--w_mim 0.0: nothing to learn"),
        (dict(model_ema=False), "--no_model_ema: add --alpha 0"),
        (dict(in_chans=4), "--in_chans 4: colours of RGBA are not augmented: --no_photometric"),
        (dict(resume="a.pth", auto_resume=True), "--resume a.pth: leave out --auto_resume"),
        (dict(epochs=3, warmup_epochs=0.0, start_epoch=3), "--start_epoch 3: must lie in 0..2"),
        (dict(loader_timeout=math.inf), "--loader_timeout inf"),
        (dict(save_periods=("every_2_epochs", "every_3_epochs")), "give every_N_epochs once"),
        (dict(epochs=3, warmup_epochs=4.0), "--warmup_epochs 4.0: must lie in 0..--epochs 3"),
        (dict(patch_size=32, mask_ratio=0.99), "--mask_ratio 0.99: leaves 0 of 49 patches visible"),
        (dict(views="symmetric", mask_ratio=0.49), "--mask_ratio 0.49: --views symmetric"),
        (dict(save_periods=("every_00_epochs",)), "--save_periods"),
        (dict(batch_size=1), "--batch_size 1: BatchNorm of the heads needs two images, over all processes, or --head"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        PretrainConfig(**settings)
    one_line(error)


def test_one_image_is_enough_where_the_heads_have_no_batch_norm(monkeypatch):
    for settings in (dict(head_norm_layer="LN"), dict(head_depth=1, predictor_depth=1), dict(alpha=0.0)):
        PretrainConfig(batch_size=1, **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    PretrainConfig(batch_size=1)


def test_the_edges_of_what_is_allowed():
    PretrainConfig(
        views="symmetric", mask_ratio=0.5, warmup_epochs=400.0, layer_decay=1.0, betas=(0.0, 0.0), seed=2**32 - 1
    )
    PretrainConfig(model_ema=False, alpha=0.0, in_chans=4, lr=0.0, momentum=0.0, momentum_end=1.0, hflip=1.0)
    PretrainConfig(w_mim=0.0, loader_timeout=0.0, num_workers=0, monitor_freq=0, input_size=(32, 48), warmup_epochs=0.0)


# ---- to plain types and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--alpha 0", "--recipe quickstart", "--recipe paper_vit_base --lr 1e-6 --std 1 2 3"])
def test_settings_survive_the_way_through_yaml(flags):
    config = parse(flags)
    assert config_from_dict(PretrainConfig, as_dict(config)) == config
    assert config_from_dict(PretrainConfig, yaml.safe_load(yaml.safe_dump(as_dict(config)))) == config
