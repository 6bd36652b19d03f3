#!/usr/bin/env bash
# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, the CUDA kernels'
# emulated ones among them, then calls without sense (tests/faults/fuzz_ops.py); arguments go to
# pytest. With the argument "thread": every kernel on real threads under ThreadSanitizer
# (tests/races.cpp). Builds apart from the development build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${FEWBIT_VENV:-.venv}/bin/python"
export PATH="$(cd "$(dirname "$python")" && pwd):$PATH"  # its cmake is new enough
if [ "${1:-}" = thread ]; then
  cmake -S . -B build/races -G Ninja -DFEWBIT_SANITIZE=THREAD -DFEWBIT_CUDA=OFF
  cmake --build build/races
  exec env TSAN_OPTIONS=halt_on_error=1 build/races/cpp/fewbit_races
fi
build=build/sanitize
cmake -S . -B "$build" -G Ninja -DFEWBIT_SANITIZE=ADDRESS -DFEWBIT_CUDA=EMULATE \
  -DPython_EXECUTABLE="$(readlink -f "$(dirname "$python")")/python"
cmake --build "$build"
rm -rf "$build/python"
cp -r python "$build/python"
rm -f "$build"/python/fewbit/_C*.so
cp "$build"/cpp/_C*.so "$build/python/fewbit/"
# torch itself leaks at exit and is not instrumented; pybind11 modules need the runtime preloaded.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
# Calls without sense ask for terabytes; as without the sanitizer, that is an exception.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$PWD/$build/python"
tests=()
for binding in cpp/bindings/*.cpp; do
  test="tests/test_$(basename "$binding" .cpp).py"
  if [ -f "$test" ]; then tests+=("$test"); fi
done
"$python" -m pytest -q "${tests[@]}" "$@"
"$python" tests/faults/fuzz_ops.py --calls "${FEWBIT_FUZZ_CALLS:-5000}"
