"""The independent reference: its configuration and its student."""

from __future__ import annotations

import json

from models_lut import LUT
from util.runtime.files import ROOT

DATA = ROOT / "tests" / "files"
CONFIG = json.loads((DATA / "lut_tiny.json").read_text())


def tiny_student(norm_pix_loss: bool = True) -> LUT:
    c = CONFIG["config"]
    same = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth",
            "decoder_num_heads", "head_depth", "predictor_depth", "mlp_ratio", "mask_ratio")  # fmt: skip
    return LUT(
        img_size=(c["img_size"], c["img_size"]),
        in_chans=3,
        norm_pix_loss=norm_pix_loss,
        heads=dict(hidden_dim=c["head_mlp_dim"]),
        **{name: c[name] for name in same},
    )
