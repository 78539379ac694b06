"""The CUDA module builds for sm_80 and sm_90, loads without a driver, needs no torch, and rounds every operation."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the module, {(source, virtual GPU): its PTX}), from one build as setup.py does it."""
    for program in ("nvcc", "cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    kept = folder / "kept"
    kept.mkdir()
    defines = {
        "SEME_CUDA": "ON",
        "SEME_OUTPUT_DIR": folder,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output([sys.executable, "-m", "pybind11", "--cmakedir"]).strip(),
        "CMAKE_CUDA_FLAGS": f"--keep --keep-dir={kept}",
    }
    output(["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items())])
    output(["cmake", "--build", folder / "build"])
    (module,) = folder.glob("_C_cuda*")
    assembly = {}
    for path in kept.glob("*.ptx"):
        if path.name.startswith("CMake"):  # what CMake compiles to find out about the compiler
            continue
        text = path.read_text()
        assembly[path.name.split(".")[0], re.findall(r"^\.target (\w+)", text, re.MULTILINE)[0]] = text
    return module, assembly


def output(command):
    """What a command prints; its errors, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_source_is_compiled_for_both_gpus(built):
    _, assembly = built
    assert set(assembly) == {(source, gpu) for source in SOURCES for gpu in ("sm_80", "sm_90")}


def test_every_operation_is_rounded_on_its_own(built):
    _, assembly = built
    seen = set()
    for where, text in assembly.items():
        for instruction in re.findall(r"\b(?:fma|mad|add|sub|mul|div|rcp)\.[a-z.]*f(?:16x2|16|32|64)\b", text):
            name, rounding, *rest = instruction.split(".")
            seen.add(name)
            assert (name, rounding) in {(n, "rn") for n in ("add", "sub", "mul", "div")}, (instruction, where)
            assert "ftz" not in rest, (instruction, where)
    assert seen == {"add", "sub", "mul", "div"}


def test_products_run_on_the_tensor_cores(built):
    _, assembly = built
    for source in ("elect", "resolve"):
        for gpu in ("sm_80", "sm_90"):
            assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in assembly[source, gpu]


def test_the_module_loads_without_a_driver_and_without_torch(built):
    module, _ = built
    script = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("seme._C_cuda", {str(module)!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert "torch" not in sys.modules
        print(module.BLOCK, module.TILE)
        try:
            module.weighted_sum([(64, 1, 0)], [1.0], 1.0, 0, (64, 1, 0), (0, 0))
        except RuntimeError as error:
            print(error)
    """
    # A GPU that is there is hidden: the address above is none of its own.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    sizes, error = done.stdout.splitlines()
    assert sizes == "8192 2048"
    assert error.startswith("CUDA: ")


def test_the_module_is_linked_against_neither_torch_nor_cuda(built):
    module, _ = built
    for program in ("nm", "ldd"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    symbols = output(["nm", "--dynamic", module])
    assert re.search(r"torch|c10|\bat::|_ZN2at", symbols) is None
    assert re.search(r"torch|libcud|libc10", output(["ldd", module])) is None
