"""``seme.verify``: is a model folder whole, is it what was written, is it what its recipe gives?"""

from __future__ import annotations

import functools
import random
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from seme import gpu, steps
from seme import plan as planning
from seme.checkpoint import Stored, manifest
from seme.checkpoint.index import SAFETENSORS, read_json
from seme.checkpoint.reader import Reader
from seme.checkpoint.safetensors import read_header, unique
from seme.dtypes import BY_NAME, DType
from seme.engine import Engine, Options, Progress
from seme.errors import CheckpointError, ConfigError, brief, cannot_read, one_line
from seme.matrix_engine import MatrixEngine
from seme.merging import make_options, ready
from seme.native import View
from seme.ops._op import choose_backend
from seme.ops.nonfinite import OP as NONFINITE
from seme.plan import Plan
from seme.runtime import Place

INDEX = f"{SAFETENSORS}.index.json"
COPY_AGAIN = "copy it again"
SMALL = 0.01
"""Largest difference, of the largest magnitude, that other sums of the same products may make."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        file: the file, relative to the folder; None for a tensor that is in none.
        tensor: the tensor, where it is about one.
        what: what was found, and what to do.
    """

    file: str | None
    tensor: str | None
    what: str

    def __str__(self) -> str:
        tensor = None if self.tensor is None else f"tensor {self.tensor}"
        return one_line(": ".join(part for part in (self.file, tensor, self.what) if part is not None))


@dataclass
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        path: the folder.
        problems: all that is wrong; none if the model is as it should be.
        tensors: tensors in it.
        bytes: their bytes, all of which were read.
        hashed: tensors whose hashes were compared with the manifest; None without one.
        recomputed: names of the tensors that were computed again and compared.
        notes: what else is worth telling.
        seconds: how long it took.
    """

    path: Path
    problems: list[Problem] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    hashed: int | None = None
    recomputed: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def verify(
    out: str | Path,
    against: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path | None = None,
    *,
    sample: int | str = 32,
    sample_seed: int = 0,
    memory: str | int | None = None,
    threads: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    nonfinite: str = "error",
    seed: int | None = None,
    compat: str | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Check a model folder; it is only read.

    Headers, sizes and index, inf and NaN; with a manifest (``merge(..., checksums=True)``) every byte; with ``against``
    some tensors or all are computed again from the inputs and compared byte for byte.

    Args:
        out: a model folder with safetensors files.
        against: the recipe, as for :func:`seme.merge`; ``OUT/seme_config.yml`` is the one that was used. Its relative
            paths start at the current folder.
        sample: how many tensors are computed again, or ``"all"``.
        sample_seed: other ones for another number.
        memory: as of the merge; the same for the options below. Of methods that work on whole matrices all of them have
            to be those of the merge for the same last bits.
        threads: chunks computed at once.
        backend: auto, cpu, torch, triton or cuda.
        device: auto, cpu or cuda[:N].
        nonfinite: with ``keep``, inf and NaN in the model are no problem.
        seed: of methods that draw random numbers; overrules the recipe's.
        compat: overrules the recipe's.
        watch: called with the progress, first of reading, then of computing.

    Returns:
        The report, with every problem.

    Raises:
        SemeError: a mistake in the call or the recipe, inputs that cannot be merged, or a folder that is no model.
    """
    started = time.monotonic()
    options, folder = make_options(memory, threads, nonfinite), Path(out)
    count = _count(sample)
    names = _weights(folder)
    plan = None if against is None else _plan(against, seed, compat, backend, device)  # its mistakes before hours
    try:
        place = None if plan is None else ready(plan, options, backend, device)
        with closing(_Folder(folder, names)) as found:
            found.check_index()
            found.check_manifest()
            found.check_data(options, watch)
            if plan is not None and place is not None:
                found.recompute(plan, place, options, count, sample_seed, watch)
    finally:
        if plan is not None:
            plan.close()
    found.report.seconds = time.monotonic() - started
    return found.report


def _count(sample: int | str) -> int | None:
    """How many tensors; None for all."""
    if sample == "all":
        return None
    try:
        count = int(sample)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"sample: {brief(sample)}; expected a number of tensors, at least 1, or all")
    return count


