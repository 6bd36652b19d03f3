#!/usr/bin/env bash
# What a new user gets: the source archive, built to a wheel, and that wheel with its `hf` extra alone
# in a fresh environment. Prints how many distributions come to torch's own, then loads and continues
# a text from checkpoints of each kind.
#
# PYTHON, TORCH_SPEC as in bootstrap.sh. Takes about two minutes, most of it torch's installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
install() { "$work/$1/bin/python" -m pip install -q --disable-pip-version-check "${@:2}"; }
count() { "$work/venv/bin/python" -c 'from importlib.metadata import distributions; print(len(list(distributions())))'; }

"${PYTHON:-python3}" -m venv "$work/venv"
install venv "${TORCH_SPEC:-torch==2.13.0}"
torch=$(count)
# The build reads torch's headers, but its tools are not to be counted: an environment beside.
"${PYTHON:-python3}" -m venv "$work/build"
site='import sysconfig; print(sysconfig.get_paths()["purelib"])'
"$work/venv/bin/python" -c "$site" > "$("$work/build/bin/python" -c "$site")/torch.pth"
install build 'scikit-build-core>=0.10' 'pybind11>=2.12' ninja 'cmake>=3.26'
"$work/build/bin/python" -c "from scikit_build_core.build import build_sdist; build_sdist('$work')"
"$work/build/bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$work" "$work"/fewbit-*.tar.gz
install venv "$work"/fewbit-*.whl
core=$(count)
install venv "$(ls "$work"/fewbit-*.whl)[hf]"
echo "distributions: torch $torch, with fewbit +$((core - torch)), with fewbit[hf] +$(($(count) - torch))"

cd "$work"
export HF_HUB_OFFLINE=1
fewbit() { "$work/venv/bin/fewbit" "$@"; }
model="$(venv/bin/python -c 'import fewbit.demo as d, pathlib; print(pathlib.Path(d.__file__).parent / "model")')"
for format in compressed-tensors awq gptq fewbit; do
  fewbit quantize "$model" -o "$format" --method rtn --bits 4 --symmetric --format "$format" --quiet
  venv/bin/python - "$format" <<'PYTHON'
import sys

import fewbit
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("It was the best of", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
packed = sum(isinstance(m, fewbit.PackedLinear) for m in model.modules())
assert packed and len(out) == ids.input_ids.shape[1] + 8
print(f"{sys.argv[1]:20} {packed} packed linears: {tokenizer.decode(out)!r}")
PYTHON
done
