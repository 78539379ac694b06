#!/usr/bin/env bash
# Builds both compiled modules in place, runs the tests that need a GPU, and measures every op.
# For a machine with a CUDA GPU; needs no network, only what is installed: torch, triton, nvcc, cmake, ninja, pybind11,
# pytest. Arguments go to benchmarks/gpu/measure.py (--help lists them).
#
# PYTHON        the interpreter that has torch (default python3)
# BUILD         where CMake works (default build/gpu)
# SKIP_TESTS    1: only build and measure
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
build=${BUILD:-build/gpu}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || { echo "run.sh: nvcc is neither on PATH nor in /usr/local/cuda/bin" >&2; exit 1; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "run.sh: $python has no torch that sees a CUDA GPU; set PYTHON" >&2; exit 1; }

for cuda in OFF ON; do
    cmake -S . -B "$build/cuda-$cuda" -G Ninja -DSEME_CUDA=$cuda -DSEME_OUTPUT_DIR="$PWD/seme" \
        -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
    cmake --build "$build/cuda-$cuda"
done

if [[ ${SKIP_TESTS:-0} != 1 ]]; then
    "$python" -m pytest tests/gpu -q
fi
"$python" -m benchmarks.gpu.measure "$@"
