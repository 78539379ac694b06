"""Registration of the ops with ``torch.library``: ``torch.ops.seme.<name>`` and ``torch.ops.seme.<name>.out``.

Importing this module imports torch. One implementation serves CPU and CUDA: it checks, chooses the backend
and runs it. The fake kernels run the same check, so a wrong call fails under ``torch.compile`` as in eager.
"""

from __future__ import annotations

from typing import Any

import torch

from seme import dtypes
from seme.errors import OpError
from seme.ops._op import Op, Params, Spec
from seme.ops._registry import OPS

_library = torch.library.Library("seme", "DEF")


def packet(name: str) -> Any:
    """The overload packet ``torch.ops.seme.<name>``."""
    return getattr(torch.ops.seme, name)


def _spec(tensor: torch.Tensor) -> Spec:
    return Spec(tuple(tensor.shape), dtypes.from_torch(tensor.dtype))


class _Call:
    """The arguments of one dispatcher call, bound to their names, checked."""

    def __init__(self, op: Op, names: list[str], defaults: dict[str, Any], args: Any, kwargs: Any) -> None:
        bound = {**defaults, **dict(zip(names, args)), **kwargs}
        self.backend: str = bound.pop("backend")
        self.threads: int = bound.pop("threads")
        self.out: torch.Tensor | None = bound.pop("out", None)
        base = [bound.pop("base")] if op.has_base else []
        self.tensors: list[torch.Tensor] = base + list(bound.pop("tensors"))
        devices = {t.device for t in self.tensors} | ({self.out.device} if self.out is not None else set())
        if len(devices) > 1:
            raise OpError(f"{op.name}: tensors on {' and '.join(sorted(map(str, devices)))}; one device expected")
        for name in ("compute_dtype", "out_dtype"):
            if isinstance(bound.get(name), torch.dtype):
                bound[name] = dtypes.from_torch(bound[name])
        self.specs = [_spec(t) for t in self.tensors]
        if self.out is not None and "out_dtype" in bound:
            bound["out_dtype"] = dtypes.from_torch(self.out.dtype)
        self.params: Params = op.check(self.specs, **bound)
        self.result = op.result(self.specs, self.params)
        self.params.pop("out_dtype", None)
        if self.out is not None and _spec(self.out) != self.result:
            found = _spec(self.out)
            raise OpError(
                f"{op.name}: out is {list(found.shape)} {found.dtype}, "
                f"expected {list(self.result.shape)} {self.result.dtype}"
            )

    def allocate(self, op: Op) -> torch.Tensor:
        new = torch.zeros if op.accumulates else torch.empty
        device = self.tensors[0].device
        return new(self.result.shape, dtype=self.result.dtype.to_torch(), device=device)


def _register(op: Op) -> None:
    _library.define(f"{op.name}({op.schema}) -> Tensor")
    # An out variant's dtype is that of `out`, so it takes no out_dtype.
    _library.define(f"{op.name}.out({op.schema.replace('ScalarType? out_dtype=None, ', '')}, Tensor(a!) out) -> ()")
    overloads = {"": getattr(torch.ops.seme, op.name).default, ".out": getattr(torch.ops.seme, op.name).out}
    for suffix, overload in overloads.items():
        arguments = overload._schema.arguments
        names = [a.name for a in arguments if not a.kwarg_only]
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        if suffix == ".out":
            if "out_dtype" in op.schema:
                defaults["out_dtype"] = None

            def out_impl(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> None:
                call = _Call(op, names, defaults, args, kwargs)
                assert call.out is not None
                op.run(call.tensors, call.out, call.backend, call.threads, call.params)

            def out_fake(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> None:
                _Call(op, names, defaults, args, kwargs)

            impl, fake = out_impl, out_fake
        else:

            def functional(*args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any) -> torch.Tensor:
                call = _Call(op, names, defaults, args, kwargs)
                out = call.allocate(op)
                op.run(call.tensors, out, call.backend, call.threads, call.params)
                return out

            def fake_functional(
                *args: Any, names: Any = names, defaults: Any = defaults, **kwargs: Any
            ) -> torch.Tensor:
                call = _Call(op, names, defaults, args, kwargs)
                return call.allocate(op)

            impl, fake = functional, fake_functional  # type: ignore[assignment]
        for key in ("CPU", "CUDA"):
            _library.impl(op.name + suffix, impl, key)
        torch.library.register_fake(f"seme::{op.name}{suffix}", fake, lib=_library)


for _op in OPS.values():
    _register(_op)
