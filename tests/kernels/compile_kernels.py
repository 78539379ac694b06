"""Compiles every Triton kernel for GPUs that are not there, and prints what the tests ask about, as JSON.

A program of its own, because Triton decides at its import whether kernels are compiled or interpreted.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from seme.kernels import (
    delta_gram,
    delta_project,
    elect,
    elect_select,
    importance_fusion,
    importance_histogram,
    inner_products,
    line_products,
    line_sum,
    magnitude_histogram,
    nearswap,
    nonfinite,
    overlap_counts,
    project_erase,
    ram,
    resolve,
    row_divergence,
    sce,
    selected_squares,
    semantic_energy,
    tables,
    task_vector_sum,
    tie_counts,
    ties,
    trimmed_l1,
    variance_histogram,
    variance_ties,
    weighted_gram,
    weighted_sum,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seme.native import BLOCK

# Compute dtype, types of the tensors, and of the integers: a number that is 1 becomes a constant of the kernel. Where
# it is not, the addresses, the number of elements and the rows are multiples of 16, as those of almost all weights are.
# The first is compiled for every GPU, the others for one each, in turns: see compiled_for().
VARIANTS = (
    ("bfloat16", ("*bf16", "*bf16", "*bf16"), "i32"),
    ("float16", ("*fp16", "*fp16", "*fp16"), "i64"),
    ("float32", ("*bf16", "*fp16", "*fp32"), "i64"),
    ("float32", ("*fp32", "*fp32"), 1),  # one task vector
    ("float64", ("*fp64", "*fp32", "*fp32"), "i32"),
)
GPUS = (80, 90)
TABLES = dict.fromkeys(("factors", "reals", "weights"), "*fp64") | dict.fromkeys(
    ("cuts", "draws", "integers", "tie_ends", "thresholds", "counts", "total"), "*i64"
)
INTEGERS = ("n", "offset", "i", "j", "count", "blocks", "length", "columns", "size", "first", "row")
# Others reduce, to float64.
WRITES = ("importance_fusion", "line_sum", "nearswap", "ram", "sce", "task_vector_sum", "ties", "weighted_sum")


def kernels(capability):
    """(name, kernel, constants, launch options) of every kernel, as the launchers call it."""

    def entry(name, kernel, block=None, **constants):
        shape = tables.FLAT[capability][name]
        shape = shape.holding(block or shape.elements)
        if name in ("inner_products", "selected_squares", "trimmed_l1"):
            constants |= {"BLOCK": BLOCK, "GROUP": shape.elements // BLOCK}
        else:
            constants["BLOCK"] = shape.elements
        return name, kernel, constants, shape.options()

    yield entry("weighted_sum", weighted_sum.weighted_sum_kernel)
    whole = {"CUTS": 0, "RANKED": False, "DRAWN": False, "ALIGNED": True}
    yield entry("task_vector_sum", task_vector_sum.task_vector_sum_kernel, **whole)
    yield entry("task_vector_sum", task_vector_sum.task_vector_sum_kernel, **whole | {"DRAWN": True})
    yield entry("inner_products", inner_products.inner_products_kernel)
    for relative in (0, 1):
        yield entry("line_products", line_products.line_products_kernel, RELATIVE=bool(relative), GROUP=4)
        yield entry("line_products", line_products.column_products_kernel, RELATIVE=bool(relative), WIDTH=256)
        for sets in ("row", "columns"):
            yield entry("line_sum", line_sum.line_sum_kernel, RELATIVE=relative, SETS=sets)
    yield entry("nearswap", nearswap.nearswap_kernel)
    yield entry("magnitude_histogram", magnitude_histogram.magnitude_histogram_kernel)
    yield entry("tie_counts", tie_counts.tie_counts_kernel, CUTS=1)
    yield entry("tie_counts", tie_counts.tie_counts_kernel, block=BLOCK, CUTS=2)  # before trimmed_l1
    for ranked in (False, True):
        selected = {"CUTS": 1 + ranked, "RANKED": ranked, "DRAWN": ranked, "ALIGNED": False}
        yield entry("ties", ties.ties_kernel, NORMALIZE=not ranked, **selected)
        yield entry("trimmed_l1", trimmed_l1.trimmed_l1_kernel, **selected)
        yield entry("sce", sce.sce_kernel, RANKED=ranked)
        yield entry("selected_squares", selected_squares.selected_squares_kernel, RANKED=ranked, I=0)
        yield entry("ram", ram.ram_kernel, ROUNDED=ranked)
    yield entry("variance_histogram", variance_histogram.variance_histogram_kernel)
    yield entry("variance_ties", variance_ties.variance_ties_kernel)
    yield entry("overlap_counts", overlap_counts.overlap_counts_kernel)
    yield entry("row_divergence", row_divergence.row_divergence_kernel, ROUNDED=True)
    yield entry("importance_histogram", importance_histogram.importance_histogram_kernel, WINDOWS=3)
    yield entry("importance_fusion", importance_fusion.importance_fusion_kernel)
    yield entry("nonfinite", nonfinite.nonfinite_kernel, EXPONENT=0x7C00)


def compiled_for(kernel, variant):
    """The GPUs that a kernel's variant is compiled for, from their numbers."""
    return GPUS if variant == 0 else (GPUS[(kernel + variant) % len(GPUS)],)


