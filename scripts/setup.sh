#!/usr/bin/env bash
# Sets up a virtual environment with seme in it (editable). Used by the Makefile and by .ci/run.
#
#   scripts/setup.sh EXTRAS       e.g. scripts/setup.sh test,dev
#
# VENV     where the environment goes (default .venv)
# PYTHON   the interpreter to make it with (default: the first Python >= 3.10 of python3, python3.13 ... python3.10)
# SEME_NATIVE, SEME_CUDA, SEME_SANITIZE   as in setup.py
#
# Does nothing if the environment already has these extras and was made from the same sources of the build.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:?usage: scripts/setup.sh EXTRAS, e.g. test,dev}
venv=${VENV:-.venv}
stamps=$venv/.seme

# All that the installed package depends on. The Python files are not among it: the install is editable.
fingerprint() {
    {
        echo "$PWD ${SEME_NATIVE:-} ${SEME_CUDA:-} ${SEME_SANITIZE:-}"
        find csrc CMakeLists.txt setup.py pyproject.toml constraints.txt scripts/setup.sh -type f -print0 |
            LC_ALL=C sort -z | xargs -0 cat
    } | cksum
}

up_to_date() {
    local extra
    for extra in ${extras//,/ }; do
        [[ -f $stamps/$extra && $(<"$stamps/$extra") == "$now" ]] || return 1
    done
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup.sh: no Python >= 3.10 found (tried: ${PYTHON:-python3, python3.10 to python3.13}); set PYTHON" >&2
    return 1
}

now=$(fingerprint)
if up_to_date; then
    exit 0
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup.sh: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        { echo "setup.sh: $python has no working venv module (on Debian: install python3-venv)" >&2; exit 1; }
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
echo "setup.sh: installing torch (a first install takes a few minutes)"
"${pip[@]}" torch
echo "setup.sh: building and installing seme[$extras]"
"${pip[@]}" --editable ".[$extras]"

mkdir -p "$stamps"
for extra in ${extras//,/ }; do echo "$now" >"$stamps/$extra"; done
"$venv/bin/python" -c '
from seme import native
for name in ("_C", "_C_cuda"):
    print(f"setup.sh: seme.{name}:", native.why_not(name) or "built")'
