"""Loads, stores and rounding for the kernels: the only place that casts.

bfloat16 is handled by its bits, on the GPU as in the interpreter: Triton's interpreter truncates when it
stores bfloat16, and what is tested must be what runs. All roundings are to nearest even.

The compute dtype is a string constexpr: "float32", "float16", "bfloat16" or "float64". Arithmetic is done in
float64 for "float64", else in float32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Before 3.6, tl.div_rn compiles to div.rn.ftz: subnormal numbers become zero on the GPU.
_DIV_RN_FLUSHES = tl.constexpr(tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 6))


# Before 3.5, tl.dot does not take float64. All terms of a tile of the product are then held at once: 2^14 at most.
DOT_TAKES_FLOAT64 = tl.constexpr(tuple(int(v) for v in triton.__version__.split(".")[:2]) >= (3, 5))
FLOAT64_TERMS = 1 << 14

# tl.dot of bfloat16 is wrong in the interpreter: there, operands are float32 numbers that bfloat16 can hold.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
def held(x, COMPUTE: tl.constexpr):
    """A float64 scalar that is exact in the arithmetic type, in the arithmetic type."""
    if COMPUTE == "float64":
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def load(ptr, offsets, mask, COMPUTE: tl.constexpr):
    """Elements at `offsets`, rounded to the compute dtype, in the arithmetic type; 0 where masked."""
    stored: tl.constexpr = ptr.dtype.element_ty
    if stored == tl.bfloat16:
        bits = tl.load(ptr.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if COMPUTE == "float64":
        return x.to(tl.float64)
    elif (COMPUTE == "bfloat16" and stored == tl.bfloat16) or (COMPUTE == "float16" and stored == tl.float16):
        return x.to(tl.float32)  # every value is one of the compute dtype
    else:
        return round_to(x.to(tl.float32), COMPUTE)


@triton.jit
def load_bits(ptr, offsets, mask):
    """The bits of the elements at `offsets` as they are stored, as an unsigned integer; 0 where masked."""
    if ptr.dtype.element_ty == tl.float64:
        return tl.load(ptr.to(tl.pointer_type(tl.uint64)) + offsets, mask=mask, other=0)
    elif ptr.dtype.element_ty == tl.float32:
        return tl.load(ptr.to(tl.pointer_type(tl.uint32)) + offsets, mask=mask, other=0)
    else:
        return tl.load(ptr.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)


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
    if x.dtype == tl.float64:
        return x / y
    elif _DIV_RN_FLUSHES:
        # Slower, and the same: float64 has more than twice the digits, so rounding twice loses nothing.
        return (x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)
    else:
        return tl.div_rn(x, y)


@triton.jit
def magnitude_key(x, COMPUTE: tl.constexpr):
    """The bits of |x| in the compute dtype, as int32 (int64 for float64): they grow with the magnitude.

    NaN has one key, the greatest.
    """
    if COMPUTE == "float64":
        return tl.minimum(x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF8000000000000)
    elif COMPUTE == "float16":
        return tl.minimum((x.to(tl.float16).to(tl.uint16, bitcast=True) & 0x7FFF).to(tl.int32), 0x7E00)
    elif COMPUTE == "bfloat16":
        return (x.to(tl.int32, bitcast=True) >> 16) & 0x7FFF
    else:
        return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FC00000)


@triton.jit
def key_bound(bound, COMPUTE: tl.constexpr):
    """A bound on keys, int64, as the type that keys have; one beyond all keys stays beyond them."""
    if COMPUTE == "float64":
        return bound
    else:
        return tl.minimum(bound, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def fold_lanes(lanes, GROUP: tl.constexpr):
    """The sums of GROUP times 64 lanes by halving: lane j takes lane j + 32, then j + 16, ... j + 1."""
    lanes = tl.sum(tl.reshape(lanes, [GROUP, 2, 32]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [GROUP, 2, 16]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [GROUP, 2, 8]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [GROUP, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [GROUP, 2, 2]), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit
def accumulator(M: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr):
    """Zeros [M, N] in the type that products of these operands are summed in."""
    return tl.zeros([M, N], dtype=tl.float64 if OPERAND == "float64" else tl.float32)


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """x, float32 (float64), as a matrix product takes it.

    OPERAND: "bfloat16" and "tf32" (11 significant bits in a float32) round x to nearest even, for the tensor cores;
    "float32" and "float64" leave it as it is, and so does "tf32x3", with which the tensor cores form three products
    of the parts of float32 numbers. The products are summed in float32, in float64 for "float64".
    """
    if OPERAND == "bfloat16":
        return round_to(x, "bfloat16") if _INTERPRETED else x.to(tl.bfloat16)
    elif OPERAND == "tf32":
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
        return tl.where((u & 0x7F800000) == 0x7F800000, u, rounded).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def lost(x, taken):
    """What :func:`operand` took away from x: x - taken, which is exact."""
    return x - taken.to(tl.float32)


@triton.jit
def product(a, b, total, OPERAND: tl.constexpr):
    """total + a @ b, for two operands."""
    if OPERAND == "float64" and not DOT_TAKES_FLOAT64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif OPERAND == "bfloat16":
        return tl.dot(a, b, total)
    elif OPERAND == "tf32" or OPERAND == "tf32x3":
        return tl.dot(a, b, total, input_precision=OPERAND)
    else:
        return tl.dot(a, b, total, input_precision="ieee")