def compile_kernel(kernel, compute, tensors, integer, constants, launched, capability):
    """One kernel, from the types of its arguments by name."""
    types = {"tensors": tensors, "base": tensors[0], "x": tensors[-1], "y": tensors[0], **TABLES}
    types["out"] = tensors[-1] if kernel.__name__.removesuffix("_kernel") in WRITES else "*fp64"
    constants = {**constants, "COMPUTE": compute}
    if integer == 1:
        constants |= dict.fromkeys(INTEGERS, 1)
    else:
        types |= dict.fromkeys(INTEGERS, "i32") | {"n": integer}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {}
    for at, (name, kind) in enumerate(signature.items()):
        if integer != 1 and (name in MODELS or name in ("x", "y", "out", "n", "length", "columns", "row")):
            for place in [(at,)] if isinstance(kind, str) else [(at, i) for i in range(len(kind))]:
                attributes[place] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", capability, 32), options=launched
    )


# Of the matrix kernels: the operand of their products, what the models are stored as, and everything else; and of
# the rarer operands the one GPU that they are compiled for.
OPERANDS = {
    "bfloat16": ("*bf16", "*fp32"),
    "tf32": ("*fp16", "*fp32"),
    "float32": ("*fp32", "*fp32"),
    "float64": ("*fp64", "*fp64"),
    "tf32x3": ("*fp32", "*fp32"),
}
ONLY = {"float64": 80, "tf32": 90, "tf32x3": 90}
MODELS = ("base", "tensor", "tensors", "vectors")
NUMBERS = {"reals": "*fp64", "etas": "*fp64", "units": "*fp64", "parts": "*fp32"}
NUMBERS |= dict.fromkeys(("listed", "count", "window", "thresholds", "counts", "energies", "lists", "labels"), "*i64")
EXPERTS = 3


def matrix_kernels(operand, capability):
    """(name, kernel, constants, options) of the kernels with matrix products, as the launchers call them."""
    chosen = tables.for_triton(tables.TILES[capability][operand.removesuffix("x3")], operand)

    def entry(name, kernel, results=1, **constants):
        options = tables.shrink(chosen, results).options()
        launched = {k: options.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
        constants = {"OPERAND": operand, "MIRROR": True, **options, **constants}
        return name, kernel, {k: v for k, v in constants.items() if k in kernel.arg_names}, launched

    if operand in ("float32", "tf32x3"):
        yield entry("weighted_gram", weighted_gram.weighted_gram_kernel)
    if operand == "tf32x3":
        return
    yield entry("project_erase", project_erase.project_erase_kernel)
    yield entry("elect_select", elect_select.elect_select_kernel, results=EXPERTS)
    if operand == "float64":
        yield entry("elect_select", elect_select.squared_norm_kernel, BLOCK_M=8, BLOCK_N=256)
        yield entry("resolve", resolve.resolve_erase_kernel, K=16, BLOCK_K=32)
        yield entry("resolve", resolve.resolve_erase_kernel, K=64, BLOCK_K=32)
    if operand not in ("float32", "bfloat16"):
        return  # the others hold nothing that depends on the operand
    yield entry("delta_gram", delta_gram.delta_gram_kernel)
    yield entry("delta_project", delta_project.delta_project_kernel)
    yield entry("semantic_energy", semantic_energy.semantic_energy_kernel)
    yield entry("elect", elect.elect_combine_kernel, results=EXPERTS)
    yield entry("elect", elect.elect_recompose_kernel)
    yield entry("resolve", resolve.resolve_select_kernel, results=2, K=8)


def compile_matrix_kernel(kernel, operand, constants, launched, capability):
    """One kernel on matrices whose columns lie side by side, and whose sizes are multiples of 16."""
    model, other = OPERANDS[operand]
    signature, values, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[at,] = "constexpr", constants[name]
            continue
        column = name.endswith(("_column", "column_strides", "_columns"))
        pointer = name in MODELS or name in NUMBERS or name in ("matrix", "moment", "bases", "dual", "weights")
        pointer = pointer or name in ("projections", "out", "combined", "coefficients", "residual")
        kind = NUMBERS.get(name) or (model if name in MODELS else other)
        if name == "combined":
            kind = model if operand == "bfloat16" else other
        kind = kind if pointer else "constexpr" if column else "i32"
        length = {"tensors": EXPERTS + 1, "row_strides": EXPERTS + 1, "column_strides": EXPERTS + 1}.get(name)
        length = EXPERTS if name.startswith("projection") else length
        for place in [(at,)] if length is None else [(at, i) for i in range(length)]:
            if kind == "constexpr":
                values[place] = 1
            else:
                attributes[place] = [["tt.divisibility", 16]]
        signature[name] = kind if length is None else (kind,) * length
    return triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launched,
    )


