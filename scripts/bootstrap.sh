#!/usr/bin/env bash
# Make .venv beside this repository and install fewbit with what its demo and tests need.
#
# PYTHON      the interpreter of a new environment (python3)
# TORCH_SPEC  what to install when torch is not there yet (torch==2.13.0)
# FEWBIT_CUDA which CUDA kernels to build: AUTO, OFF, ON, EMULATE (cpp/cuda/cuda.cmake)
# FEWBIT_EXTRAS extras of the package, separated by commas (test)
# FEWBIT_VENV another folder for the environment (.venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${FEWBIT_VENV:-.venv}"
python="$venv/bin/python"
if ! command -v c++ >/dev/null || ! "${PYTHON:-python3}" -c 'import venv, ensurepip' 2>/dev/null; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && apt-get install -y -qq g++ python3-venv python3-dev >/dev/null
  else
    echo "fewbit needs a C++20 compiler and python3 with venv: install g++ and python3-venv" >&2
    exit 2
  fi
fi
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"

install() { "$python" -m pip install -qq --disable-pip-version-check "$@"; }
# torch first and alone, so that nothing else pulls in another build of it.
"$python" -c 'import torch' 2>/dev/null || install "${TORCH_SPEC:-torch==2.13.0}"
install 'scikit-build-core>=0.10' 'pybind11>=2.12' ninja 'cmake>=3.26'
install --no-build-isolation "-Ccmake.define.FEWBIT_CUDA=${FEWBIT_CUDA:-AUTO}" ".[${FEWBIT_EXTRAS:-test}]"
echo "fewbit is installed in $venv" >&2
