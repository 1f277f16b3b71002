"""Programs that only print their help or never draw must not wait for scikit-learn, SciPy or matplotlib."""

from __future__ import annotations

import json
import subprocess
import sys

from util.runtime.files import ROOT

HEAVY = ("matplotlib", "plotly", "scipy", "sklearn")
MODULES = ("main_pretrain", "main_finetune", "main_segment", "scripts.probe", "scripts.visualize", "scripts.analyze")
CODE = f"""
import importlib, json, sys
loaded = {{}}
for module in {MODULES}:
    importlib.import_module(module)
    loaded[module] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps(loaded))
"""


def test_programs_start_without_heavy_packages():
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout) == {module: [] for module in MODULES}
