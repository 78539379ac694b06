"""What this installation can do: versions, devices, which backends work and why the others do not (``seme env``)."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import seme
from seme import native
from seme.errors import BackendError
from seme.ops._op import BACKENDS, choose_backend, why_not
from seme.sizes import format_size

PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "huggingface_hub")
MODULES = ("_C", "_C_cuda")
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")
"""By number of ``Isa`` in ``csrc/isa.h``."""


def collect() -> dict[str, Any]:
    """The state of the installation, ready for JSON. Imports torch to look for devices; never raises for what it finds.

    Returns:
        ``location`` of the package; ``platform``; ``versions`` by package, None where it is not installed;
        ``settings``, the environment variables that change what seme does; ``compiled``, per module None or why it
        is not there; ``instruction_set`` of the CPU kernels, None without them; ``devices`` by name (``cpu``,
        ``cuda:0``), each with ``name``, ``memory`` in bytes, ``auto`` (the backend taken by default) and ``backends``,
        per backend None or why it does not work; ``no_cuda``, None or why there is no CUDA device.
    """
    torch_fault, gpus, no_cuda = _cuda()
    cpu = {"name": _cpu_name(), "threads": _threads(), "memory": _memory()}
    return {
        "location": str(Path(seme.__file__).resolve().parent),
        "platform": platform.platform(),
        "versions": {"seme": seme.__version__, "python": platform.python_version(), **_versions()},
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SEME_") or k == "TRITON_INTERPRET"},
        "compiled": {name: _missing(name) for name in MODULES},
        "instruction_set": INSTRUCTION_SETS[native.module().isa()] if native.why_not("_C") is None else None,
        "devices": {
            name: {**device, **_backends(name.partition(":")[0], torch_fault)}
            for name, device in {"cpu": cpu, **gpus}.items()
        },
        "no_cuda": no_cuda,
    }


def as_text(found: dict[str, Any]) -> str:
    """:func:`collect`'s result for people."""
    lines = [f"{'seme':<16} {found['versions']['seme']} in {found['location']}"]
    lines += [f"{name:<16} {v or 'not installed'}" for name, v in found["versions"].items() if name != "seme"]
    lines += [f"{'platform':<16} {found['platform']}"]
    lines += [f"{name:<16} {value} (environment variable)" for name, value in found["settings"].items()]
    lines += ["", "compiled modules"]
    for name, reason in found["compiled"].items():
        lines.append(_row(name, reason, f"{found['instruction_set']} kernels" if name == "_C" else ""))
    for name, device in found["devices"].items():
        threads = f"{device['threads']} threads, " if "threads" in device else ""
        lines += ["", f"{name}: {device['name']}, {threads}{format_size(device['memory'])}"]
        for backend, reason in device["backends"].items():
            lines.append(_row(backend, reason, "the default here" if backend == device["auto"] else ""))
    if found["no_cuda"] is not None:
        lines += ["", f"no CUDA device: {found['no_cuda']}"]
    return "\n".join(lines)


def _row(name: str, reason: str | None, note: str) -> str:
    return f"  {name:<14} " + (f"no: {reason}" if reason else "works" + (f" ({note})" if note else ""))


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def _missing(module: str) -> str | None:
    """None if the compiled module loads, else why it does not and what to do."""
    try:
        native.module(module)
        return None
    except BackendError as e:
        return str(e)


def _cuda() -> tuple[str | None, dict[str, dict[str, Any]], str | None]:
    """Why torch does not import (or None), the CUDA devices by name, why there are none (or None)."""
    try:
        import torch
    except (ImportError, OSError) as e:
        fault = f"torch does not import: {_one_line(e)}"
        return fault, {}, fault
    with warnings.catch_warnings(record=True) as said:  # torch tells what is wrong with a driver in a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        built = torch.version.cuda or torch.version.hip
        hint = "".join(f"; {_one_line(w.message)}" for w in said[:1])
        return None, {}, f"torch {torch.__version__} " + (f"finds none{hint}" if built else "is built without CUDA")
    gpus = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        name = f"{properties.name} (sm_{properties.major}{properties.minor})"
        gpus[f"cuda:{i}"] = {"name": name, "memory": properties.total_memory}
    return None, gpus, None


def _backends(device: str, torch_fault: str | None) -> dict[str, Any]:
    """Entries ``auto`` and ``backends`` of a device."""
    reasons = {name: why_not(name, device) for name in BACKENDS if name != "auto"}
    if torch_fault is not None:
        reasons |= dict.fromkeys(("torch", "triton"), torch_fault)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plain torch is used is what the table says
        try:
            chosen: str | None = choose_backend("auto", device)
        except BackendError:  # SEME_BACKEND names one that does not work on this device
            chosen = None
    return {"auto": chosen, "backends": reasons}


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _cpu_name() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
