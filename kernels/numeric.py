"""Loads, stores and rounding for the kernels: the only place that casts.

bfloat16 is handled by its bits, on the GPU as in the interpreter: Triton's interpreter truncates when it
stores bfloat16, and what is tested must be what runs. All roundings are to nearest even.

The compute dtype is a string constexpr: "float32", "float16", "bfloat16" or "float64". Arithmetic is done in
float64 for "float64", else in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bf16_bits(x):
    """The bfloat16 nearest to a float32, as uint16 bits; NaN becomes 0x7FC0."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def round_to(x, COMPUTE: tl.constexpr):
    """x rounded to the compute dtype, held in the arithmetic type."""
    if COMPUTE == "bfloat16":
        return (_bf16_bits(x).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif COMPUTE == "float16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def load(ptr, offsets, mask, COMPUTE: tl.constexpr):
    """Elements at `offsets`, rounded to the compute dtype, in the arithmetic type; 0 where masked."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = tl.load(ptr.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if COMPUTE == "float64":
        return x.to(tl.float64)
    else:
        return round_to(x.to(tl.float32), COMPUTE)


@triton.jit
def store(ptr, offsets, x, mask):
    """x at `offsets`, rounded to the element type of the pointer; a double goes by way of float32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr.to(tl.pointer_type(tl.uint16)) + offsets, _bf16_bits(x.to(tl.float32)), mask=mask)
    elif ptr.dtype.element_ty == tl.float16:
        tl.store(ptr + offsets, x.to(tl.float32).to(tl.float16), mask=mask)
    else:
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded; Triton's `/` on float32 is an approximation on the GPU."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y
