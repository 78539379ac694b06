"""Tensor dtypes without torch: names, safetensors codes, sizes, and scalar rounding.

The merge engine runs without importing torch (which costs a second and a quarter gigabyte),
so everything it needs to know about a dtype is here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seme.errors import SemeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: torch's name, e.g. ``bfloat16``.
        code: the safetensors code, e.g. ``BF16``.
        itemsize: bytes per element.
        native: number of the type in ``csrc/seme.h``; -1 if the kernels only move its bytes.
    """

    name: str
    code: str
    itemsize: int
    native: int = -1

    @property
    def mergeable(self) -> bool:
        """True for the four floating-point types that the kernels compute with."""
        return self.native >= 0

    def __str__(self) -> str:
        return self.name

    def to_torch(self) -> torch.dtype:
        """The torch dtype of the same name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


float32 = DType("float32", "F32", 4, 0)
float16 = DType("float16", "F16", 2, 1)
bfloat16 = DType("bfloat16", "BF16", 2, 2)
float64 = DType("float64", "F64", 8, 3)

_OTHERS = (
    DType("bool", "BOOL", 1),
    DType("uint8", "U8", 1),
    DType("int8", "I8", 1),
    DType("uint16", "U16", 2),
    DType("int16", "I16", 2),
    DType("uint32", "U32", 4),
    DType("int32", "I32", 4),
    DType("uint64", "U64", 8),
    DType("int64", "I64", 8),
    DType("float8_e4m3fn", "F8_E4M3", 1),
    DType("float8_e5m2", "F8_E5M2", 1),
    DType("float8_e8m0fnu", "F8_E8M0", 1),
    DType("complex64", "C64", 8),
)

BY_NAME = {d.name: d for d in (float32, float16, bfloat16, float64, *_OTHERS)}
BY_CODE = {d.code: d for d in BY_NAME.values()}
MERGEABLE = (float32, float16, bfloat16, float64)


def from_torch(dtype: torch.dtype) -> DType:
    """The :class:`DType` of a torch dtype; ``SemeError`` for types no checkpoint holds."""
    name = str(dtype).removeprefix("torch.")
    if name not in BY_NAME:
        raise SemeError(f"dtype {name} cannot be merged or stored; known: {', '.join(BY_NAME)}")
    return BY_NAME[name]


def why_equal(found: Iterable[DType]) -> str:
    """Why tensors of these dtypes, which are copied, must be the same in all models, and what to do if they are not."""
    float8 = next((d.name for d in found if d.name.startswith("float8")), None)
    if float8 is not None:
        return f"{float8} is copied, not merged; convert the models to bfloat16 first"
    return "tensors that are not floating point are copied and must be equal in all models; take them from one"


def promote(dtypes: list[DType]) -> DType:
    """The floating-point type that torch's promotion gives for several mergeable types."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return float64 if float64 in kinds else float32


def arithmetic(compute: DType) -> DType:
    """The type sums are held in: float64 for float64, else float32."""
    return float64 if compute == float64 else float32


def round_to(dtype: DType, value: float) -> float:
    """``value`` rounded to nearest even in ``dtype`` (as a tensor of that dtype would hold it)."""
    if dtype == float64:
        return float(value)
    single = ctypes.c_float(value).value
    if dtype == float32:
        return single
    if dtype == float16:
        try:
            return float(struct.unpack("<e", struct.pack("<e", single))[0])
        except OverflowError:
            return float("inf") if single > 0 else float("-inf")
    bits = struct.unpack("<I", struct.pack("<f", single))[0]
    if single != single or bits & 0x7F800000 == 0x7F800000:
        return single
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
