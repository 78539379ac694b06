#!/usr/bin/env bash
# Builds both compiled modules, runs the tests that need a GPU, and measures ops and whole merges, on a machine with a
# CUDA GPU, within nine minutes. Needs no network, only what is installed: torch, triton, nvcc, cmake, ninja, pybind11,
# pytest. Results: benchmarks/results/gpu-NAME.json, NAME being that of the GPU.
#
#   benchmarks/gpu/run.sh [build|test|sanitize|ops|matrix|merge|all ...]    all is the default; --help has the rest
#
# PYTHON        the interpreter that has torch (default python3)
# OUT           a folder for the results file and the logs, instead of benchmarks/results and build/gpu
# SEME_COMMIT   the commit to write down, where there is no git repository
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
