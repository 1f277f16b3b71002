"""The tables of the paper, and options of their runs."""

from __future__ import annotations

from pathlib import Path

from util.tables.plan import Options, read_scale
from util.tables.tables import load_tables

TABLES = load_tables()
SCALES = {name: read_scale(name) for name in ("paper", "small", "cpu", "tiny")}


# ---- plans --------------------------------------------------------------------------------------------------
def options(scale: str, folder: Path, **more) -> Options:
    return Options(SCALES[scale], folder, **more)
