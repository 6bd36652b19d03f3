#!/usr/bin/env bash
# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
# Builds apart from the development build; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${FEWBIT_VENV:-.venv}/bin/python"
build=build/sanitize
cmake -S . -B "$build" -G Ninja -DFEWBIT_SANITIZE=ON -DPython_EXECUTABLE="$(readlink -f "$(dirname "$python")")/python"
cmake --build "$build"
rm -rf "$build/python"
cp -r python "$build/python"
rm -f "$build"/python/fewbit/_C*.so
cp "$build"/cpp/_C*.so "$build/python/fewbit/"
# torch itself leaks at exit and is not instrumented; pybind11 modules need the runtime preloaded.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$PWD/$build/python"
tests=()
for binding in cpp/bindings/*.cpp; do
  test="tests/test_$(basename "$binding" .cpp).py"
  if [ -f "$test" ]; then tests+=("$test"); fi
done
exec "$python" -m pytest -q "${tests[@]}" "$@"
