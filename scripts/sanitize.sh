#!/usr/bin/env bash
# Builds the C++ kernels with sanitizers, apart from the installed ones, and runs the op tests on them.
#
#   scripts/sanitize.sh                        address and undefined behaviour; two or three minutes on two cores
#   scripts/sanitize.sh thread                 data races, in the tests that use several threads
#   scripts/sanitize.sh address,undefined ...  other tests: arguments of pytest, from the root of the repository
#
# VENV   the environment, with the extra `test` (default .venv)
# CXX    a gcc: the libraries that Python must begin with are asked of it
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

which=${1:-address,undefined}
shift || true
bin=$root/${VENV:-.venv}/bin
[[ ${VENV:-} == /* ]] && bin=$VENV/bin
cxx=${CXX:-g++}
place=$root/build/sanitize-${which//,/-}

# The package with a module of its own: Python finds it first, because it starts in this folder.
rm -rf "$place/seme"
mkdir -p "$place"
cp -r seme "$place/seme"
cp -r kernels "$place/seme/kernels"
rm -f "$place"/seme/*.so
ln -sfn "$root/tests" "$place/tests"  # which import each other

export PATH=$bin:$PATH
cmake --fresh -G Ninja -S . -B "$place/cmake" -DSEME_OUTPUT_DIR="$place/seme" -DSEME_SANITIZE="$which" \
    -DCMAKE_CXX_COMPILER="$cxx" -DPython_EXECUTABLE="$bin/python" \
    -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" >"$place/cmake.log" || { cat "$place/cmake.log"; exit 1; }
cmake --build "$place/cmake" --parallel "$(nproc)" >"$place/cmake.log" || { cat "$place/cmake.log"; exit 1; }

libraries=()
for name in ${which//,/ }; do
    case $name in
        address) libraries+=("$("$cxx" -print-file-name=libasan.so)") ;;
        undefined) libraries+=("$("$cxx" -print-file-name=libubsan.so)") ;;
        thread) libraries+=("$("$cxx" -print-file-name=libtsan.so)") ;;
    esac
done
# A report ends the process, and so the tests. Python and torch leave memory to the end of the process, and torch has
# races of its own, in libraries that are not instrumented.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
export PYTHONPATH=$place OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0

cd "$place"
run=()
tests=("$@")
if [[ $which == *thread* ]]; then
    run=(setarch "$(uname -m)" -R)  # its shadow memory has fixed places
    [[ $# -gt 0 ]] || tests=(tests/ops/test_matrix.py tests/ops/test_references.py tests/ops/test_parity.py -k "cpu or threads")
else
    [[ $# -gt 0 ]] || tests=(tests/ops tests/checkpoint/test_reader.py)
fi
preload=$(IFS=:; echo "${libraries[*]}")

# shellcheck disable=SC2016
LD_PRELOAD=$preload "${run[@]}" "$bin/python" -c 'import sys
from seme import native
module = native.module()
assert module.__file__.startswith(sys.argv[1]), module.__file__
print(f"sanitize.sh: {module.__file__}")' "$place"
for i in "${!tests[@]}"; do
    [[ ${tests[i]} == tests/* ]] && tests[i]=$root/${tests[i]}
done
LD_PRELOAD=$preload "${run[@]}" "$bin/python" -m pytest --rootdir="$root" -c "$root/pyproject.toml" -q -s -p no:cacheprovider \
    "${tests[@]}"
