"""``seme.merge_state_dicts``: the merge methods on models in memory."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.config import suggest
from seme.errors import ConfigError, SemeError, brief
from seme.methods import Context, Group, Method, Param, Pass, Reduced, get
from seme.methods._matrix import in_memory
from seme.ops._matrix import torch_threads
from seme.ops._op import Spec
from seme.roles import TensorRole, roles

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

    StateDict = Mapping[str, torch.Tensor]


def merge_state_dicts(
    models: Mapping[Hashable, StateDict | torch.nn.Module] | Sequence[StateDict | torch.nn.Module],
    method: str,
    *,
    base: Hashable | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
    config: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    compat: str | None = None,
) -> dict[str, torch.Tensor]:
    """Merge state dicts (or modules) tensor by tensor; the inputs are not changed.

    Unlike :func:`seme.merge` this does not look for inf and NaN in the inputs: they go through the formula.

    Args:
        models: a sequence, or a mapping from an id to a model.
        method: name of a merge method; ``seme methods`` lists them.
        base: id (or index) of the base model; methods on task vectors need it.
        parameters: by name. A parameter that has one value per model takes a sequence in the order of the models
            it applies to (all, or all but the base), a mapping by id, or one number for all.
        dtype: computation dtype, the inputs are cast to it; default: float32, or float64 if an input is float64.
        out_dtype: dtype of the result; default: ``dtype``, else the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.
        config: contents of ``config.json``, which tells matrix methods what each tensor is to the residual stream;
            default: that of the first module that has one, else names and shapes decide.
        shapes: shapes of all tensors of a model, where the models given here are parts of it: matrix methods learn from
            them as well what a tensor is.
        seed: of methods that draw random numbers.
        compat: ``"mergekit"``: mergekit's values where seme's differ by default.

    Returns:
        The merged tensors in the order of the first model (of the base, if there is one). Tensors that are not
        floating point are copied if all models agree.

    Raises:
        SemeError: keys or shapes differ, a parameter is unknown or missing, a method or backend does not exist.
    """
    import torch

    found = get(method)
    if not isinstance(threads, Integral) or threads < 0:
        raise ConfigError(f"threads: {brief(threads)}; expected a whole number, at least 0")
    for name, given in (("dtype", dtype), ("out_dtype", out_dtype)):
        if given is not None and not (isinstance(given, torch.dtype) and dtypes.from_torch(given).mergeable):
            known = ", ".join(f"torch.{d}" for d in dtypes.MERGEABLE)
            raise ConfigError(f"{name}: {brief(given)}; expected one of {known}")
    if isinstance(models, Mapping):
        ids: list[Hashable] = list(models)
        values = list(models.values())
    else:
        values = list(models)
        ids = list(range(len(values)))
    if compat not in (None, "mergekit"):
        raise ConfigError(f"compat: {brief(compat)}; the only value is 'mergekit'")
    states = [v.state_dict() if isinstance(v, torch.nn.Module) else v for v in values]
    for model_id, state in zip(ids, states):
        if not isinstance(state, Mapping):
            raise SemeError(f"models[{model_id!r}]: expected a state dict or a module, found {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise SemeError(f"models[{model_id!r}]: entry {brief(name)} is not a dense tensor")
            if value.is_meta:
                raise SemeError(f"models[{model_id!r}]: tensor {brief(name)} is on device meta, without data; load it")
    if base is not None and base not in ids:
        raise ConfigError(f"base: {base!r} is not one of the models; known: {', '.join(map(repr, ids))}")
    index = ids.index(base) if base is not None else None
    if found.base == "required" and index is None:
        raise ConfigError(f"base: missing; {method} works relative to it")
    if found.base == "input":
        index = None
    found.check_inputs(len(states), index is not None)
    arguments = _arguments(found, parameters or {}, ids, index)
    first = states[ids.index(base) if base is not None else 0]
    for model_id, state in zip(ids, states):
        for name in [*first, *state]:
            if name not in state or name not in first:
                raise SemeError(f"models[{model_id!r}]: tensor {name} is not in all models")
    if found.asks_for_whole({"": arguments}):
        raise ConfigError("parameters.rule: sequence runs the models; merge their folders with seme.merge")
    matrix: dict[str, tuple[TensorRole, Context]] = {}
    if found.matrix:
        matrix = _latent_space(values, first, states[index or 0], config, shapes, backend, threads)
    return {
        name: _merge_one(
            found,
            name,
            [s[name] for s in states],
            index,
            arguments,
            dtype,
            out_dtype,
            backend,
            threads,
            matrix.get(name),
            seed,
            compat == "mergekit",
        )
        for name in first
    }


def _latent_space(
    models: Sequence[Any],
    first: StateDict,
    base: StateDict,
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    backend: str,
    threads: int,
) -> dict[str, tuple[TensorRole, Context]]:
    """Role of every tensor, and what the matrix methods may use: the semantic bases of the base model, made once."""
    if config is None:
        module: Any = next((m for m in models if hasattr(m, "config")), None)
        config = module.config.to_dict() if module is not None else {}
    every = {**(shapes or {}), **{name: tuple(t.shape) for name, t in first.items()}}

    @functools.cache
    def bases() -> SemanticBases:
        from seme.roles import latent
        from seme.semantics.bases import SemanticBases

        space = latent(config or {}, every)
        for name in filter(None, (space.head, space.final_norm)):
            if name not in base:
                raise ConfigError(
                    f"models: {name} is needed for semantic bases and is not among the tensors; merge whole models, or "
                    "use sigma: 0, rule: project"
                )
        gain = base[space.final_norm].double() + space.norm_offset if space.final_norm else None
        return SemanticBases.from_head(base[space.head], gain)

    context = Context(backend, str(next(iter(first.values())).device) if first else "cpu", threads, bases=bases)
    return {name: (role, context) for name, role in roles(config, every).items()}


def _arguments(method: Method, parameters: Mapping[str, Any], ids: list[Hashable], base: int | None) -> dict[str, Any]:
    known = [p.name for p in method.params]
    for name in parameters:
        if name not in known:
            raise ConfigError(f"parameters.{name}: {method.name} has no such parameter{suggest(name, known)}")
    arguments: dict[str, Any] = {}
    for param in method.params:
        value = parameters.get(param.name)
        value = param.default if value is None else value
        if value is None:
            raise ConfigError(f"parameters.{param.name}: missing; {param.doc}")
        if param.scope == "shared":
            arguments[param.key] = param.convert(value, f"parameters.{param.name}")
        else:
            if isinstance(value, Mapping) and (unknown := [i for i in value if i not in ids]):
                raise ConfigError(f"parameters.{param.name}: {unknown[0]!r} is not one of the models")
            chosen = [i for i in range(len(ids)) if param.scope == "model" or i != base]
            arguments[param.key] = _per_input(param, value, [ids[i] for i in chosen])
    return arguments


def _per_input(param: Param, value: Any, ids: list[Hashable]) -> list[Any]:
    where = f"parameters.{param.name}"
    if isinstance(value, Mapping):
        missing = [i for i in ids if i not in value and param.default is None]
        if missing:
            raise ConfigError(f"{where}: no value for model {missing[0]!r}")
        value = [value.get(i, param.default) for i in ids]
    elif isinstance(value, str) or not isinstance(value, Iterable):
        value = [value] * len(ids)
    value = list(value)
    if len(value) != len(ids):
        raise ConfigError(f"{where}: {len(value)} values for {len(ids)} models")
    return [param.convert(v, where) for v in value]


def _merge_one(
    method: Method,
    name: str,
    tensors: list[torch.Tensor],
    base: int | None,
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    backend: str,
    threads: int,
    matrix: tuple[TensorRole, Context] | None,
    seed: int,
    compat: bool,
) -> torch.Tensor:
    import torch

    specs = tuple(Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in tensors)
    for i, spec in enumerate(specs):
        if spec.shape != specs[0].shape:
            raise SemeError(
                f"tensor {name}: model {i} has shape {list(spec.shape)}, model 0 has {list(specs[0].shape)}"
            )
    if not all(s.dtype.mergeable for s in specs):
        if not all(_same_bits(t, tensors[0]) for t in tensors[1:]):
            kinds = [s.dtype for s in specs]
            raise SemeError(
                f"tensor {name} ({', '.join(map(str, dict.fromkeys(kinds)))}) differs: {dtypes.why_equal(kinds)}"
            )
        return tensors[0].clone()
    stored = dtypes.promote([s.dtype for s in specs])
    default = stored if compat else dtypes.arithmetic(stored)
    compute = dtypes.from_torch(dtype) if dtype is not None else default
    result = dtypes.from_torch(out_dtype) if out_dtype is not None else compute if dtype is not None else stored
    group = Group(name, specs, base, compute, result, seed, compat)
    method.check_arguments(group, arguments)
    merged = torch.empty(specs[0].shape, dtype=result.to_torch(), device=tensors[0].device)
    if merged.numel() == 0:
        return merged
    if matrix is not None:
        with torch_threads(threads):
            method.merge(in_memory(group, matrix[0], tensors, merged, matrix[1]), **arguments)
        return merged
    merge = method.merge(group, **arguments)
    pass_ = next(merge)
    while True:
        out = _run(pass_, tensors, merged, backend, threads)
        try:
            # The whole tensor is one chunk, so quotas need no counting down and a sample is everything.
            pass_ = merge.send(out) if out is not None else next(merge)
        except StopIteration:
            return merged


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.dtype != b.dtype:
        return False
    x, y = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))  # float8 cannot be compared
    return torch.equal(x, y)


def _run(pass_: Pass, tensors: list[torch.Tensor], merged: torch.Tensor, backend: str, threads: int) -> Reduced | None:
    import torch

    inputs = [tensors[i].detach() for i in pass_.inputs]
    if pass_.writes:
        pass_.op.run(inputs, merged, backend, threads, pass_.params)
        return None
    out = torch.zeros(pass_.result.shape, dtype=pass_.result.dtype.to_torch(), device=merged.device)
    pass_.op.run(inputs, out, backend, threads, pass_.params)
    data: array[Any] = array("q" if pass_.result.dtype.name == "int64" else "d")
    data.frombytes(out.cpu().numpy().tobytes())
    return Reduced(data, tuple(out.shape), merged.numel())
