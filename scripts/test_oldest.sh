#!/usr/bin/env bash
# The fast tests with the oldest supported versions of torch, torchvision and timm, in an environment of their own.
# Arguments go to pytest. Not part of continuous integration: it installs another 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-oldest
stamp=$venv/installed-$(cat requirements*.txt constraints-oldest.txt | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    "${PYTHON:-python3}" -m venv --clear $venv
    $venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt -c constraints-oldest.txt
    touch "$stamp"
fi
$venv/bin/python -c "import timm, torch, torchvision as v; print('torch', torch.__version__, v.__version__, timm.__version__)"
exec $venv/bin/python -m pytest "$@"
