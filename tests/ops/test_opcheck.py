"""torch's own checks of the registered ops: schema, fake kernel, autograd registration, tracing."""

import pytest
import torch

from seme import dtypes
from seme.ops import library
from seme.ops._op import Spec
from seme.ops._registry import OPS
from tests.kernels.cases import calls, make_tensors


def sample(name):
    tensors = [t.clamp(-10, 10) for t in make_tensors(name, 60, (dtypes.float32,), count=3)]
    tensors, arguments = calls(name, tensors, dtypes.float32)[-1]
    op = OPS[name]
    split = (tensors[0], tensors[1:]) if op.has_base else (tensors,)
    specs = [Spec(tuple(t.shape), dtypes.float32) for t in tensors]
    result = op.result(specs, op.check(specs, **arguments))
    return split, arguments, torch.zeros(result.shape, dtype=result.dtype.to_torch())


@pytest.mark.parametrize("name", OPS)
def test_functional(name):
    split, arguments, _ = sample(name)
    torch.library.opcheck(library.packet(name).default, split, arguments)


@pytest.mark.parametrize("name", OPS)
def test_out(name):
    split, arguments, out = sample(name)
    torch.library.opcheck(library.packet(name).out, split, {**arguments, "out": out})


def test_fake_kernels_check_as_the_kernels_do():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from seme.errors import OpError

    with FakeTensorMode():
        tensors = [torch.empty(3), torch.empty(4)]
        with pytest.raises(OpError, match=r"weighted_sum: tensor 1 has shape \[4\], tensor 0 has \[3\]"):
            torch.ops.seme.weighted_sum(tensors, weights=[1.0, 1.0])
        good = torch.ops.seme.weighted_sum([torch.empty(3), torch.empty(3)], weights=[1.0, 1.0])
        assert good.shape == (3,)
