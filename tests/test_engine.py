"""seme/engine.py and runtime.py: the streamed merge equals its reference, and its bytes depend on nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seme import engine, merge_state_dicts, native
from seme import plan as planning
from seme.checkpoint import Checkpoint, Writer
from seme.config import load
from seme.engine import Options, Progress, buffer_memory, chunk_bytes
from seme.errors import BackendError, CheckpointError, ConfigError, SemeError, TargetError
from seme.merging import MergeResult, make_options, merge, run
from seme.methods import _magnitude, get
from seme.methods._passes import Countdown
from seme.native import BLOCK
from seme.ops.selected_squares import OP as SELECTED_SQUARES
from seme.ops.variance_ties import OP as VARIANCE_TIES
from seme.runtime import Place, Runtime

from .checkpoints import CONFIG, Tensors, read, write

CPU = Place("cpu", "cpu", "")
NAMES = ("base", "a", "b", "c")
NORM = "model.norm.weight"
LAYER = "model.layers.0."
KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Multiples of 2^-6: exact in every dtype, like their differences, with ties at every threshold. Tensors of
    several chunks, of less than a block, of one element and of none; integers and booleans, alike in all models."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        x = torch.randint(-127, 128, shape, generator=generator) / 64
        half = torch.rand(shape, generator=torch.Generator().manual_seed(99 + seed)) < 0.4
        return torch.where(half, torch.ones(shape) / 64, x).to(dtype)

    return {
        f"{LAYER}mlp.up_proj.weight": values(3, BLOCK + BLOCK // 2 + 1),
        f"{LAYER}mlp.down_proj.weight": values(7, 1023),
        NORM: values(63),
        "empty": values(0, 5),
        "scalar": values(),
        "one": values(1),
        "block": values(BLOCK),
        "ids": torch.arange(9_000),
        "mask": torch.arange(9) % 2 == 0,
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK_BYTES", 8 * BLOCK)


def models(dtype: torch.dtype = torch.bfloat16, layout: str = "single") -> None:
    for seed, name in enumerate(NAMES):
        write(Path(name), tensors(seed, dtype), {**CONFIG, "torch_dtype": "bfloat16"}, layout)


RECIPES: dict[str, dict[str, Any]] = {
    "karcher": {"models": ["a", "b", "c"]},
    "linear": {"models": ["a", "b", "c"], "parameters": {"weight": [0.3, 0.7]}},
    "linear, plain sum": {"models": ["a", "b"], "parameters": {"weight": 0.3, "normalize": False}},
    "model_stock": {"models": ["a", "b", "c"]},
    "model_stock, rows": {"models": ["a", "b"], "parameters": {"filter_wise": True}},
    "multislerp": {"models": ["a", "b", "c"], "parameters": {"weight": 0.3}},
    "nearswap": {"models": ["a"], "parameters": {"t": 0.3}},
    "nuslerp": {"models": ["a", "b"], "parameters": {"weight": 0.3}},
    "nuslerp, without base": {"models": ["a", "b"], "base_model": None, "parameters": {"weight": 0.3}},
    "nuslerp, rows": {"models": ["a", "b"], "parameters": {"weight": 0.3, "nuslerp_flatten": False}},
    "nuslerp, columns": {
        "models": ["a", "b"],
        "parameters": {"weight": 0.3, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "nuslerp, columns without base": {
        "models": ["a", "b"],
        "base_model": None,
        "parameters": {"weight": 0.3, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "passthrough": {"models": ["a"], "base_model": None, "parameters": {"scale": 1.25}},
    "task_arithmetic": {"models": ["a", "b", "c"], "parameters": {"weight": 0.3, "lambda": 0.9}},
    "task_arithmetic, normalized": {"models": ["a", "b"], "parameters": {"weight": 0.3, "normalize": True}},
    "arcee_fusion": {"models": ["a"]},
    "ram": {"models": ["a", "b", "c"], "parameters": {"epsilon": 0.3}},
    "ramplus_tl": {"models": ["a", "b", "c"], "parameters": {"epsilon": 0.3, "r": 0.5, "alpha": 2.0}},
    "sce": {"models": ["a", "b", "c"]},
    "sce, selected": {"models": ["a", "b", "c"], "parameters": {"select_topk": 0.3}},
    "slerp": {"models": ["a"], "parameters": {"t": 0.3}},
    "breadcrumbs": {"models": ["a", "b"], "parameters": {"weight": 0.5, "density": 0.4, "gamma": 0.1}},
    "breadcrumbs_ties, rescaled": {
        "models": ["a", "b", "c"],
        "parameters": {"weight": 0.5, "density": 0.4, "gamma": 0.3, "rescale": True},
    },
    "dare_linear": {"models": ["a", "b"], "parameters": {"weight": 0.5, "density": 0.4}, "seed": 7},
    "dare_ties, not rescaled": {"models": ["a", "b"], "parameters": {"weight": 0.5, "density": 0.4, "rescale": False}},
    "della": {"models": ["a", "b", "c"], "parameters": {"weight": 0.5, "density": 0.4}, "seed": 7},
    "della_linear, not rescaled": {
        "models": ["a", "b"],
        "parameters": {"weight": 0.5, "density": 0.4, "epsilon": 0.3, "rescale": False},
    },
    "ties": {"models": ["a", "b", "c"], "parameters": {"weight": 0.5, "density": 0.4}},
    "ties, one expert trimmed hard": {"models": ["a", "b", "c"], "parameters": {"weight": 1, "density": 0.01}},
    "ties, rescaled": {"models": ["a", "b"], "parameters": {"weight": 0.5, "density": 0.3, "rescale": True}},
    "ties, summed": {"models": ["a", "b"], "parameters": {"weight": 0.5, "density": 0.7, "normalize": False}},
    "ties, untrimmed": {"models": ["a", "b", "c"], "parameters": {"weight": 0.5, "lambda": 1.5}},
}


BY_LINES = ["model_stock, rows", "nuslerp, columns"]


def recipe(name: str, **more: Any) -> dict[str, Any]:
    method = name.partition(",")[0]
    found = {"merge_method": method, **RECIPES[name], **more}
    found["models"] = [{"model": m} for m in found["models"]]
    if get(method).base != "input":
        found.setdefault("base_model", "base")
    return found


def expected(config: dict[str, Any], stored: dict[str, Tensors]) -> Tensors:
    """The methods' own references, in float64.

    Of Arcee Fusion what whole tensors in memory give: on a grid its threshold is met exactly, and rounding decides.
    """
    plan = planning.make(load(config))
    plan.close()
    if plan.method.name == "arcee_fusion":
        dtype = getattr(torch, config.get("dtype") or "float32")
        states = [stored[m.ref.path] for m in plan.models]
        return merge_state_dicts(states, "arcee_fusion", base=plan.tensors[0].group.base, dtype=dtype)
    found = {}
    for t in plan.tensors:
        inputs = [stored[m.ref.path][t.name] for m in plan.models]
        drawn = (
            {"name": t.name, "seed": t.group.seed}
            if plan.method.name.startswith(("dare", "della")) and not t.copy
            else {}
        )
        arguments = {**t.arguments, **drawn}
        found[t.name] = inputs[0] if t.copy else plan.method.reference(inputs, base=t.group.base, **arguments)
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, rounding: float, name: str = "") -> bool:
    """True if no element is further from the float64 reference than one ulp of its dtype. Where terms cancel, what
    rounding the terms left is larger than the result: a dozen roundings of numbers below 8, ``rounding`` each. Some
    columns, of three elements, point almost opposite ways, which divides terms of nuslerp by a small sine."""
    if "columns" in name:
        rounding *= 100
    info = torch.finfo(found.dtype)
    ulp = torch.ldexp(torch.full(wanted.shape, info.eps, dtype=torch.float64), torch.frexp(wanted).exponent - 1)
    allowed = ulp.clamp(min=info.smallest_normal * info.eps) + 12 * rounding
    return bool(((found.double() - wanted).abs() <= allowed).all())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", RECIPES)
class TestEqualsItsReference:
    @pytest.mark.parametrize("out", ["bfloat16", "float16"])
    def test_within_one_ulp_of_the_output(self, name: str, out: str, here: Path) -> None:
        models()
        config = recipe(name, out_dtype=out)
        merge(config, "out", threads=2)
        found, wanted = read(Path("out")), expected(config, {n: tensors(i) for i, n in enumerate(NAMES)})
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert tensor.shape == wanted[key].shape
            if tensor.is_floating_point():
                assert tensor.dtype == getattr(torch, out)
                assert close(tensor, wanted[key], 2**-22, name), key
            else:
                assert torch.equal(tensor, wanted[key])

    def test_computed_in_float64_within_one_ulp_of_float32(self, name: str, here: Path) -> None:
        models(torch.float32)
        config = recipe(name, dtype="float64", out_dtype="float32")
        merge(config, "out")
        wanted = expected(config, {n: tensors(i) for i, n in enumerate(NAMES)})
        for key, tensor in read(Path("out")).items():
            if tensor.is_floating_point():
                assert close(tensor, wanted[key], 2**-51, name), key

    def test_mixed_dtypes_in_float32(self, name: str, here: Path) -> None:
        stored = {}
        for seed, (model, dtype) in enumerate(zip(NAMES, KINDS[:3] + KINDS[:1])):
            stored[model] = tensors(seed, dtype)
            write(Path(model), stored[model])
        config = recipe(name)
        merge(config, "out")
        wanted = expected(config, stored)
        for key, tensor in read(Path("out")).items():
            if tensor.is_floating_point():
                assert close(tensor, wanted[key], 2**-22, name), key


@pytest.mark.parametrize("name", RECIPES)
class TestBytesDependOnNothingElse:
    @pytest.fixture
    def whole(self, name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        """The merge in one chunk per tensor by one thread."""
        models()
        monkeypatch.setattr(engine, "CHUNK_BYTES", 1 << 24)
        monkeypatch.setattr(engine, "WAITING", 0)
        merge(recipe(name), "out", threads=1, memory="1GiB")
        found = files(Path("out"))
        os.rename("out", "whole")
        monkeypatch.undo()
        monkeypatch.chdir(here)
        return found

    def check(self, name: str, whole: dict[str, bytes], **options: Any) -> None:
        merge(recipe(name), "out", **options)
        assert files(Path("out")) == whole

    def test_not_on_chunks_or_threads(
        self, name: str, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for blocks, threads in ((1, 1), (1, 3), (2, 2), (3, 2)):
            monkeypatch.setattr(engine, "CHUNK_BYTES", 8 * BLOCK * blocks)
            merge(recipe(name), f"out{blocks}{threads}", threads=threads)
            found = files(Path(f"out{blocks}{threads}"))
            found["README.md"] = found["README.md"].replace(f"# out{blocks}{threads}".encode(), b"# out")
            assert found == whole

    def test_not_on_the_memory_limit(self, name: str, whole: dict[str, bytes]) -> None:
        self.check(name, whole, memory=5 * 5 * 8 * BLOCK, threads=3)

    def test_not_on_where_the_sample_falls(
        self, name: str, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_magnitude, "SAMPLE_FROM", 1000)
        for blocks in (1, 3):
            monkeypatch.setattr(engine, "CHUNK_BYTES", 8 * BLOCK * blocks)
            monkeypatch.setattr(engine, "SAMPLE_BLOCKS", blocks)
            merge(recipe(name), "out", threads=2, overwrite=True)
            assert files(Path("out")) == whole

    @pytest.mark.usefixtures("small_chunks")
    def test_not_on_torch(self, name: str, whole: dict[str, bytes]) -> None:
        self.check(name, whole, backend="torch", threads=2)

    @pytest.mark.usefixtures("small_chunks")
    def test_not_on_the_layout_of_the_inputs(self, name: str, whole: dict[str, bytes]) -> None:
        values = read(Path("whole"))
        for layout in ("shards", "bin", "bin shards"):
            for model in NAMES:
                for file in Path(model).iterdir():
                    file.unlink()
            models(layout=layout)
            merge(recipe(name), "out", threads=2, overwrite=True)
            found = read(Path("out"))
            assert found.keys() == values.keys()
            assert all(torch.equal(found[k], values[k]) for k in values)

    def test_not_on_the_output_shards(self, name: str, whole: dict[str, bytes]) -> None:
        values = read(Path("whole"))
        for size in (1, 100_000):
            merge(recipe(name), "out", out_shard_size=size, overwrite=True)
            assert len(list(Path("out").glob("*.safetensors"))) > 1
            found = read(Path("out"))
            assert found.keys() == values.keys()
            assert all(torch.equal(found[k], values[k]) for k in values)


class TestTriton:
    @pytest.mark.parametrize("name", ["linear", "task_arithmetic", "slerp", "ties, rescaled", *BY_LINES])
    def test_in_the_interpreter(self, name: str, here: Path) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is off: there is a GPU")
        for seed, model in enumerate(NAMES):
            whole = tensors(seed)
            write(Path(model), {k: v for k, v in whole.items() if v.numel() < 100})
        merge(recipe(name), "out", backend="triton", threads=3)
        merge(recipe(name), "cpu", backend="cpu")
        found, values = read(Path("out")), read(Path("cpu"))
        assert found.keys() == values.keys()
        assert all(torch.equal(found[k], values[k]) for k in values)


class TestSelection:
    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9, 1 / 3])
    def test_ties_keeps_exactly_the_stated_number_of_elements(self, density: float, here: Path) -> None:
        models()
        config = recipe("ties", models=["a"], parameters={"weight": 1, "density": density})
        merge(config, "out", threads=3)
        base, a, found = tensors(0), tensors(1), read(Path("out"))
        for key in (f"{LAYER}mlp.up_proj.weight", f"{LAYER}mlp.down_proj.weight", NORM, "block"):
            delta = (a[key].double() - base[key].double()).reshape(-1)
            order = torch.sort(delta.abs(), descending=True, stable=True).indices
            kept = torch.zeros_like(delta)
            chosen = order[: max(1, int(density * delta.numel()))]
            kept[chosen] = delta[chosen]
            wanted = (base[key].double().reshape(-1) + kept).bfloat16()
            assert torch.equal(found[key].reshape(-1), wanted)

    def test_that_needs_a_countdown_over_many_chunks(self, here: Path, small_chunks: None) -> None:
        # All magnitudes equal: which are kept is decided by the order alone.
        base = torch.zeros(9 * BLOCK + 5, dtype=torch.float64)
        signs = torch.where(torch.arange(base.numel()) % 3 == 0, -1.0, 1.0).double()
        write(Path("base"), {"x": base})
        write(Path("a"), {"x": signs})
        config = recipe("ties", models=["a"], parameters={"weight": 1, "density": 0.5})
        for threads in (1, 3):
            merge(config, "out", threads=threads, overwrite=True)
            found = read(Path("out"))["x"]
            assert torch.equal(found, torch.where(torch.arange(base.numel()) < base.numel() // 2, signs, 0.0))


class TestNonfinite:
    BAD = (float("nan"), float("inf"), -float("inf"))

    @pytest.fixture
    def bad(self, here: Path) -> Tensors:
        models()
        damaged = tensors(2)
        flat = damaged[f"{LAYER}mlp.up_proj.weight"].view(-1)
        for i, value in zip((5, 2 * BLOCK + 1, flat.numel() - 1), self.BAD):
            flat[i] = value
        write(Path("b"), damaged)
        return damaged

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
    def test_error_names_file_tensor_and_count(self, name: str, backend: str, bad: Tensors) -> None:
        with pytest.raises(CheckpointError) as e:
            merge(recipe(name, models=["b"] if name == "slerp" else ["a", "b"]), "out", backend=backend, threads=2)
        assert str(e.value) == (
            f"b/model.safetensors: tensor {LAYER}mlp.up_proj.weight: 3 of 36867 elements are inf or NaN; "
            "repair the model, or pass --nonfinite keep or zero"
        )
        assert sorted(os.listdir()) == ["a", "b", "base", "c"]

    @pytest.mark.usefixtures("small_chunks")
    def test_in_a_model_that_only_the_last_pass_reads(self, bad: Tensors) -> None:
        # Of a and b only a is trimmed, so only a goes through the histogram.
        entries = [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}]
        config = {"merge_method": "ties", "base_model": "base", "models": entries, "parameters": {"weight": 1}}
        with pytest.raises(CheckpointError, match=r"^b/model.safetensors: .*: 3 of 36867 elements are inf or NaN"):
            merge(config, "out", threads=2)

    @pytest.mark.usefixtures("small_chunks")
    def test_keep_gives_what_the_formula_gives(self, bad: Tensors) -> None:
        config = recipe("linear", models=["a", "b"])
        merge(config, "out", nonfinite="keep")
        found = read(Path("out"))[f"{LAYER}mlp.up_proj.weight"].view(-1)
        assert found[[5, 2 * BLOCK + 1, -1]].tolist() == pytest.approx(self.BAD, nan_ok=True)
        assert int((~found.isfinite()).sum()) == 3

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("name", ["linear", "ties, rescaled"])
    def test_zero_is_as_if_the_input_held_zeros(self, name: str, backend: str, bad: Tensors) -> None:
        config = recipe(name, models=["a", "b"])
        merge(config, "out", nonfinite="zero", backend=backend)
        key = f"{LAYER}mlp.up_proj.weight"
        write(Path("b"), {**bad, key: torch.nan_to_num(bad[key], 0.0, 0.0, 0.0)})
        merge(config, "clean")
        assert files(Path("out"))["model.safetensors"] == files(Path("clean"))["model.safetensors"]

    def test_the_policy_is_checked(self) -> None:
        with pytest.raises(ConfigError, match=r"^nonfinite: 'drop'; expected one of error, keep, zero$"):
            make_options("1GiB", 1, "drop")


def test_ties_are_counted_once_for_two_passes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models()
    real, ran = Runtime.run, Counter[str]()

    def run(self: Runtime, op: Any, *args: Any) -> None:
        ran[op.name] += 1
        real(self, op, *args)

    monkeypatch.setattr(Runtime, "run", run)
    merge(recipe("sce, selected", dtype="bfloat16"), "out", threads=1, memory="1MiB")
    assert 0 < ran["variance_ties"] <= ran["sce"] == ran["selected_squares"]


def test_a_pass_with_another_countdown_counts_anew(here: Path) -> None:
    models()
    plan = planning.make(load(recipe("sce, selected", dtype="bfloat16")))
    plan.close()
    tensor = next(t for t in plan.tensors if not t.copy)
    task, group = engine._Task(tensor, None, BLOCK), tensor.group
    for threshold in (5, 5, 6):
        selection = {"thresholds": [threshold], "tie_quotas": [3]}
        countdown = Countdown(VARIANCE_TIES, group.check(VARIANCE_TIES, thresholds=[threshold]), "tie_quotas")
        before = len(task.counted) if task.current else 0
        task.begin(group.reduce(SELECTED_SQUARES, countdown=countdown, **selection))
        assert len(task.counted) == (before if threshold == 5 and before else 1)
        task.counted[BLOCK] = [2]


class TestInterruptions:
    @pytest.fixture
    def slow(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Merges that last: each read takes a while, over many chunks."""
        models()
        monkeypatch.setattr(engine, "CHUNK_BYTES", 8 * BLOCK)
        real = Checkpoint.read_into

        def read_into(self: Checkpoint, *args: Any) -> None:
            time.sleep(0.02)
            real(self, *args)

        monkeypatch.setattr(Checkpoint, "read_into", read_into)
        return here

    @pytest.fixture(autouse=True)
    def nothing_left(self, here: Path) -> Iterator[None]:
        before = threading.active_count()
        begin = time.monotonic()
        yield
        assert time.monotonic() - begin < 20
        assert threading.active_count() == before
        # What is merged may be kept to go on with; see tests/test_resume.py.
        assert set(os.listdir(here)) <= {"a", "b", "base", "c", ".out.seme-staging", ".out.seme-journal"}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, BrokenPipeError])
    def test_from_the_watcher(self, error: type[BaseException], slow: Path) -> None:
        seen: list[Progress] = []

        def watch(progress: Progress) -> None:
            seen.append(progress)
            if len(seen) == 2:
                raise error

        with pytest.raises(error):
            merge(recipe("ties"), "out", threads=2, watch=watch)
        assert len(seen) == 2
        assert 0 < seen[0].done < seen[0].total or seen[0].read > 0

    def failing(self, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, at: int, error: BaseException) -> None:
        real: Callable[..., Any] = getattr(target, name)
        lock, calls = threading.Lock(), [0]

        def fail(*args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[0] += 1
                mine = calls[0]
            if mine == at:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, fail)

    @pytest.mark.parametrize("at", [1, 7, 20])
    @pytest.mark.parametrize("name", ["linear", "ties"])
    def test_from_a_worker_that_reads(self, name: str, at: int, slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, Checkpoint, "read_into", at + 6, CheckpointError("planned"))
        with pytest.raises(CheckpointError, match=r"^planned$"):
            merge(recipe(name), "out", threads=2)

    @pytest.mark.parametrize("at", [1, 5])
    def test_from_a_worker_that_writes(self, at: int, slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, Writer, "write", at, TargetError("planned"))
        with pytest.raises(TargetError, match=r"^planned$"):
            merge(recipe("ties"), "out", threads=3)

    @pytest.mark.parametrize("error", [MemoryError("planned"), RuntimeError("planned"), SystemExit("planned")])
    def test_from_a_kernel(self, error: BaseException, slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # tie_counts: other workers wait for the chunk that will never be counted.
        if native.why_not("_C") is not None:
            pytest.skip(str(native.why_not("_C")))
        from seme.runtime import Runtime

        real = Runtime.run
        seen = []

        def failing(self: Runtime, op: Any, *args: Any) -> None:
            if op.name == "tie_counts":
                seen.append(op.name)
                if len(seen) == 2:
                    raise error
            real(self, op, *args)

        monkeypatch.setattr(Runtime, "run", failing)
        expected = SemeError if isinstance(error, MemoryError) else type(error)
        with pytest.raises(expected, match=r"planned|memory ran out; allow the process more"):
            merge(recipe("ties"), "out", threads=3)

    def test_from_a_worker_that_gets_no_memory(self, slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, engine, "Chunk", 3, MemoryError("planned"))
        with pytest.raises(SemeError, match=r"^out: memory ran out; allow the process more, .*--threads") as found:
            merge(recipe("linear"), "out", threads=2)
        assert found.value.fault

    def test_from_a_thread_that_does_not_start(self, slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, threading.Thread, "start", 3, RuntimeError("can't start new thread"))
        with pytest.raises(SemeError, match=r"^out: memory ran out") as found:
            merge(recipe("linear"), "out", threads=2)
        assert found.value.fault

    def test_an_input_that_vanishes(self, here: Path) -> None:
        models()
        plan = planning.make(load(recipe("linear")), here / "out")
        plan.close()
        Path("b/model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"^b/model.safetensors: cannot be read: No such file"):
            run(plan, here / "out", make_options("1GiB", 2, "error"))

    def test_an_input_that_shrinks(self, here: Path) -> None:
        models()
        plan = planning.make(load(recipe("linear")), here / "out")
        plan.close()
        os.truncate("c/model.safetensors", 100_000)
        with pytest.raises(CheckpointError, match=r"^c/model.safetensors: tensor .*: ends \d+ bytes early"):
            run(plan, here / "out", make_options("1GiB", 2, "error"))

    def test_a_tokenizer_that_cannot_be_copied_shows_before_the_work(
        self, slow: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.failing(monkeypatch, Writer, "copy", 1, TargetError("planned"))
        Path("base/tokenizer.json").write_text("{}")
        reads = []
        monkeypatch.setattr(Checkpoint, "read_into", lambda *_: reads.append(1))
        config = {**recipe("task_arithmetic")}
        for name in NAMES:
            whole = {k: v for k, v in tensors(0).items() if v.is_floating_point()}
            write(Path(name), whole)
        with pytest.raises(TargetError, match=r"^planned$"):
            merge(config, "out")
        assert reads == []


class TestWithoutTheCompiledModule:
    @pytest.fixture
    def no_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_loaded", {"_C": "not built", "_C_cuda": "not built"})

    @pytest.mark.usefixtures("no_native", "small_chunks")
    @pytest.mark.filterwarnings("ignore:seme. no fast kernels")
    @pytest.mark.parametrize("name", ["linear", "ties, rescaled", "slerp"])
    def test_torch_does_the_same(self, name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for seed, model in enumerate(NAMES):
            write(Path(model), {k: v for k, v in tensors(seed).items() if k != f"{LAYER}mlp.up_proj.weight"})
        result = merge(recipe(name), "out", threads=2)
        assert result.backend == "torch"
        monkeypatch.undo()
        monkeypatch.chdir(here)
        merge(recipe(name), "native")
        found, values = read(Path("out")), read(Path("native"))
        assert all(torch.equal(found[k], values[k]) for k in values)

    @pytest.mark.usefixtures("no_native")
    @pytest.mark.parametrize("policy", ["error", "zero"])
    def test_inf_and_nan_are_found(self, policy: str, here: Path) -> None:
        x = torch.tensor([1.0, float("nan"), 3.0])
        write(Path("a"), {"x": x})
        write(Path("b"), {"x": torch.ones(3)})
        config = {"merge_method": "linear", "models": [{"model": m} for m in "ab"], "parameters": {"weight": 1}}
        if policy == "zero":
            merge(config, "out", backend="torch", nonfinite="zero")
            assert read(Path("out"))["x"].tolist() == [1.0, 0.5, 2.0]
        else:
            with pytest.raises(CheckpointError, match="1 of 3 elements are inf or NaN"):
                merge(config, "out", backend="torch")

    @pytest.mark.usefixtures("no_native")
    def test_the_cpu_backend_says_why(self, here: Path) -> None:
        models()
        with pytest.raises(BackendError, match=r"^backend cpu: not built"):
            merge(recipe("linear"), "out", backend="cpu")
        assert sorted(os.listdir()) == ["a", "b", "base", "c"]


class TestOptions:
    def plan(self) -> planning.Plan:
        models()
        made = planning.make(load(recipe("ties")))
        made.close()
        return made

    def test_memory_is_shared_by_the_buffers(self, here: Path) -> None:
        plan = self.plan()
        for memory, threads in ((1 << 28, 1), (1 << 28, 16), (2 << 20, 1), (16 << 20, 8)):
            options = Options(memory, threads)
            assert buffer_memory(plan, options, CPU) <= memory
            assert chunk_bytes(plan, options, CPU) % (8 * BLOCK) == 0
            assert chunk_bytes(plan, options, CPU) <= engine.CHUNK_BYTES

    def test_too_little_memory(self, here: Path) -> None:
        plan = self.plan()
        least = 5 * (2 + engine.WAITING) * 8 * BLOCK
        assert chunk_bytes(plan, Options(least, 2), CPU) == 8 * BLOCK
        message = rf"^memory: {least - 1} bytes are too few for 20 buffers; give at least {least}$"
        with pytest.raises(ConfigError, match=message):
            chunk_bytes(plan, Options(least - 1, 2), CPU)
        with pytest.raises(ConfigError, match=message):
            merge(recipe("ties"), "out", memory=least - 1, threads=2)
        assert sorted(os.listdir()) == ["a", "b", "base", "c"]

    @pytest.mark.parametrize("threads", [0, -1])
    def test_threads(self, threads: int) -> None:
        with pytest.raises(ConfigError, match=rf"^threads: {threads}; expected a whole number, at least 1$"):
            make_options("1GiB", threads, "error")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"device": "tpu"}, "device tpu: expected auto, cpu, cuda or cuda:N"),
            ({"backend": "fortran"}, "backend fortran: unknown backend 'fortran'; known: auto, torch, cpu"),
            ({"backend": "cuda"}, "backend cuda: backend cuda works on CUDA tensors, not on cpu"),
        ],
    )
    def test_backends_and_devices(self, options: dict[str, str], message: str, here: Path) -> None:
        models()
        with pytest.raises(BackendError) as e:
            merge(recipe("linear"), "out", **options)
        assert str(e.value).startswith(message)
        assert sorted(os.listdir()) == ["a", "b", "base", "c"]

    def test_a_machine_without_cuda(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        models()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BackendError, match=r"^device cuda: torch .* sees no CUDA device; use --device cpu$"):
            merge(recipe("linear"), "out", device="cuda")


