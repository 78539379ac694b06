"""seme/dtypes.py: names, codes and rounding agree with torch and with the safetensors library."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from seme import dtypes
from seme.checkpoint.safetensors import read_header
from seme.errors import SemeError


@pytest.mark.parametrize("dtype", dtypes.BY_NAME.values(), ids=str)
def test_every_dtype_is_torchs(dtype: dtypes.DType) -> None:
    assert dtype.to_torch().itemsize == dtype.itemsize
    assert dtypes.from_torch(dtype.to_torch()) is dtype
    assert dtypes.BY_CODE[dtype.code] is dtype
    assert dtype.mergeable == (dtype.name in ("float32", "float16", "bfloat16", "float64"))


@pytest.mark.parametrize("dtype", dtypes.BY_NAME.values(), ids=str)
def test_every_code_is_the_librarys(dtype: dtypes.DType, tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(3).to(dtype.to_torch())}, tmp_path / "m.safetensors")
    (stored,) = read_header(tmp_path / "m.safetensors")
    assert (stored.dtype, stored.shape, stored.nbytes) == (dtype, (3,), 3 * dtype.itemsize)


def test_a_dtype_that_no_checkpoint_holds() -> None:
    with pytest.raises(SemeError, match=r"^dtype complex128 cannot be merged or stored; known: float32, "):
        dtypes.from_torch(torch.complex128)


@pytest.mark.parametrize("a", dtypes.MERGEABLE, ids=str)
@pytest.mark.parametrize("b", dtypes.MERGEABLE, ids=str)
def test_promotion_is_torchs(a: dtypes.DType, b: dtypes.DType) -> None:
    assert dtypes.promote([a, b, a]).to_torch() == torch.promote_types(a.to_torch(), b.to_torch())


def test_sums_are_held_in_float32_or_float64() -> None:
    held = {str(d): str(dtypes.arithmetic(d)) for d in dtypes.MERGEABLE}
    assert held == {"float32": "float32", "float16": "float32", "bfloat16": "float32", "float64": "float64"}


def hard_numbers() -> list[float]:
    """Zeros, limits, subnormals, ties between neighbours of every dtype, and random bits."""
    limits = [0.0, -0.0, math.inf, -math.inf, 1e300, -1e300, 1e-300, 65504.0, 65519.9, 65520.0, 3.3895e38, 3.4e38]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-24, 1 + 3 * 2**-24, 2**-25, 3 * 2**-25]
    subnormal = [2.0**-149, 2.0**-150, 1.5 * 2.0**-149, 2.0**-133, 2.0**-134, 2.0**-24, 6e-8, 1e-40]
    rng = random.Random(1)
    bits = [struct.unpack("<f", struct.pack("<I", rng.getrandbits(32)))[0] for _ in range(500)]
    wide = [rng.gauss(0, 1) * 10 ** rng.uniform(-45, 39) for _ in range(500)]
    numbers = limits + ties + subnormal + [-x for x in ties + subnormal] + bits + wide
    return [x for x in numbers if x == x]


@pytest.mark.parametrize("dtype", dtypes.MERGEABLE, ids=str)
def test_scalars_round_as_torch_rounds_them(dtype: dtypes.DType) -> None:
    numbers = hard_numbers()
    # As csrc and torch do for a Python number: to float32 first.
    single = torch.tensor(numbers, dtype=torch.float64)
    single = single if dtype == dtypes.float64 else single.to(torch.float32)
    expected = single.to(dtype.to_torch()).double().tolist()
    found = [dtypes.round_to(dtype, x) for x in numbers]
    assert [struct.pack("<d", x) for x in found] == [struct.pack("<d", x) for x in expected]


@pytest.mark.parametrize("dtype", dtypes.MERGEABLE, ids=str)
def test_nan_stays_nan(dtype: dtypes.DType) -> None:
    assert math.isnan(dtypes.round_to(dtype, math.nan))
