#!/usr/bin/env bash
# The project's checks: ruff, then pytest. Arguments go to pytest: `bash scripts/test.sh -m slow`, `-k reference`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-test.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# two processes, each with whole files; PYTEST_WORKERS=0 runs all tests in one, as `--pdb` needs it
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
