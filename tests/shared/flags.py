"""Flags of the smallest runs of each kind."""

from __future__ import annotations

# the smallest run: nano model at patch 8, one block of decoder, narrow heads, no data loader workers
TINY = (
    "--model lut_vit_nano_patch4 --patch_size 8 --decoder_depth 1 --head_mlp_dim 16 --batch_size 8 --epochs 2"
    " --warmup_epochs 1 --blr 1e-2 --num_workers 0 --print_freq 1 --monitor_freq 0 --device cpu"
    " --amp fp32"  # on some CPUs the default is bf16, and sums in another order differ much more
)

# a classifier of the same size; crops of a whole blob image say little, so nearly all of it is taken
TINY_CLASSIFIER = (
    "--model vit_nano_patch4 --patch_size 8 --batch_size 8 --epochs 2 --warmup_epochs 1 --num_workers 0 --print_freq 1"
    " --device cpu --amp fp32 --crop_scale 0.8 1"
)

# a segmenter of the same size: two updates per epoch of `scenes`, and an end in the middle of the third epoch
TINY_SEGMENTER = (
    "--model vit_nano_patch4 --patch_size 8 --input_size 32 --head_width 8 --batch_size 4 --max_updates 5"
    " --warmup_updates 2 --lr 2e-3 --num_workers 0 --print_freq 1 --device cpu --amp fp32 --pictures 0"
)

# ---- data sets made small ----------------------------------------------------------------------------------
SMALL = ["--short_side", "24", "--num_workers", "0"]