def resources(cubin):
    """Registers per thread, and bytes of its stack (where registers are spilled to), from what the cubin says."""
    program = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK"))


def narrow_offsets(text):
    """Lines of an element-wise kernel's first form that compute with the number of the program in 32 bits.

    It is widened before anything else happens to it, and so are the offsets that are made from it.
    """
    found = []
    for program in re.findall(r"(%\S+) = tt\.get_program_id", text):
        uses = re.findall(rf"^.* = .*{re.escape(program)}\b.*$", text, flags=re.MULTILINE)
        found += [line for line in uses if "arith.extsi" not in line] or ([] if uses else ["it is not used"])
    return found


def narrow_addresses(text):
    """Lines of a matrix kernel's first form that add offsets of 32 bits to a tile of addresses."""
    return re.findall(
        r"^.*tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>.*$", text, flags=re.MULTILINE
    )


def describe(name, function, constants, compute, capability, compiled):
    """What the tests ask about every kernel."""
    assembly = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "kernel": name,
        "function": function,
        "constants": constants,
        "compute": compute,
        "capability": capability,
        "elf": compiled.asm["cubin"][:4] == b"\x7fELF",
        "target": re.findall(r"\.target (\w+)", assembly)[0],
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    element_wise, matrix = [], []
    for capability in map(int, sys.argv[1:]):
        for variant, (compute, tensors, integer) in enumerate(VARIANTS):
            for number, (name, kernel, constants, launched) in enumerate(kernels(capability)):
                if capability not in compiled_for(number, variant):
                    continue
                compiled = compile_kernel(kernel, compute, tensors, integer, constants, launched, capability)
                assembly = compiled.asm["ptx"]
                arithmetic = re.findall(r"\b[a-z]+(?:\.[a-z]+)*\.f(?:16x2|16|32|64)\b", assembly)
                accesses = re.findall(
                    r"\b(ld|st)\.global(?:\.[a-z_]+(?:::[a-z0-9_]+)*)*?((?:\.v\d)?\.b\d+)\b", assembly
                )
                element_wise.append(
                    {
                        **describe(name, kernel.__name__, constants, compute, capability, compiled),
                        "tensors": [kind.removeprefix("*") for kind in tensors],
                        "integer": str(integer),
                        "writes": name in WRITES,
                        "float_instructions": sorted(set(arithmetic)),
                        "accesses": sorted({"".join(access) for access in accesses}),
                        "narrow_offsets": narrow_offsets(compiled.asm["ttir"]),
                    }
                )
        for operand in OPERANDS:
            if ONLY.get(operand, capability) != capability:
                continue
            for name, kernel, constants, launched in matrix_kernels(operand, capability):
                compiled = compile_matrix_kernel(kernel, operand, constants, launched, capability)
                products = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\.[a-z0-9_.]+", compiled.asm["ptx"])
                found = describe(name, kernel.__name__, constants, operand, capability, compiled)
                narrow = narrow_addresses(compiled.asm["ttir"])
                matrix.append({**found, "products": sorted(set(products)), "narrow_offsets": narrow})
    json.dump({"triton": triton.__version__, "kernels": element_wise, "matrix": matrix}, sys.stdout)


if __name__ == "__main__":
    main()
