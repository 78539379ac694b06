"""The CUDA kernels, compiled for the CPU by an emulator (cuda_emulator.h), give the bits of the reference.

So their arithmetic, masks, order of summation and barriers are tested where there is no GPU.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from seme import dtypes, native
from seme.ops import cuda
from seme.ops._registry import OPS

from .cases import DTYPES, calls, check_bits, compare, make_tensors

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
EMULATOR = Path(__file__).with_name("cuda_emulator.h")


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """seme.ops.cuda works on CPU tensors."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native._loaded, "_C_cuda", module)
        patch.setattr(cuda, "_stream", lambda: (0, 0))
        yield module
    sys.modules.pop("seme._C_cuda", None)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_bits(name, dtype):
    stored, compute = DTYPES[dtype]
    sizes = (0, 1, 7, 8, 63, 1023, 8191, 8193)
    for numel in sizes if name != "magnitude_histogram" else sizes[::3]:  # whose reference is slow
        tensors = make_tensors(name, numel, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


@pytest.mark.parametrize("name", OPS)
def test_bits_of_unaligned_memory(name):
    stored, compute = DTYPES["mixed-in-bf16"]
    for offset in (1, 3):
        tensors = [t[offset:] for t in make_tensors(name, 2050 + offset, stored)]
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


def test_quotas_over_many_blocks():
    stored, compute = DTYPES["bf16"]
    for name in ("ties", "trimmed_l1"):
        tensors = make_tensors(name, 65537, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


@pytest.mark.parametrize("dtype", ["bf16", "bf16-in-f32"])
def test_histogram_in_shared_memory(dtype):
    stored, compute = DTYPES[dtype]
    tensors = make_tensors("magnitude_histogram", (1 << 20) + 13, stored, count=3)
    for chosen, arguments in calls("magnitude_histogram", tensors, compute)[:2]:
        compare(cuda.magnitude_histogram, "magnitude_histogram", chosen, arguments, compute)


def test_output_dtypes():
    tensors = make_tensors("weighted_sum", 1023, (dtypes.float64,))
    call = {"weights": [1.0] * 4, "divisor": 3.0, "compute_dtype": dtypes.float32}
    for out_dtype in dtypes.MERGEABLE:
        expected = OPS["weighted_sum"].reference(tensors, **call).to(out_dtype.to_torch())
        for offset in (0, 1):
            out = torch.full((1024,), 7.0, dtype=out_dtype.to_torch())[offset:][:1023]
            cuda.weighted_sum(tensors, out, **call)
            check_bits(out, expected)


def test_in_place():
    tensors = make_tensors("weighted_sum", 4099, (dtypes.float32,))
    expected = OPS["weighted_sum"](tensors, weights=[1.0, 2.0, 3.0, 4.0], backend="torch")
    cuda.weighted_sum(tensors, tensors[2], weights=[1.0, 2.0, 3.0, 4.0], divisor=1.0, compute_dtype=dtypes.float32)
    check_bits(tensors[2], expected)


def test_wrong_calls_are_refused(emulated):
    view = (64, 10, 0)
    with pytest.raises(ValueError, match="at most 64 tensors, got 65"):
        emulated.weighted_sum([view] * 65, [1.0] * 65, 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="weights: 1 expected, got 2"):
        emulated.weighted_sum([view], [1.0, 2.0], 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="differ in size"):
        emulated.weighted_sum([view, (64, 9, 0)], [1.0, 2.0], 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="elements of out: 10 expected, got 9"):
        emulated.weighted_sum([view], [1.0], 1.0, 0, (64, 9, 0), (0, 0))
    with pytest.raises(ValueError, match="null address"):
        emulated.nonfinite([(0, 10, 0)], (64, 1, -1), (0, 0))
    with pytest.raises(ValueError, match="dtype code 4 is not"):
        emulated.nonfinite([(64, 10, 4)], (64, 1, -1), (0, 0))
    with pytest.raises(ValueError, match="tie_ends: 1 expected, got 2"):
        emulated.trimmed_l1([view, view], [0], [1], (64, 2, -1), 0, (64, 2, 3), (0, 0))