def test_progress_and_result_add_up(here: Path) -> None:
    models()
    seen: list[Progress] = []
    result = merge(recipe("task_arithmetic"), "out", threads=2, watch=seen.append)
    assert isinstance(result, MergeResult)
    written = sum(t.numel() * t.element_size() for t in tensors(0).values())
    merged = sum(t.numel() * t.element_size() for t in tensors(0).values() if t.is_floating_point())
    assert (result.bytes_written, result.bytes_read) == (written, 4 * merged)
    assert result.tensors == len(tensors(0))
    assert result.backend == "cpu"
    assert 0 < result.seconds < 60
    assert all(p.total == written for p in seen)


def test_tensors_are_aligned_and_the_files_of_the_stated_size(here: Path) -> None:
    models()
    plan = planning.make(load(recipe("linear")))
    plan.close()
    merge(recipe("linear"), "out")
    assert Path("out/model.safetensors").stat().st_size == plan.layout.sizes[0]
    with Checkpoint(Path("out")) as checkpoint:
        assert all(t.offset % t.dtype.itemsize == 0 for t in checkpoint.tensors.values())


def test_every_method_is_tried_here() -> None:
    """Matrix methods have an engine and tests of their own."""
    from seme.methods import methods

    assert set(methods()) <= {name.partition(",")[0] for name in RECIPES} | {
        name for name, m in methods().items() if m.matrix or not m.merge.__module__.startswith("seme.")
    }
    assert get("ties").name == "ties"
