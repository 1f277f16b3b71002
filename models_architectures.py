"""The table of models: sizes of encoders and decoders by name. Plain numbers, no torch."""

from __future__ import annotations

_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)  # MAE's, for every size
_SMALL_DECODER = dict(decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "medium": dict(embed_dim=512, depth=12, num_heads=8),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}

# Name without its prefix -> arguments of LUT; img_size is the default of --input_size.
ARCHITECTURES: dict[str, dict] = {
    "vit_small_patch16": dict(img_size=224, patch_size=16, **_SIZES["small"], **_DECODER),
    "vit_medium_patch16": dict(img_size=224, patch_size=16, **_SIZES["medium"], **_DECODER),
    "vit_base_patch16": dict(img_size=224, patch_size=16, **_SIZES["base"], **_DECODER),
    "vit_large_patch16": dict(img_size=224, patch_size=16, **_SIZES["large"], **_DECODER),
    "vit_huge_patch14": dict(img_size=224, patch_size=14, **_SIZES["huge"], **_DECODER),
    # small images: 32 pixels (CIFAR) and 64 pixels (Tiny-ImageNet)
    "vit_nano_patch4": dict(
        img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2,
    ),
    "vit_tiny_patch4": dict(img_size=32, patch_size=4, **_SIZES["tiny"], **_SMALL_DECODER),
    "vit_tiny_patch8": dict(img_size=64, patch_size=8, **_SIZES["tiny"], **_SMALL_DECODER),
    "vit_small_patch4": dict(img_size=32, patch_size=4, **_SIZES["small"], **_SMALL_DECODER),
    "vit_small_patch8": dict(img_size=64, patch_size=8, **_SIZES["small"], **_SMALL_DECODER),
}  # fmt: skip

# Both prefixes name the same architecture; `mae_` makes alpha 0 the default (see PretrainConfig.resolved_alpha).
MODELS: dict[str, dict] = {
    f"{prefix}_{name}": shape for prefix in ("lut", "mae") for name, shape in ARCHITECTURES.items()
}
