"""What every compiled GPU kernel takes of a multiprocessor: registers, spills, shared memory. Needs no GPU.

``python scripts/kernel_resources.py`` compiles the Triton kernels and the CUDA C++ kernels for sm_80 and sm_90 and
writes ``tests/kernels/resources.json``; the tests compile the same and compare (tests/kernels/test_resources.py), so a
kernel that begins to spill shows in the tests, and a new record shows in the diff what a change cost.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "kernels" / "resources.json"
CAPABILITIES = ("80", "90")
SLACK = 8
"""Registers a kernel may move by unnoticed: the hardware gives a thread its registers in eights."""

Kernels = dict[str, dict[str, int]]


class Built(NamedTuple):
    """One build of the CUDA module, with the compiler's intermediate files kept.

    Attributes:
        module: the shared library.
        assembly: PTX by (source, virtual GPU).
        log: what the build printed, with the assembler's account of each kernel.
    """

    module: Path
    assembly: dict[tuple[str, str], str]
    log: str


def output(command: Sequence[str | Path]) -> str:
    """What a command prints; raises with everything that it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def missing_triton() -> str | None:
    """Why the Triton kernels cannot be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def missing_cuda() -> str | None:
    """Why the CUDA module cannot be built here, or None."""
    programs = [name for name in ("nvcc", "cmake", "ninja", "c++filt") if shutil.which(name) is None]
    if importlib.util.find_spec("pybind11") is None:
        programs.append("pybind11")
    return f"{', '.join(programs)}: not installed" if programs else None


def compile_triton(cache: Path) -> dict[str, Any]:
    """What tests/kernels/compile_kernels.py prints: lists ``kernels`` and ``matrix``, and the version of ``triton``.

    ``cache`` is an empty folder: nothing that an earlier run compiled is taken for what compiles now.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    script, pipe = ROOT / "tests" / "kernels" / "compile_kernels.py", subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), capability],
            env={**environment, "TRITON_CACHE_DIR": str(cache / capability)},
            stdout=pipe,
            stderr=pipe,
        )
        for capability in CAPABILITIES
    ]
    found: dict[str, Any] = {"kernels": [], "matrix": []}
    for process in processes:
        out, err = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(err.decode())
        printed = json.loads(out)
        for kind in ("kernels", "matrix"):
            found[kind] += printed[kind]
        found["triton"] = printed["triton"]
    return found


