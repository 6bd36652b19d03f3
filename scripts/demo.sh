#!/usr/bin/env bash
# The demo, from nothing: set up .venv, quantise the embedded model, print a table, write a plot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
# Into build/, which is not part of the tree; a -o of the caller's comes later and wins.
exec "${FEWBIT_VENV:-.venv}/bin/fewbit" demo -o build/demo "$@"
