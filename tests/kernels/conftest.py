"""The kernels, compiled once for all tests: for GPUs that are not here, and for the CPU by an emulator."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts import kernel_resources
from seme import native
from seme.ops import cuda

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
EMULATOR = Path(__file__).with_name("cuda_emulator.h")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The Triton kernels: lists ``kernels`` and ``matrix``, an entry per kernel, compute dtype or operand, and GPU."""
    if reason := kernel_resources.missing_triton():
        pytest.skip(reason)
    return kernel_resources.compile_triton(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The CUDA module."""
    if reason := kernel_resources.missing_cuda():
        pytest.skip(reason)
    return kernel_resources.build_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The module seme._C_cuda, compiled with cuda_emulator.h: it works on CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("g++ and pybind11 are needed")
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-include", EMULATOR]
    flags += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_one(source):
        target = folder / f"{source.name}.o"
        run([compiler, *flags, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*SOURCES.glob("*.cu"), SOURCES / "bindings.cpp"]))
    library = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([compiler, "-shared", *objects, "-o", library])
    spec = importlib.util.spec_from_file_location("seme._C_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("seme._C_cuda", None)
    return module


@pytest.fixture(scope="module")
def emulated(emulation):
    """seme.ops.cuda works on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native._loaded, "_C_cuda", emulation)
        patch.setattr(cuda, "_stream", lambda: (0, 0))
        yield emulation


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
