"""scripts/environment.sh chooses the builds of torch by the GPUs of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from util.runtime.files import ROOT


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("nvidia_smi", "constrained"),
    [
        ("printf '7.0\\n'", True),
        ("printf '9.0\\n7.0\\n'", True),  # the oldest GPU decides
        ("printf '7.5\\n'", False),
        ("printf '10.0\\n12.0\\n'", False),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", False),
        ("echo 'No devices were found'", False),
        (None, False),
    ],
)
def test_old_gpus_get_builds_that_have_kernels_for_them(tmp_path, nvidia_smi, constrained):
    tools = tmp_path / "tools"
    tools.mkdir()
    if nvidia_smi is not None:
        executable(tools / "nvidia-smi", nvidia_smi)
    for name in ("bash", "basename", "cat", "cksum", "cut", "awk", "mkdir", "touch", "cp"):
        (tools / name).symlink_to(shutil.which(name))
    executable(tools / "pip-stand-in", f'echo "$@" >> {tmp_path}/calls')
    executable(tools / "python3", "mkdir -p .venv/bin && cp -f tools/pip-stand-in .venv/bin/python")
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/environment.sh", "requirements.txt", "requirements-test.txt", "constraints-volta.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    command = ["bash", "-c", "set -euo pipefail; . scripts/environment.sh requirements.txt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {"PATH": str(tools)}
    for _ in range(2):  # the second time nothing is installed
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "-r requirements.txt" in call
    assert ("-c constraints-volta.txt" in call) == constrained