def build_cuda(folder: Path) -> Built:
    """The CUDA module, built in an empty folder as setup.py builds it."""
    kept = folder / "kept"
    kept.mkdir()
    defines = {
        "SEME_CUDA": "ON",
        "SEME_OUTPUT_DIR": folder,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output([sys.executable, "-m", "pybind11", "--cmakedir"]).strip(),
        "CMAKE_CUDA_FLAGS": f"--keep --keep-dir={kept} --resource-usage",
    }
    output(["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items())])
    log = output(["cmake", "--build", folder / "build"])
    (module,) = folder.glob("_C_cuda*")
    assembly = {}
    for path in kept.glob("*.ptx"):
        if path.name.startswith("CMake"):  # what CMake compiles to find out about the compiler
            continue
        text = path.read_text()
        assembly[path.name.split(".")[0], re.findall(r"^\.target (\w+)", text, re.MULTILINE)[0]] = text
    return Built(module, assembly, log)


def triton_resources(compiled: dict[str, Any]) -> Kernels:
    """By GPU, kernel and variant; ``spill`` is the size of the stack, which holds little else."""
    kernels = {}
    for k in [*compiled["kernels"], *compiled["matrix"]]:
        left_out = ("BLOCK_", "COMPUTE", "OPERAND", "MIRROR", "EXPONENT")
        chosen = [f"{name}={value}" for name, value in k["constants"].items() if not name.startswith(left_out)]
        stored = [",".join(k["tensors"]), f"n={k['integer']}"] if "tensors" in k else []
        name = " ".join([f"sm_{k['capability']}", k["function"], k["compute"], *stored, *chosen])
        if name in kernels:
            raise ValueError(f"two kernels are {name}")
        kernels[name] = {"registers": k["registers"], "spill": k["stack"], "shared": k["shared"]}
    return kernels


def cuda_resources(log: str) -> Kernels:
    """By GPU and kernel, from what ``nvcc --resource-usage`` says; ``spill``: bytes stored and loaded again.

    Shared memory is what a kernel declares; what a launch adds to it is not known to the compiler.
    """
    text = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    kernels = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>.*)' for '(?P<gpu>\w+)'\n.*Function properties.*\n"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for found in pattern.finditer(text):
        name = found["name"].removeprefix("void ").replace("(anonymous namespace)::", "")
        name = name.split("(")[0].replace("seme::cuda::", "").replace("seme::", "").replace("> >", ">>")
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        kernels[f"{found['gpu']} {name}"] = {
            "registers": int(found["registers"]),
            "spill": int(found["stores"]) + int(found["loads"]),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def nvcc_version() -> str:
    """As nvcc prints it, e.g. ``13.0.88``."""
    return re.findall(r"V(\d+\.\d+\.\d+)", output(["nvcc", "--version"]))[0]


def compare(kept: dict[str, Any], compiler: str, kernels: Kernels) -> list[str]:
    """What differs from the record of one compiler, a line each.

    With the version that the record was made with: spills and shared memory are equal, registers are within
    :data:`SLACK`, and there are the same kernels. With another one: the same kernels, and none spills more.
    """
    same, lines = kept["compiler"] == compiler, []
    record = kept["kernels"]
    lines += [f"{name}: no record" for name in sorted(kernels.keys() - record.keys())]
    lines += [f"{name}: recorded, not compiled" for name in sorted(record.keys() - kernels.keys())]
    for name in sorted(kernels.keys() & record.keys()):
        old, new = record[name], kernels[name]
        if new["spill"] > old["spill"] or (same and new["spill"] != old["spill"]):
            lines.append(f"{name}: {new['spill']} bytes spilled, recorded {old['spill']}")
        if same and new["shared"] != old["shared"]:
            lines.append(f"{name}: {new['shared']} bytes of shared memory, recorded {old['shared']}")
        if same and abs(new["registers"] - old["registers"]) > SLACK:
            lines.append(f"{name}: {new['registers']} registers, recorded {old['registers']}")
    return lines


def write(record: dict[str, Any], path: Path) -> None:
    """As JSON, one kernel per line."""
    parts = []
    for kind, entry in record.items():
        lines = [f"      {json.dumps(name)}: {json.dumps(entry['kernels'][name])}" for name in sorted(entry["kernels"])]
        body = ",\n".join(lines)
        compiler = json.dumps(entry["compiler"])
        parts.append(f'  "{kind}": {{\n    "compiler": {compiler},\n    "kernels": {{\n{body}\n    }}\n  }}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="record registers, spills and shared memory of every GPU kernel")
    parser.add_argument("--out", type=Path, default=RECORD, help="default: %(default)s")
    options = parser.parse_args()
    reason = missing_triton() or missing_cuda()
    if reason:
        raise SystemExit(f"kernel_resources: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        cache, build = Path(folder, "triton"), Path(folder, "cuda")
        cache.mkdir()
        build.mkdir()
        compiled, built = compile_triton(cache), build_cuda(build)
    record = {
        "triton": {"compiler": compiled["triton"], "kernels": triton_resources(compiled)},
        "cuda": {"compiler": nvcc_version(), "kernels": cuda_resources(built.log)},
    }
    write(record, options.out)
    for kind, entry in record.items():
        spills = {name: k["spill"] for name, k in entry["kernels"].items() if k["spill"]}
        print(f"{kind} {entry['compiler']}: {len(entry['kernels'])} kernels, {len(spills)} spill")
        for name, spilled in spills.items():
            print(f"  {name}: {spilled} bytes")


if __name__ == "__main__":
    main()