def _weights(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder.

    Raises:
        CheckpointError: it is no model.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as e:
        raise CheckpointError(f"{folder}: {cannot_read(e)}") from e
    found = [name for name in names if name.endswith(".safetensors")]
    if not found and not {INDEX, manifest.NAME} & set(names):
        raise CheckpointError(f"{folder}: no safetensors file, nor an index of them; name the folder of a merged model")
    return found


def _plan(recipe: Any, seed: int | None, compat: str | None, backend: str, device: str) -> Plan:
    gpu.check(backend, device)  # before models are downloaded
    found = steps.read(recipe, seed=seed, compat=compat)
    if len(found) > 1:
        raise ConfigError(
            f"against: the recipe has {len(found)} documents, whose results are models of each other; keep them with "
            "seme merge --keep-steps, and write the last document as a recipe of its own that names their folders"
        )
    return planning.make(found[0].config)


class _Folder:
    """A model folder, and what was found in it so far.

    Attributes:
        report: the problems, and all else that is told.
        tensors: every tensor that can be read, where the index says, by name.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        """Read the headers of the safetensors files with these names."""
        self.path, self.report, self.tensors = path, VerifyReport(path), dict[str, Stored]()
        self._reader = Reader()
        self._gone: set[str] = set()  # tensors that are known to be missing
        self._hashes: dict[str, Any] | None = None
        self._shards: dict[str, dict[str, Stored]] = {}
        self._broken: set[str] = set()  # shards that cannot be read
        self._mapped = False  # the index or the manifest says what is in those
        for name in names:
            try:
                self._shards[name] = {t.name: t for t in read_header(path / name)}
            except CheckpointError as e:
                self._broken.add(name)
                self._problem(name, None, f"{self._said(e, name)}; {COPY_AGAIN}")

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _problem(self, file: str | None, tensor: str | None, what: str) -> None:
        self.report.problems.append(Problem(file, tensor, what))

    def _said(self, error: CheckpointError, file: str, tensor: str = "") -> str:
        """An error's message without the places that a problem has already, and another remedy."""
        said = str(error).removeprefix(f"{self.path / file}: ").removeprefix(f"tensor {tensor}: ")
        return said.removesuffix("; download it again").removesuffix(", download it again")

    def _lack(self, file: str | None, tensor: str, what: str) -> None:
        """Report a tensor that is not there, once, unless it is in a shard that is reported already, or may be."""
        reported = file in self._broken if self._mapped else bool(self._broken)
        if tensor not in self._gone and not reported:
            self._problem(file, tensor, f"{what}; {COPY_AGAIN}")
        self._gone.add(tensor)

    def check_index(self) -> None:
        """Compare the index with the shards, and find out which tensor is read where."""
        there = self._shards.keys() | self._broken
        places = self._index()
        self._mapped = places is not None
        belong = set(places.values()) if places else there
        if not (self.path / INDEX).exists():
            if SAFETENSORS in there:
                belong = {SAFETENSORS}
            elif there:
                self._problem(INDEX, None, f"missing, and no {SAFETENSORS}; {COPY_AGAIN}")
        for file in sorted(belong - there):
            self._missing(file, "the index names it")
        for file in sorted(there - belong):
            self._problem(file, None, "not a part of the model, but may be taken for one; remove it")
        for name, file in (places or {}).items():
            if name not in self._shards.get(file, ()):
                other = next((f for f, tensors in self._shards.items() if name in tensors), None)
                self._lack(file, name, "missing" if other is None else f"the index says it is here, {other} has it")
        for file, tensors in self._shards.items():
            for name, tensor in tensors.items() if file in belong else ():
                if places is not None and name not in places:
                    self._problem(file, name, f"not in the index; {COPY_AGAIN}")
                if (first := self.tensors.get(name)) is not None:
                    self._problem(file, name, f"in {first.file.name} too; {COPY_AGAIN}")
                if first is None or (places or {}).get(name) == file:
                    self.tensors[name] = tensor
        self.report.tensors = len(self.tensors)
        self.report.bytes = sum(t.nbytes for t in self.tensors.values())

    def _missing(self, file: str, why: str) -> None:
        self._broken.add(file)
        self._problem(file, None, f"missing, {why}; {COPY_AGAIN}")

    def _index(self) -> dict[str, str] | None:
        """The index's map of tensors to files, None if there is no index to go by; its size is checked."""
        found = self._json(INDEX)
        if found is None:
            return None
        places, about = found.get("weight_map"), found.get("metadata")
        if not isinstance(places, dict) or not places:
            self._problem(INDEX, None, f"no weight_map in it; {COPY_AGAIN}")
            return None
        for name, file in list(places.items()):
            if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
                self._problem(INDEX, name, f"file {brief(file)} is no safetensors file of the folder; {COPY_AGAIN}")
                del places[name]
        total = about.get("total_size") if isinstance(about, dict) else None
        stored = sum(t.nbytes for file in set(places.values()) for t in self._shards.get(file, {}).values())
        if total is not None and total != stored and self._shards.keys() >= set(places.values()):
            self._problem(INDEX, None, f"total_size is {brief(total)}, the shards hold {stored} bytes; {COPY_AGAIN}")
        return places

    def _json(self, name: str) -> dict[str, Any] | None:
        """A file of the folder; None if there is none, or one that cannot be read."""
        if not (self.path / name).exists():
            return None
        try:
            return read_json(self.path / name, object_pairs_hook=unique)
        except CheckpointError as e:
            self._problem(name, None, f"{self._said(e, name)}; {COPY_AGAIN}")
            return None

    def check_manifest(self) -> None:
        """Compare names, headers and small files with the manifest, if there is one."""
        found = self._json(manifest.NAME)
        if found is None:
            return
        if (found.get("format"), found.get("algorithm")) != (manifest.FORMAT, manifest.ALGORITHM):
            what = f"format {brief(found.get('format'))} with {brief(found.get('algorithm'))}"
            self._problem(manifest.NAME, None, f"{what} is not known; use the version of seme that wrote it")
            return
        tensors, shards, files = (found.get(key) for key in ("tensors", "shards", "files"))
        if not (isinstance(tensors, dict) and isinstance(shards, dict) and isinstance(files, dict)):
            self._problem(manifest.NAME, None, f"tensors, shards or files are missing in it; {COPY_AGAIN}")
            return
        self._hashes, self._mapped = tensors, True
        for file in sorted(shards.keys() - self._shards.keys() - self._broken):
            self._missing(file, "the manifest has it")
        for name, entry in tensors.items():
            file = entry.get("file") if isinstance(entry, dict) else None
            if name not in self.tensors:
                self._lack(file if isinstance(file, str) else manifest.NAME, name, "missing, the manifest has it")
        for name, tensor in self.tensors.items():
            if name not in tensors:
                self._problem(tensor.file.name, name, "not in the manifest; was it added after the merge?")
        what = f"its header is not what was written; {COPY_AGAIN}"
        for file in sorted(shards.keys() & self._shards.keys()):
            self._compare_file(file, shards[file], manifest.hash_header, what)
        what = f"not what was written; {COPY_AGAIN}, unless it was edited"
        for file, hash in files.items():
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                self._problem(manifest.NAME, None, f"file {brief(file)} is not in the folder; {COPY_AGAIN}")
            elif not (self.path / file).is_file():
                self._problem(file, None, f"missing, the manifest has it; {COPY_AGAIN}")
            else:
                self._compare_file(file, hash, manifest.hash_file, what)

    def _compare_file(self, file: str, hash: Any, compute: Callable[[Path], str], what: str) -> None:
        try:
            if compute(self.path / file) != hash:
                self._problem(file, None, what)
        except OSError as e:
            self._problem(file, None, f"{cannot_read(e)}; {COPY_AGAIN}")

    def check_data(self, options: Options, watch: Callable[[Progress], None] | None) -> None:
        """Read every tensor: inf, NaN, and the hashes of the manifest. One that cannot be read is there no more."""
        place = Place(choose_backend("auto", "cpu"), "cpu", "")
        tensors, hashes = list(self.tensors.values()), self._hashes
        look = functools.partial(self._look, place, hashes is not None)
        progress = Progress(total=self.report.bytes)
        if hashes is not None:
            self.report.hashed = 0
        for tensor, seen in zip(tensors, manifest.in_threads(look, tensors, options.threads)):
            file = tensor.file.name
            progress.read += tensor.nbytes
            progress.done += tensor.nbytes
            if watch is not None:
                watch(progress)
            if isinstance(seen, CheckpointError):
                self._problem(file, tensor.name, f"{self._said(seen, file, tensor.name)}; {COPY_AGAIN}")
                self._gone.add(tensor.name)
                del self.tensors[tensor.name]
                continue
            nonfinite, hash = seen
            if nonfinite and options.nonfinite != "keep":
                what = f"{nonfinite} of {tensor.numel} elements are inf or NaN"
                self._problem(file, tensor.name, f"{what}; {COPY_AGAIN}, or merge again")
            if hashes is not None and tensor.name in hashes:
                self._compare_entry(tensor, hashes[tensor.name], hash)
                self.report.hashed = (self.report.hashed or 0) + 1

    def _look(self, place: Place, hashes: bool, tensor: Stored) -> tuple[int, str] | CheckpointError:
        """How many elements are inf or NaN, and the hash, if it is asked for."""
        runtime = place.runtime(1, min(manifest.PIECE, tensor.nbytes))
        hash, count = manifest.new_hash(), array("q", [0])
        try:
            for piece in manifest.pieces(self._reader, tensor, runtime.inputs[0].memory):
                if hashes:
                    hash.update(piece)
                if tensor.dtype.mergeable:
                    numel = len(piece) // tensor.dtype.itemsize
                    out = View(count.buffer_info()[0], 1, BY_NAME["int64"])
                    runtime.run(NONFINITE, {}, [(0, tensor.dtype)], numel, out, (1,))
        except CheckpointError as e:
            return e
        return count[0], hash.hexdigest()

    def _compare_entry(self, tensor: Stored, entry: Any, hash: str) -> None:
        wanted = entry if isinstance(entry, dict) else {}
        for key, value in manifest.described(tensor, hash).items():
            if wanted.get(key) == value:
                continue
            what = "its bytes are not those that were written (hash)"
            if key != "hash":
                what = f"{key} {brief(value)}, the manifest has {brief(wanted.get(key))}"
            self._problem(tensor.file.name, tensor.name, f"{what}; {COPY_AGAIN}")

    def recompute(
        self,
        plan: Plan,
        place: Place,
        options: Options,
        count: int | None,
        seed: int,
        watch: Callable[[Progress], None] | None,
    ) -> None:
        """Compare with what a recipe gives: names, dtypes and shapes of all tensors, the bytes of ``count``."""
        fitting = {t.name for t in plan.tensors if self._fits(t.name, t.spec.dtype, t.spec.shape)}
        planned = {t.name: t for t in plan.tensors}
        for name, tensor in self.tensors.items():
            if name not in planned:
                self._problem(tensor.file.name, name, "the recipe gives no such tensor")
        whole = plan.method.asks_for_whole({t.name: t.arguments for t in plan.tensors if not t.copy})
        chosen = set(planned)
        if count is not None and count < len(planned):
            if whole:
                self.report.notes.append("rule sequence merges all tensors together, so all of them are computed again")
            else:
                chosen = set(random.Random(seed).sample(list(planned), count))
        chosen &= fitting
        if not chosen:
            return
        if not whole:
            plan = replace(plan, tensors=tuple(t for name, t in planned.items() if name in chosen))
        output = _Comparison(self._reader, {name: self.tensors[name] for name in chosen})
        if plan.method.matrix:
            MatrixEngine(plan, output, place, options, tells=False).run(watch)
        else:
            Engine(plan, output, place, options).run(watch)
        self.report.recomputed = tuple(name for name in planned if name in chosen)
        for name in self.report.recomputed:
            if (what := output.difference(name, plan.method.matrix)) is not None:
                self._problem(self.tensors[name].file.name, name, what)

    def _fits(self, name: str, dtype: DType, shape: tuple[int, ...]) -> bool:
        """True if a tensor of the recipe is there as it should be; else that is reported."""
        stored = self.tensors.get(name)
        if stored is None:
            self._lack(None, name, "missing, the recipe gives it")
            return False
        if (stored.dtype, stored.shape) == (dtype, shape):
            return True
        found, wanted = f"{stored.dtype} {list(stored.shape)}", f"{dtype} {list(shape)}"
        self._problem(stored.file.name, name, f"is {found}, the recipe gives {wanted}; is it the recipe of this model?")
        return False


@dataclass
class _Difference:
    """How a tensor differs from what was computed: how many elements, by how much, and the largest that was computed.
    ``largest`` is None for dtypes that are only copied."""

    elements: int = 0
    largest: float | None = None
    magnitude: float = 0.0


class _Comparison:
    """What the engines write to: nothing is written, but compared with the tensors that are there."""

    def __init__(self, reader: Reader, tensors: Mapping[str, Stored]) -> None:
        self._reader, self._tensors = reader, tensors
        self._differences: dict[str, _Difference] = {}
        self._lock = threading.Lock()

    def has(self, tensor: str, start: int, size: int) -> bool:
        """Nothing is computed already."""
        return False

    def tell(self, tensor: str, what: Any) -> None:
        """No report is made."""

    def told(self, tensor: str) -> None:
        """Nothing is computed already."""

    def write(self, tensor: str, start: int, data: memoryview) -> None:
        """Compare with bytes of a tensor; others than the chosen ones are taken for equal."""
        stored = self._tensors.get(tensor)
        if stored is None:
            return
        for at in range(0, len(data), manifest.PIECE):
            computed = data[at : at + manifest.PIECE]
            found = bytearray(len(computed))
            self._reader.read_into(stored, start + at, memoryview(found))
            if found != computed:
                with self._lock:
                    _add(self._differences.setdefault(tensor, _Difference()), stored.dtype, found, computed)

    def difference(self, tensor: str, matrix: bool) -> str | None:
        """What is wrong with a tensor, in words; None if nothing is. ``matrix``: the method's sums have no fixed
        order."""
        found = self._differences.get(tensor)
        if found is None or found.elements == 0:
            return None
        what = f"{found.elements} of {self._tensors[tensor].numel} elements are not what the recipe gives"
        if found.largest is None:
            return what
        what += f", the largest difference is {found.largest:.3g}"
        if matrix and found.largest <= SMALL * found.magnitude:
            what += (
                "; it may come from other --threads, --memory, --backend or --device than those of the merge, "
                "where products have other last bits"
            )
        return what


def _add(difference: _Difference, dtype: DType, found: bytearray, computed: memoryview) -> None:
    """Count the elements of two pieces that differ; a NaN is a NaN, whatever its bits."""
    import numpy as np

    raw = [np.frombuffer(data, dtype=np.uint8).reshape(-1, dtype.itemsize) for data in (found, computed)]
    differ = (raw[0] != raw[1]).any(1)
    values = [_values(data[differ], dtype) for data in raw]
    if values[0] is None or values[1] is None:
        difference.elements += int(differ.sum())
        return
    a, b = values
    real = ~(np.isnan(a) & np.isnan(b))
    difference.elements += int(real.sum())
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.nan_to_num(np.abs(a[real] - b[real]), nan=np.inf, posinf=np.inf)
    difference.largest = max(difference.largest or 0.0, float(off.max(initial=0.0)))
    difference.magnitude = max(difference.magnitude, float(np.abs(b[real]).max(initial=0.0)))


def _values(raw: Any, dtype: DType) -> Any:
    """Elements as float64 from rows of bytes; None for those that numpy has no numbers for."""
    import numpy as np

    data = np.ascontiguousarray(raw).reshape(-1)
    if dtype.name == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.name.startswith(("float8", "complex")):
        return None
    return data.view(np.bool_ if dtype.name == "bool" else dtype.name).astype(np.float64)
