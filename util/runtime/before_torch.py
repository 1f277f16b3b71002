"""What must be set before torch is imported; the mains import this module first.

Threads that share an operator wait for each other. By default they wait busily, which is a disaster where another
program needs the processor; passive waiting costs nothing on an idle machine (docs/SPEED.md).

Imports take seconds, in which Ctrl-C ends one of our programs without a traceback. `run_main` takes over after them.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch's OpenMP when it is loaded, and by children
os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's OpenMP

program = getattr(sys.modules["__main__"], "__file__", None) or ""
is_ours = Path(__file__).resolve().parents[2] in Path(program).resolve().parents
if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a notebook or a test
    signal.signal(signal.SIGINT, signal.SIG_DFL)
