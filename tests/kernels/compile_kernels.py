"""Compiles every Triton kernel for GPUs that are not there, and prints what the tests ask about, as JSON.

A program of its own, because Triton decides at its import whether kernels are compiled or interpreted.
"""

import json
import re
import sys

import triton
from seme.kernels import (
    inner_products,
    magnitude_histogram,
    nonfinite,
    task_vector_sum,
    tie_counts,
    ties,
    trimmed_l1,
    weighted_sum,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute dtype, types of the tensors, and of the integers: a number that is 1 becomes a constant of the kernel.
VARIANTS = (
    ("bfloat16", ("*bf16", "*bf16", "*bf16"), "i32"),
    ("float16", ("*fp16", "*fp16"), "i64"),
    ("float32", ("*bf16", "*fp16", "*fp32"), "i64"),
    ("float32", ("*fp32", "*fp32"), 1),
    ("float64", ("*fp64", "*fp32"), "i32"),
)
TABLES = {"reals": "*fp64"} | dict.fromkeys(("integers", "thresholds", "tie_ends", "counts", "total"), "*i64")
INTEGERS = ("n", "i", "j", "count", "blocks")


def kernels():
    """(name, kernel, constants, warps) of every kernel, as the launchers call it."""
    yield "weighted_sum", weighted_sum.weighted_sum_kernel, {"BLOCK": 1024}, 4
    yield "task_vector_sum", task_vector_sum.task_vector_sum_kernel, {"BLOCK": 1024}, 4
    yield "inner_products", inner_products.inner_products_kernel, {"BLOCK": 8192}, 1
    yield "magnitude_histogram", magnitude_histogram.magnitude_histogram_kernel, {"BLOCK": 1024}, 4
    yield "tie_counts", tie_counts.tie_counts_kernel, {"BLOCK": 1024}, 4
    for ranked in (False, True):
        yield "ties", ties.ties_kernel, {"BLOCK": 1024, "RANKED": ranked, "NORMALIZE": not ranked}, 4
        yield "trimmed_l1", trimmed_l1.trimmed_l1_kernel, {"BLOCK": 8192, "RANKED": ranked}, 1
    yield "nonfinite", nonfinite.nonfinite_kernel, {"BLOCK": 4096, "EXPONENT": 0x7C00}, 4


def compile_kernel(kernel, compute, tensors, integer, constants, warps, capability):
    """One kernel, from the types of its arguments by name."""
    types = {"tensors": tensors, "base": tensors[0], "x": tensors[-1], "y": tensors[0], **TABLES}
    types["out"] = tensors[-1] if "tensors" in kernel.arg_names else "*fp64"
    constants = {**constants, "COMPUTE": compute}
    if integer == 1:
        constants |= dict.fromkeys(INTEGERS, 1)
    else:
        types |= dict.fromkeys(INTEGERS, "i32") | {"n": integer}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def main() -> None:
    found = []
    for capability in map(int, sys.argv[1:]):
        for compute, tensors, integer in VARIANTS:
            for name, kernel, constants, warps in kernels():
                compiled = compile_kernel(kernel, compute, tensors, integer, constants, warps, capability)
                assembly = compiled.asm["ptx"]
                arithmetic = re.findall(r"\b[a-z]+(?:\.[a-z]+)*\.f(?:16x2|16|32|64)\b", assembly)
                found.append(
                    {
                        "kernel": name,
                        "constants": constants,
                        "compute": compute,
                        "capability": capability,
                        "elf": compiled.asm["cubin"][:4] == b"\x7fELF",
                        "target": re.findall(r"\.target (\w+)", assembly)[0],
                        "float_instructions": sorted(set(arithmetic)),
                    }
                )
    json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)


if __name__ == "__main__":
    main()
