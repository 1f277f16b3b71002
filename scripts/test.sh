#!/usr/bin/env bash
# The project's checks: ruff, then pytest. Arguments go to pytest: `bash scripts/test.sh -m slow`, `-k reference`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-test.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
