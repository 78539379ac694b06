"""Registration of the ops with ``torch.library``: ``torch.ops.seme.<name>`` and ``torch.ops.seme.<name>.out``.

Importing this module imports torch. One implementation serves CPU and CUDA: it checks, chooses the backend
and runs it. The fake kernels run the same check, so a wrong call fails under ``torch.compile`` as in eager.
"""

from __future__ import annotations

from typing import Any

import torch

from seme import dtypes
from seme.errors import OpError
from seme.ops._matrix import MatrixOp
from seme.ops._op import Op, Params, Spec
from seme.ops._registry import MATRIX_OPS, OPS

_library = torch.library.Library("seme", "DEF")


def packet(name: str) -> Any:
    """The overload packet ``torch.ops.seme.<name>``."""
    return getattr(torch.ops.seme, name)


def _spec(tensor: torch.Tensor) -> Spec:
    return Spec(tuple(tensor.shape), dtypes.from_torch(tensor.dtype))


class _Call:
    """The arguments of one dispatcher call, bound to their names, checked."""

    def __init__(self, op: Op | MatrixOp, bound: dict[str, Any]) -> None:
        self.op = op
        self.backend: str = bound.pop("backend")
        self.threads: int = bound.pop("threads")
        self.operands = [bound.pop(name) for name in op.operand_names]
        self.outs = [bound.pop(name) for name in op.results if name in bound]
        tensors = _flat(self.operands) + self.outs
        if len({t.device for t in tensors}) > 1:
            devices = " and ".join(sorted({str(t.device) for t in tensors}))
            raise OpError(f"{op.name}: tensors on {devices}; one device expected")
        for name in ("compute_dtype", "out_dtype"):
            if isinstance(bound.get(name), torch.dtype):
                bound[name] = dtypes.from_torch(bound[name])
        if self.outs and "out_dtype" in bound:
            bound["out_dtype"] = dtypes.from_torch(self.outs[0].dtype)
        self.params: Params
        self.results: tuple[Spec, ...]
        if isinstance(op, MatrixOp):
            specs = [[_spec(t) for t in o] if isinstance(o, list) else _spec(o) for o in self.operands]
            self.params, self.results = op.check(*specs, **bound)
        else:
            flat = [_spec(t) for t in _flat(self.operands)]
            self.params = op.check(flat, **bound)
            self.results = (op.result(flat, self.params),)
        self.params.pop("out_dtype", None)
        for name, out, expected in zip(op.results, self.outs, self.results):
            found = _spec(out)
            if found != expected:
                raise OpError(
                    f"{op.name}: {name} is {list(found.shape)} {found.dtype}, "
                    f"expected {list(expected.shape)} {expected.dtype}"
                )

    def allocate(self) -> None:
        new = torch.zeros if self.op.accumulates else torch.empty
        device = _flat(self.operands)[0].device
        self.outs = [new(spec.shape, dtype=spec.dtype.to_torch(), device=device) for spec in self.results]

    def run(self) -> None:
        if isinstance(self.op, MatrixOp):
            self.op.run(self.operands, self.outs, self.backend, self.threads, self.params)
        else:
            self.op.run(_flat(self.operands), self.outs[0], self.backend, self.threads, self.params)

    def returned(self) -> Any:
        return self.outs[0] if len(self.outs) == 1 else tuple(self.outs)


def _flat(operands: list[Any]) -> list[torch.Tensor]:
    return [t for o in operands for t in (o if isinstance(o, list) else [o])]


def _register(op: Op | MatrixOp) -> None:
    returns = ["Tensor"] * len(op.results)
    _library.define(f"{op.name}({op.schema}) -> {returns[0] if len(returns) == 1 else '(' + ', '.join(returns) + ')'}")
    # An out variant's dtype is that of `out`, so it takes no out_dtype.
    outs = ", ".join(f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(op.results))
    taken = op.schema.replace("ScalarType? out_dtype=None, ", "")
    _library.define(f"{op.name}.out({taken}, {outs}) -> ()")
    overloads = {"": getattr(torch.ops.seme, op.name).default, ".out": getattr(torch.ops.seme, op.name).out}
    for suffix, overload in overloads.items():
        arguments = overload._schema.arguments
        names = [a.name for a in arguments if not a.kwarg_only]
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        if suffix == ".out":
            if "out_dtype" in op.schema:
                defaults["out_dtype"] = None

            def out_impl(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> None:
                _Call(op, {**defaults, **dict(zip(names, args)), **kwargs}).run()

            def out_fake(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> None:
                _Call(op, {**defaults, **dict(zip(names, args)), **kwargs})

            impl, fake = out_impl, out_fake
        else:

            def functional(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> Any:
                call = _Call(op, {**defaults, **dict(zip(names, args)), **kwargs})
                call.allocate()
                call.run()
                return call.returned()

            def fake_functional(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> Any:
                call = _Call(op, {**defaults, **dict(zip(names, args)), **kwargs})
                call.allocate()
                return call.returned()

            impl, fake = functional, fake_functional
        for key in ("CPU", "CUDA"):
            _library.impl(op.name + suffix, impl, key)
        torch.library.register_fake(f"seme::{op.name}{suffix}", fake, lib=_library)


for _op in OPS.values():
    _register(_op)
for _matrix_op in MATRIX_OPS.values():
    _register(_matrix_op)
