#!/usr/bin/env bash
# Write the type stub of the native module from the installed module (needs pybind11-stubgen).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${FEWBIT_VENV:-.venv}/bin/python" -m pybind11_stubgen fewbit._C -o "${1:-python}"
