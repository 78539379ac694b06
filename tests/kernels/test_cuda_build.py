"""The CUDA module builds for sm_80, sm_90a and later GPUs, loads without a driver and needs no torch.

Its element-wise kernels round every operation, and access memory in 16 bytes.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.kernel_resources import output

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
MATRIX = {"elect", "resolve"}
BOUNDED = {"row_divergence"}  # held to an error bound: exp and log may use what they like, and take longer than access
DIVIDE = {"importance", "line_sum"}  # for an element's row; a division of 64 bits tries the low words first
WRITES = re.compile(
    r"\d(importance_fusion|line_sum|nearswap|ram|sce|task_vector_sum|ties|weighted_sum)_kernel"
)  # the others write a few numbers
GPUS = ("sm_80", "sm_90a")


def test_every_source_is_compiled_for_both_gpus(built):
    assert set(built.assembly) == {(source, gpu) for source in SOURCES for gpu in GPUS}


def test_code_for_both_gpus_and_assembly_for_later_ones(built):
    """The module holds machine code of sm_80 and sm_90a; and the PTX of sm_80, which any later GPU can take."""
    program = cuobjdump()
    if program is None:
        pytest.skip("cuobjdump is not installed")
    code = re.findall(r"\.(sm_\w+)\.cubin", output([program, "--list-elf", built.module]))
    assembly = re.findall(r"\.(sm_\w+)\.ptx", output([program, "--list-ptx", built.module]))
    assert sorted(code) == sorted(gpu for gpu in GPUS for _ in SOURCES)
    assert assembly == ["sm_80"] * len(SOURCES)


def cuobjdump():
    """The program of CUDA, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return bundled if bundled and bundled.exists() else None


def test_every_operation_is_rounded_on_its_own(built):
    seen = set()
    for where, text in built.assembly.items():
        if where[0] in BOUNDED:
            continue
        for instruction in re.findall(r"\b(?:fma|mad|add|sub|mul|div|rcp)\.[a-z.]*f(?:16x2|16|32|64)\b", text):
            name, rounding, *rest = instruction.split(".")
            seen.add(name)
            assert (name, rounding) in {(n, "rn") for n in ("add", "sub", "mul", "div", "rcp")}, (instruction, where)
            assert "ftz" not in rest, (instruction, where)
    assert seen - {"rcp"} == {"add", "sub", "mul", "div"}


def test_products_run_on_the_tensor_cores(built):
    """Those of bfloat16 operands; by `mma.sync` on Hopper too, see docs/gpu.md."""
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    for gpu in GPUS:
        for source in MATRIX:
            kernels = functions(built.assembly[source, gpu])
            on_cores = {name for name, body in kernels.items() if product in body}
            assert on_cores == {name for name in kernels if "TensorCores" in name}
            assert on_cores


def functions(text):
    """The kernels of a PTX file: name, and all that belongs to it."""
    parts = re.split(r"^(?:\.visible )?\.entry (\w+)\(", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_tensors_are_accessed_in_16_bytes(built):
    """By every element-wise kernel that rounds each operation, where the addresses allow. Those that take any dtype
    have a branch for each, and a thread's 8 elements are 1 such access of 16-bit numbers, 2 of float32, 4 of float64.
    """
    for gpu in GPUS:
        for source in SOURCES - MATRIX - BOUNDED:
            for name, body in functions(built.assembly[source, gpu]).items():
                loads = len(re.findall(r"\bld\.global(?:\.nc)?\.v(?:4\.[bfu]32|2\.[bfu]64)", body))
                stores = len(re.findall(r"\bst\.global\.v(?:4\.[bfu]32|2\.[bfu]64)", body))
                assert loads >= (1 if source == "nonfinite" else 8), (name, gpu)
                assert stores >= (8 if WRITES.search(name) else 0), (name, gpu)


def test_offsets_are_64_bits_wide(built):
    """A tensor may have more than 2^31 elements: a block's number is widened before it becomes an offset."""
    for gpu in GPUS:
        for source in SOURCES - MATRIX:
            widening = ("mul.wide.u32", "cvt.u64.u32", "setp", *(("shl.b32",) if source in DIVIDE else ()))
            for name, body in functions(built.assembly[source, gpu]).items():
                blocks = "|".join(re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x;", body))
                uses = re.findall(rf"^\s*(\S+)\s[^;,]*,[^;]*(?:{blocks})\b[^;]*;", body, flags=re.MULTILINE)
                assert uses, (name, gpu)
                for instruction in uses:
                    assert instruction.startswith(widening), (instruction, name, gpu)


def test_the_module_loads_without_a_driver_and_without_torch(built):
    script = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("seme._C_cuda", {str(built.module)!r})
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
    for program in ("nm", "ldd"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    symbols = output(["nm", "--dynamic", built.module])
    assert re.search(r"torch|\bc10::|_ZNK?3c10|\bat::|_ZNK?2at", symbols) is None
    assert re.search(r"torch|libcud|libc10", output(["ldd", built.module])) is None
