"""Flags of a tiny grid, and what it prints."""

from __future__ import annotations

import re

from shared.flags import TINY_CLASSIFIER

TINY_GRID = f'--finetune scratch --finetune_flags="{TINY_CLASSIFIER} --input_size 32 --aa none --drop_path 0"'


def rows_of(shown: str) -> list[list[str]]:
    """Return the cells of each line of a text table."""
    return [re.split(r"  +", line) for line in shown.splitlines()]
