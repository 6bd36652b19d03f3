#!/usr/bin/env bash
# All tests, from nothing: set up .venv, lint, run pytest on the installed package.
# Arguments go to pytest: bash scripts/test.sh -k hadamard
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# CUDA kernels on the CPU, and nvcc, which compiles them for one card and needs none.
FEWBIT_CUDA="${FEWBIT_CUDA:-EMULATE}" FEWBIT_EXTRAS=test,cuda bash scripts/bootstrap.sh
venv="${FEWBIT_VENV:-.venv}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# More threads than cores make OpenMP spin: leave the machine's number, but let waiting threads sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$venv/bin/python" -m pytest "$@"
