"""Flags of commands that MAE and LUT's release publish for pre-training, fine-tuning and probing: all are taken."""

from __future__ import annotations

import pytest

from scripts.submit import SubmitConfig
from shared.calls import one_line
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.runtime.errors import UserError

MAE_FINETUNE = (
    "--finetune PRETRAINED --weight_decay 0.05 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval --data_path IMAGENET"
)
MAE = {  # what each command trains, and its flags
    "pretrain large": (
        PretrainConfig,
        "--batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800"
        " --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path IMAGENET",
    ),
    "pretrain base": (
        PretrainConfig,
        "--batch_size 128 --accum_iter 16 --model mae_vit_base_patch16 --mask_ratio 0.75 --epochs 800"
        " --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05",
    ),
    **{
        f"evaluate {size}": (
            FinetuneConfig,
            f"--eval --resume mae_finetuned_vit_{size}.pth --model vit_{size}_patch{patch} --batch_size 16"
            " --data_path IMAGENET",
        )
        for size, patch in (("base", 16), ("large", 16), ("huge", 14))
    },
    "finetune base": (
        FinetuneConfig,
        "--batch_size 32 --model vit_base_patch16 --epochs 100 --blr 5e-4 --layer_decay 0.65"
        f" --drop_path 0.1 {MAE_FINETUNE}",
    ),
    "finetune base on one node": (
        FinetuneConfig,
        "--accum_iter 4 --batch_size 32 --model vit_base_patch16 --epochs 100 --blr 5e-4 --layer_decay 0.65"
        f" --drop_path 0.1 {MAE_FINETUNE}",
    ),
    "finetune large": (
        FinetuneConfig,
        "--batch_size 32 --model vit_large_patch16 --epochs 50 --blr 1e-3 --layer_decay 0.75"
        f" --drop_path 0.2 {MAE_FINETUNE}",
    ),
    "finetune huge": (
        FinetuneConfig,
        "--batch_size 16 --model vit_huge_patch14 --epochs 50 --blr 1e-3 --layer_decay 0.75"
        f" --drop_path 0.3 {MAE_FINETUNE}",
    ),
    "linprobe": (
        LinprobeConfig,
        "--batch_size 512 --model vit_base_patch16 --cls_token --finetune PRETRAINED --epochs 90 --blr 0.1"
        " --weight_decay 0.0 --dist_eval --data_path IMAGENET",
    ),
}
RELEASE = {
    "pretrain": (
        PretrainConfig,
        "--data_path IMAGENET --model lut_vit_base_patch16 --batch_size 128 --accum_iter 4 --blr 1.5e-4"
        " --weight_decay 0.05 --model-ema-decay 0.996 --norm_pix_loss --warmup_epochs 40 --print_freq 100 --epochs 1600"
        " --output_dir RUN --save_periods last best every_100_epochs --log_dir RUN --model-ema --w_bc 0.25 --seed 0"
        " --depth_head 2 --depth_pred 2 --head_mlp_dim 4096 --head_norm_layer BN --head_act_layer ReLU --auto_resume",
    ),
    "finetune": (
        FinetuneConfig,
        "--accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune RUN/checkpoint-1600.pth --output_dir TUNED"
        " --epochs 100 --blr 1e-3 --layer_decay 0.75 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0"
        " --reprob 0.25 --dist_eval --data_path IMAGENET --save_periods last best --auto_resume",
    ),
}


@pytest.mark.parametrize("launcher", ["", "--local_rank=1", "--local-rank=1", "--local_rank 1"])
@pytest.mark.parametrize("name", [*(f"MAE {name}" for name in MAE), *(f"release {name}" for name in RELEASE)])
def test_published_flags_are_taken(name, launcher, monkeypatch):
    """torch.distributed.launch puts the rank in front of the script's own flags; the environment has it too."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    source, _, command = name.partition(" ")
    kind, flags = (MAE if source == "MAE" else RELEASE)[command]
    config = parse_config(kind, [*launcher.split(), *flags.split()], "main.py")
    arguments = flags.split()
    assert str(config.model) == arguments[arguments.index("--model") + 1]
    assert config.batch_size == int(arguments[arguments.index("--batch_size") + 1])
    if "--epochs" in arguments:
        assert config.epochs == int(arguments[arguments.index("--epochs") + 1])


@pytest.mark.parametrize(
    ("flag", "kind", "message"),
    [
        ("--use_volta32", PretrainConfig, "--use_volta32: give --constraint to scripts/submit.py"),
        ("--use_volta32", FinetuneConfig, "--use_volta32: give --constraint to scripts/submit.py"),
        ("--nodes 8", PretrainConfig, "--nodes: is a flag of scripts/submit.py"),
        ("--job_dir JOB", LinprobeConfig, "--job_dir: is a flag of scripts/submit.py"),
        ("--world_size 8", PretrainConfig, "--world_size: torchrun gives the number of processes"),
        ("--dist_on_itp", PretrainConfig, "--dist_on_itp: torchrun does this"),
        ("--dist_url env://", PretrainConfig, "--dist_url: torchrun does this"),
    ],
)
def test_flags_that_are_replaced_name_what_replaces_them(flag, kind, message):
    with pytest.raises(UserError) as error:
        parse_config(kind, flag.split(), "main.py")
    assert one_line(error).startswith(message)


def test_submit_names_what_replaces_volta32():
    with pytest.raises(UserError, match="--use_volta32: give --constraint"):
        parse_config(SubmitConfig, ["pretrain", "--nodes", "8", "--use_volta32"], "submit.py")
