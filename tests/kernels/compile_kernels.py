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

# Compute dtype, and the tensors a kernel gets: the base or first one, then the others.
VARIANTS = {
    "bfloat16": ("*bf16", "*bf16", "*bf16"),
    "float16": ("*fp16", "*fp16"),
    "float32": ("*bf16", "*fp16", "*fp32"),
    "float64": ("*fp64", "*fp32"),
}
TIES = {"reals": "*fp64", "integers": "*i64", "tie_ends": "*i64", "n": "i64", "blocks": "i32"}
TRIMMED = {
    "integers": "*i64",
    "tie_ends": "*i64",
    "out": "*fp64",
    "n": "i64",
    "i": "i32",
    "count": "i32",
    "blocks": "i32",
}


def kernels(compute, tensors):
    """(name, kernel, signature, constants, warps) of every kernel for one variant."""
    first, last = tensors[0], tensors[-1]
    big, row = {"COMPUTE": compute, "BLOCK": 1024}, {"COMPUTE": compute, "BLOCK": 8192}
    sums = {"tensors": tensors, "reals": "*fp64", "out": last, "n": "i64"}
    yield "weighted_sum", weighted_sum.weighted_sum_kernel, sums, big, 4
    yield "task_vector_sum", task_vector_sum.task_vector_sum_kernel, sums, big, 4
    products = {"x": first, "y": last, "out": "*fp64", "n": "i64", "i": "i32", "j": "i32", "count": "i32"}
    yield "inner_products", inner_products.inner_products_kernel, products, row, 1
    counts = {"tensors": tensors, "counts": "*i64", "n": "i64"}
    histogram = magnitude_histogram.magnitude_histogram_kernel
    yield "magnitude_histogram", histogram, {**counts, "integers": "*i64"}, big, 4
    yield "tie_counts", tie_counts.tie_counts_kernel, {**counts, "thresholds": "*i64", "blocks": "i32"}, big, 4
    for ranked in (False, True):
        constants = {**big, "RANKED": ranked, "NORMALIZE": not ranked}
        yield f"ties-{ranked}", ties.ties_kernel, {**TIES, "tensors": tensors, "out": last}, constants, 4
        constants = {**row, "RANKED": ranked}
        yield f"trimmed_l1-{ranked}", trimmed_l1.trimmed_l1_kernel, {**TRIMMED, "base": first, "x": last}, constants, 1
    if len(set(tensors)) == 1:
        bits = {"x": first, "count": "*i64", "n": "i64"}
        yield "nonfinite", nonfinite.nonfinite_kernel, bits, {"EXPONENT": 0x7C00, "BLOCK": 4096}, 4


def main() -> None:
    found = []
    for capability in map(int, sys.argv[1:]):
        for compute, tensors in VARIANTS.items():
            for name, kernel, signature, constants, warps in kernels(compute, tensors):
                types = {**signature, **dict.fromkeys(constants, "constexpr")}
                values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
                compiled = triton.compile(
                    ASTSource(kernel, types, values),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": warps, "enable_fp_fusion": False},
                )
                assembly = compiled.asm["ptx"]
                found.append(
                    {
                        "kernel": name,
                        "compute": compute,
                        "capability": capability,
                        "elf": compiled.asm["cubin"][:4] == b"\x7fELF",
                        "target": re.findall(r"\.target (\w+)", assembly)[0],
                        "float_instructions": sorted(set(re.findall(r"\b[a-z]+(?:\.[a-z]+)*\.f(?:32|64)\b", assembly))),
                    }
                )
    json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)


if __name__ == "__main__":
    main()
