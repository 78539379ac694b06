"""``seme.merge``: from a recipe to a model folder."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from seme import gpu, resuming, steps
from seme import plan as planning
from seme.checkpoint import Writer, check_free, completed, local_path, manifest, tidy
from seme.checkpoint.tokenizer import MODEL_FILES, OUTDATED, TOKENIZER_FILES
from seme.config import MergeConfig
from seme.dtypes import DType
from seme.engine import Engine, Options, Progress, chunk_bytes
from seme.errors import KEPT, CheckpointError, ConfigError, KeptInterrupt, LateInterrupt, SemeError, brief
from seme.matrix_engine import MatrixEngine
from seme.plan import Plan
from seme.report.card import model_card
from seme.runtime import Place
from seme.sizes import parse_size
from seme.steps import Step

NONFINITE = ("error", "keep", "zero")


@dataclass(frozen=True)
class MergeResult:
    """What a merge did: the folder, its tensors and bytes, the seconds it took, the backend and device it ran on, and
    what it held at most of a GPU's memory."""

    path: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    backend: str
    device: str
    gpu_bytes: int = 0


def default_threads() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def merge(
    config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path,
    out: str | Path,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    gpu_memory: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checksums: bool = False,
    out_shard_size: str | int = "5GB",
    nonfinite: str = "error",
    seed: int | None = None,
    compat: str | None = None,
    keep_steps: str | Path | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> MergeResult:
    """Merge models as a recipe says and write the result as a Hugging Face model folder.

    Args:
        config: the recipe: a mapping, a YAML file, or YAML text; of several recipes that use each other's results a
            list of mappings, or YAML of several documents. ``docs/config.md`` has the keys.
        out: the new folder; it appears whole when all is on disk, or not at all.
        memory: limit of the buffers, e.g. ``"1GiB"``; of element-wise methods the process peaks about 30 MB above, of
            others the dry run (``seme merge --dry-run``) says where. Default: 256 MiB, on a GPU 1 GiB.
        threads: chunks computed at once; default: the cores of this process.
        backend: auto, cpu, torch, triton or cuda.
        device: auto, cpu or cuda[:N]; auto takes a GPU where the merge is long enough to be worth its start.
        gpu_memory: limit of the GPU's memory; default: 80 % of what is free.
        overwrite: replace an existing model folder once the new one is complete.
        resume: go on with a merge into ``out`` that was killed or stopped, if there is one; the bytes are those of a
            merge that was not. Recipe, models and options must be the same; memory and threads only where a method
            works on whole matrices.
        checksums: write ``seme_manifest.json``, a hash of every tensor and file, for :func:`seme.verify`.
        out_shard_size: largest output file, bytes or e.g. ``"5GB"``.
        nonfinite: inf or NaN in an input: ``error`` (named with tensor and count), ``keep`` or ``zero``.
        seed: of methods that draw random numbers; overrules the recipe's, which is 0 by default.
        compat: ``"mergekit"``: mergekit's values where seme's differ by default; overrules the recipe's.
        keep_steps: folder in which the results of recipes with a name stay.
        watch: called about ten times a second with the progress.

    Returns:
        What was done; of several recipes, for the output.

    Raises:
        SemeError: a mistake in recipe, checkpoints or target; the target is as it was.
        LateInterrupt: a KeyboardInterrupt after which the target is the new model; with any other it is as it was.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out: {brief(out)}; expected the path of the new folder")
    options = make_options(memory, threads, nonfinite, gpu_memory)
    gpu.check(backend, device)  # before models are downloaded
    shard = parse_size(out_shard_size, "out_shard_size")
    recipe = local_path(str(config)) if isinstance(config, (str, os.PathLike)) else None
    found = steps.read(config, seed=seed, compat=compat)
    check_resume(found, resume)
    keep = None if keep_steps is None else Path(keep_steps)

    def one(step: MergeConfig, name: str | None, place: Path) -> MergeResult:
        target = Path(out) if name is None else place
        plan = planning.make(step, target, shard, may_replace(target, overwrite and name is None, resume), recipe)
        goes_on = resume if len(found) == 1 else None
        output = name is None
        return run(plan, target, options, backend, device, overwrite and output, watch, goes_on, checksums and output)

    return merge_steps(found, Path(out), keep, overwrite, one)


def check_resume(found: Sequence[Step], resume: bool) -> None:
    """Refuse to resume where it cannot be done."""
    if resume and len(found) > 1:
        raise ConfigError(
            f"resume: the recipe has {len(found)} documents, whose results are made anew; run it without --resume, or "
            "give each document a file of its own"
        )


def may_replace(target: Path, overwrite: bool, resume: bool) -> bool:
    """True if a plan may find a model in its place: to be replaced, or of a merge that was killed at its very end."""
    return overwrite or (resume and completed(target.resolve()) is not None)


def merge_steps(
    found: Sequence[Step],
    out: Path,
    keep: Path | None,
    overwrite: bool,
    merge: Callable[[MergeConfig, str | None, Path], MergeResult],
) -> MergeResult:
    """Run recipes, mostly one, as :func:`seme.steps.run` does, after all that can be checked of them before."""
    if len(found) == 1:
        return merge(found[0].config, None, out)
    steps.check(found, keep)
    check_free(out, overwrite)
    with steps.folder(out, keep) as where:
        result: MergeResult = steps.run(found, where, keep, merge)
    return result


def make_options(
    memory: str | int | None, threads: int | None, nonfinite: str, gpu_memory: str | int | None = None
) -> Options:
    """Checked :class:`Options`; :class:`ConfigError` names the option that is wrong."""
    if nonfinite not in NONFINITE:
        raise ConfigError(f"nonfinite: {nonfinite!r}; expected one of {', '.join(NONFINITE)}")
    if threads is not None and not (isinstance(threads, Integral) and threads >= 1):
        raise ConfigError(f"threads: {brief(threads)}; expected a whole number, at least 1")
    return Options(
        None if memory is None else parse_size(memory, "memory"),
        threads or default_threads(),
        nonfinite,
        None if gpu_memory is None else parse_size(gpu_memory, "gpu_memory"),
    )


def run(
    plan: Plan,
    out: Path,
    options: Options,
    backend: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    watch: Callable[[Progress], None] | None = None,
    resume: bool | None = False,
    checksums: bool = False,
) -> MergeResult:
    """Run a plan made for the folder ``out``; see :func:`merge`. ``resume`` None keeps no journal."""
    writer, target = None, out.resolve()
    try:
        place = ready(plan, options, backend, device)
        made_of = resuming.identity(plan, options, place, _copied(plan))
        other = functools.partial(resuming.difference, made_of) if resume else None
        if other is not None and (then := completed(target)) is not None and other(then) is None:
            if checksums:
                manifest.write(target, options.threads)
            tidy(target)
            return MergeResult(out, len(plan.tensors), 0, 0, 0.0, place.backend, place.device)
        with Writer(target, plan.layout, overwrite, None if resume is None else made_of, other) as writer:
            _write_small_files(plan, writer)
            report = None
            engine: Engine | MatrixEngine
            if plan.method.matrix:
                engine = MatrixEngine(plan, writer, place, options)
                report = engine.run(watch)
            else:
                engine = Engine(plan, writer, place, options)
                engine.run(watch)
            if report is not None:
                writer.json("merge_report.json", report)
            writer.text("README.md", model_card(plan, target.name, report))
            if checksums:
                manifest.write(writer.staging, options.threads)
            resuming.check_unchanged(made_of)
            writer.commit()
    except KeyboardInterrupt as e:
        if writer is not None and writer.committed:
            raise LateInterrupt(*e.args) from e
        if writer is not None and writer.kept:
            raise KeptInterrupt(*e.args) from e
        raise
    except (MemoryError, RuntimeError, ImportError) as e:
        if not _of_memory(e):
            raise
        raise SemeError(
            f"{out}: memory ran out; allow the process more, or give less to --memory and --threads{_kept(writer)}",
            fault=True,
        ) from e
    except SemeError as e:
        if writer is not None and writer.kept:
            raise type(e)(f"{e}{_kept(writer)}", fault=e.fault) from e
        raise
    finally:
        plan.close()
    done = engine.progress
    seconds = time.monotonic() - done.started
    held = place.gpu.peak if place.gpu is not None else 0
    return MergeResult(out, len(plan.tensors), done.read, done.written, seconds, place.backend, place.device, held)


def _of_memory(error: BaseException) -> bool:
    """True of what is raised where the system gives no more memory, which threads and libraries need as well."""
    said = ("can't start new thread", "llocate memory", "failed to map segment")
    return isinstance(error, MemoryError) or any(part in str(error) for part in said)


def _kept(writer: Writer | None) -> str:
    return KEPT if writer is not None and writer.kept else ""


def ready(plan: Plan, options: Options, backend: str, device: str) -> Place:
    """Where the plan will run, as :func:`seme.gpu.choose` says, once all that it needs is there.

    Raises:
        SemeError: a backend that does not work here, too little memory for the buffers, NaN that would spread over
            whole matrices, or a file that cannot be copied.
    """
    place = gpu.choose(plan, options.threads, backend, device, options.gpu_memory)
    if not plan.method.matrix:
        chunk_bytes(plan, options, place)
    elif options.nonfinite == "keep":
        raise ConfigError(f"nonfinite: keep: {plan.method.name} would spread a NaN over whole matrices; use zero")
    for file in _copied(plan):
        if not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{file}: neither a file nor a folder, but belongs to the output; remove it")
        if not os.access(file, os.R_OK):
            raise CheckpointError(f"{file}: no permission to read it; it belongs to the output, make it readable")
    return place


def _copied(plan: Plan) -> list[Path]:
    """The files that the output takes over as they are."""
    donor = plan.models[plan.donor].checkpoint
    found = [donor.path / name for name in MODEL_FILES if (donor.path / name).is_file()]
    if donor.config.get("auto_map"):
        found += sorted(donor.path.glob("*.py"))
    gone = {*plan.tokenizer_files, *(OUTDATED if "tokenizer.json" in plan.tokenizer_files else ())}
    if plan.config.chat_template is not None:
        gone.add("chat_template.json")
    names = [name for name in TOKENIZER_FILES if name not in gone]
    return found + [plan.tokenizer / name for name in names if (plan.tokenizer / name).exists()]


def _write_small_files(plan: Plan, writer: Writer) -> None:
    writer.index()
    if plan.model_config:
        writer.json("config.json", with_dtype(plan.model_config, plan.out_dtype))
    for file in _copied(plan):
        writer.copy(file)
    for name, text in plan.tokenizer_files.items():
        writer.text(name, text)
    writer.text("seme_config.yml", plan.config.source.rstrip() + "\n")


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """config.json with the output's dtype, under the key it uses (``dtype``, or ``torch_dtype`` of older files),
    in the nested configs of multimodal models as well."""
    found = {
        k: with_dtype(v, dtype) if k.endswith("_config") and isinstance(v, Mapping) else v for k, v in config.items()
    }
    for key in ("dtype", "torch_dtype"):
        if found.get(key) is not None:
            found[key] = dtype.name
    if "architectures" in config and not {"dtype", "torch_dtype"} & {k for k, v in found.items() if v is not None}:
        found["torch_dtype"] = dtype.name
    return found
