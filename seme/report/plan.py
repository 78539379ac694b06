"""A plan as people and machines read it: what ``seme merge --dry-run`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seme import engine, matrix_engine
from seme.engine import Options
from seme.sizes import format_size

if TYPE_CHECKING:
    from seme.plan import Plan
    from seme.runtime import Place


def plan_as_dict(plan: Plan, options: Options, place: Place, verbose: bool = False) -> dict[str, Any]:
    """Numbers and names of a plan; with ``verbose`` every tensor and its parameters."""
    if plan.method.matrix:
        buffers = matrix_engine.buffer_memory(plan, options, place)
        peak = matrix_engine.peak_memory(plan, options, place)
    else:
        buffers = engine.buffer_memory(plan, options, place)
        peak = engine.peak_memory(plan, options, place)
    found: dict[str, Any] = {
        "method": plan.method.name,
        "models": [str(m.ref) for m in plan.models],
        "base_model": str(plan.config.base_model) if plan.config.base_model else None,
        "tokenizer": str(plan.tokenizer),
        "tensors": len(plan.tensors),
        "parameters": sum(t.spec.numel for t in plan.tensors),
        "copied_tensors": [t.name for t in plan.tensors if t.copy],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "buffer_bytes": buffers,
        "peak_memory_bytes": peak,
        "threads": options.threads,
        "backend": place.backend,
        "device": place.device,
        "device_reason": place.why,
        "gpu_memory_bytes": place.gpu.limit if place.gpu is not None else 0,
        "out_dtype": plan.out_dtype.name,
        "shards": dict(zip(plan.layout.files, plan.layout.sizes)),
        "notes": [*plan.notes, *(matrix_engine.notes(plan, place) if plan.method.matrix else [])],
    }
    if verbose:
        found["per_tensor"] = [
            {
                "name": t.name,
                "shape": list(t.spec.shape),
                "dtype": [s.dtype.name for s in t.group.inputs],
                "compute_dtype": t.group.compute_dtype.name,
                "out_dtype": t.spec.dtype.name,
                "parameters": {k.rstrip("_"): v for k, v in t.arguments.items()},
                **({"role": str(t.role), "rule": t.rule} if t.role is not None else {}),
            }
            for t in plan.tensors
        ]
    return found


def plan_as_text(plan: Plan, options: Options, place: Place, verbose: bool = False) -> str:
    """The same as lines of text."""
    d = plan_as_dict(plan, options, place, verbose)
    of = f", at most {format_size(d['gpu_memory_bytes'])} of it" if place.gpu is not None else ""
    lines = [
        f"method    {d['method']}",
        f"models    {', '.join(d['models'])}",
        f"base      {d['base_model'] or '(none)'}",
        f"tokenizer {d['tokenizer']}",
        f"tensors   {d['tensors']} with {d['parameters']:,} parameters, out dtype {d['out_dtype']}",
        f"read      {format_size(d['bytes_read'])} (each input once)",
        f"write     {format_size(d['bytes_written'])} in {len(d['shards'])} shard(s)",
        f"memory    about {format_size(d['peak_memory_bytes'])}, of it buffers {format_size(d['buffer_bytes'])}",
        f"run       {d['threads']} thread(s), backend {d['backend']}",
        f"device    {d['device']}{of}: {d['device_reason']}",
    ]
    lines += [f"  {name}  {format_size(size)}" for name, size in d["shards"].items()]
    lines += [f"note      {note}" for note in d["notes"]]
    for t in d.get("per_tensor", ()):
        parameters = " ".join(f"{k}={v}" for k, v in t["parameters"].items()) or "copy"
        role = f"{t['role']}: {t['rule']}  " if t.get("rule") else ""
        lines.append(f"  {t['name']} {t['shape']} {t['compute_dtype']}->{t['out_dtype']} {role}{parameters}")
    return "\n".join(lines)
