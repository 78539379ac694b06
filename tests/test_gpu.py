"""seme/gpu.py: the same bytes through the buffers of a GPU, within its limit, whatever memory is refused."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seme
from seme import engine, gpu, matrix_engine, merging
from seme import plan as planning
from seme.cli import main
from seme.config import load
from seme.dtypes import float32
from seme.engine import INT64, Options
from seme.errors import BackendError, CheckpointError, ConfigError
from seme.gpu import GpuRuntime
from seme.methods import get
from seme.native import BLOCK, View
from seme.ops._op import Op, launcher, why_not
from seme.ops.nonfinite import OP as NONFINITE
from seme.ops.weighted_sum import OP as WEIGHTED_SUM
from seme.plan import Plan
from seme.runtime import OutOfDeviceMemory

from . import models as make
from .fake_gpu import FakeGpu
from .test_engine import LAYER, RECIPES, files, models, recipe, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in Triton's interpreter


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for module in (engine, gpu):
        monkeypatch.setattr(module, "CHUNK_BYTES", 8 * BLOCK)  # several chunks per tensor
    return tmp_path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeGpu]:
    """Merges run on the fake GPU that this is given."""

    def use(fake: FakeGpu, backend: str = "torch") -> FakeGpu:
        monkeypatch.setattr(gpu, "choose", lambda *_: fake.place(backend))
        return fake

    return use


def on_cpu(config: dict[str, Any], **options: Any) -> dict[str, bytes]:
    seme.merge(config, "out", device="cpu", **options)
    found = files(Path("out"))
    Path("out").rename("cpu")
    return found


@pytest.mark.parametrize("name", RECIPES)
class TestTheBytesOfTheCpu:
    def test_chunk_by_chunk(self, name: str, here: Path, use: Callable[..., FakeGpu]) -> None:
        models()
        wanted = on_cpu(recipe(name))
        fake = use(FakeGpu())
        seme.merge(recipe(name), "out", threads=3)
        assert files(Path("out")) == wanted
        assert fake.held == fake.kept == fake.pinned == 0
        assert 0 < fake.peak <= fake.limit

    def test_by_one_worker_that_uses_its_buffers_again(
        self, name: str, here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models(torch.float64)  # of which a chunk is a block
        wanted = on_cpu(recipe(name))
        monkeypatch.setattr(gpu, "WORKERS", 1)
        use(FakeGpu())
        seme.merge(recipe(name), "out", threads=1)
        assert files(Path("out")) == wanted

    def test_where_memory_is_refused_again_and_again(
        self, name: str, here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Chunks are halved, also while others hold quotas that count on them, until they go through."""
        models()
        wanted = on_cpu(recipe(name))
        monkeypatch.setattr(engine, "TRIES", 20)  # whatever the order in which the workers ask
        fake = use(FakeGpu(fails=lambda n: n < 80 and n % 9 == 0))
        seme.merge(recipe(name), "out", threads=3)
        assert files(Path("out")) == wanted
        assert fake.emptied > 0
        assert fake.held == 0


def test_quotas_when_memory_is_refused_after_counting(
    here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk is counted again, in halves, by which time others may have gone on from its count."""
    models()
    wanted = on_cpu(recipe("ties"))
    real, refused = GpuRuntime.run, []

    def run(self: GpuRuntime, op: Op, params: dict[str, Any], inputs: Any, numel: int, *more: Any) -> None:
        if op.name == "ties" and numel > BLOCK and len(refused) < 2:
            refused.append(numel)
            raise OutOfDeviceMemory("planned")
        real(self, op, params, inputs, numel, *more)

    monkeypatch.setattr(GpuRuntime, "run", run)
    use(FakeGpu())
    seme.merge(recipe("ties"), "out", threads=2)
    assert files(Path("out")) == wanted
    assert refused == [4 * BLOCK, 2 * BLOCK]


@pytest.mark.parametrize("name", ["slerp", "ties, rescaled"])
def test_triton_kernels(name: str, here: Path, use: Callable[..., FakeGpu]) -> None:
    models()
    wanted = on_cpu(recipe(name))
    use(FakeGpu(), "triton")
    seme.merge(recipe(name), "out", threads=2)
    assert files(Path("out")) == wanted


class TestChunksStay:
    """A method's second pass reads nothing again where there is room for what the first one read."""

    def read(self, fake: FakeGpu, use: Callable[..., FakeGpu]) -> int:
        use(fake)
        found = seme.merge(recipe("ties, rescaled"), "out", threads=1, overwrite=True).bytes_read
        assert fake.held == 0
        return found

    def test_while_there_is_room(
        self, here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models()
        once = 3 * sum(t.nbytes for t in tensors(0).values() if t.is_floating_point())
        assert self.read(FakeGpu(), use) == once
        monkeypatch.setattr(FakeGpu, "keep", lambda *_: False)
        # Of one element all is kept, which takes one pass.
        single = 3 * sum(t.nbytes for t in tensors(0).values() if t.is_floating_point() and t.numel() == 1)
        assert self.read(FakeGpu(), use) == 3 * once - 2 * single

    def test_in_the_half_of_the_limit_that_is_not_for_buffers(self) -> None:
        fake = FakeGpu(limit=100)
        first, second, buffer = (fake.empty(n) for n in (40, 20, 40))
        assert fake.keep([first])
        assert not fake.keep([second])
        del first
        assert fake.keep([second])
        assert (fake.held, fake.kept) == (60, 20)
        del buffer, second
        assert (fake.held, fake.kept) == (0, 0)


def test_a_larger_result_takes_the_place_of_a_smaller_one() -> None:
    fake = FakeGpu()
    worker = GpuRuntime(1, 4096, fake, "torch")
    counts, sums = array("q", [0]), array("f", bytes(4 * 1000))
    worker.load([(0, float32)], 1000)
    worker.run(NONFINITE, {}, [(0, float32)], 1000, View(counts.buffer_info()[0], 1, INT64), (1,))
    params = {"weights": [1.0], "divisor": 1.0, "compute_dtype": float32}
    worker.run(WEIGHTED_SUM, params, [(0, float32)], 1000, View(sums.buffer_info()[0], 1000, float32), (1000,))
    assert fake.peak == fake.held == 8000
    worker.close()


def test_a_small_chunk_without_memory_does_not_make_all_small(
    here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And chunks are whole blocks, however odd the tensor."""
    from .checkpoints import write

    for module in (engine, gpu):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64 * BLOCK)
    made: list[engine.Engine] = []

    class Made(engine.Engine):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(merging, "Engine", Made)
    for n in (3, 11 * BLOCK + 1):
        for i, folder in enumerate(("one", "two")):
            write(Path(folder), {"w": torch.full((n,), float(i))})
        config = {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in ("one", "two")],
        }
        use(FakeGpu(fails=lambda n: n == 1))
        seme.merge(config, "out", threads=1, overwrite=True)
    assert [e.size for e in made] == [32 * BLOCK, 32 * BLOCK]


def test_what_libraries_say_of_too_little_memory() -> None:
    for said in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        with pytest.raises(OutOfDeviceMemory), FakeGpu().translated():
            raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="illegal"), FakeGpu().translated():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_memory_is_asked_for_on_one_stream_and_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream alone, torch makes device 0 the current one of a worker's thread afterwards."""
    entered: list[Any] = []

    class Context:
        def __init__(self, what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            entered.append(self.what)

        def __exit__(self, *_: object) -> None:
            entered.remove(self.what)

    asked: list[list[Any]] = []
    streams = iter("abcdef")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(streams))
    monkeypatch.setattr(torch.cuda, "device", Context)
    monkeypatch.setattr(torch.cuda, "stream", Context)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: asked.append(list(entered)) or torch.zeros(1))
    found = gpu.Gpu("cuda:1")
    for worker in ("x", "y"):
        with found.on(worker):
            found.allocate(1)
    assert [a[:2] for a in asked] == [["cuda:1", "x"], ["cuda:1", "y"]]
    assert [a[2:] for a in asked] == [["cuda:1", "c"]] * 2
    assert entered == []


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    reason = why_not("triton", "cuda")
    assert reason is not None
    assert "install gcc or clang, or set CC" in reason
    monkeypatch.setenv("CC", "tcc")
    assert why_not("triton", "cuda") is None


def test_triton_kernels_are_launched_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that one thread loads looks loaded to others: its launcher is there before its function is."""
    at_once, most = [0], [0]

    def launch(*_: Any) -> None:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.005)
        at_once[0] -= 1

    monkeypatch.setattr("seme.kernels.weighted_sum.launch", launch)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: launcher("weighted_sum", "triton")(), range(8)))
    assert most == [1]


def test_what_a_merge_held_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models()
    monkeypatch.setattr(gpu, "choose", lambda *_: replace(FakeGpu().place(), device="cuda:0"))
    Path("recipe.yml").write_text(json.dumps(recipe("linear")))
    assert main(["merge", "recipe.yml", "out"]) == 0
    assert re.search(r"peak memory [\d.]+ [MG]B, [\d.]+ [kM]B of cuda:0$", capsys.readouterr().out.strip())


def test_the_smallest_chunk_must_fit(here: Path, use: Callable[..., FakeGpu]) -> None:
    models()
    use(FakeGpu(fails=lambda n: True))
    with pytest.raises(BackendError, match=r"^cpu: out of memory, not even for .* of each model; free the device, or"):
        seme.merge(recipe("linear"), "out")
    assert not Path("out").exists()


def test_limits_that_are_too_small_or_too_large(here: Path, use: Callable[..., FakeGpu]) -> None:
    models()
    use(FakeGpu(limit=1 << 20))
    with pytest.raises(ConfigError, match=r"^gpu_memory: 1048576 bytes are too few for 16 buffers; give at least 18"):
        seme.merge(recipe("linear"), "out", threads=2)
    use(FakeGpu(limit=18_874_880))
    seme.merge(recipe("linear"), "out", threads=2)
    with pytest.raises(ConfigError, match=r"^gpu_memory: 2\.0 GB; cpu has 1\.0 GB$"):
        FakeGpu(limit=2 * 10**9, total=10**9)


def test_nan_is_found_and_counted_and_replaced(here: Path, use: Callable[..., FakeGpu]) -> None:
    models()
    name = f"{LAYER}mlp.up_proj.weight"
    spoiled = tensors(1)
    spoiled[name][2, 5] = float("nan")
    spoiled[name][0, 7] = float("inf")
    from .checkpoints import write

    write(Path("a"), spoiled)
    use(FakeGpu())
    with pytest.raises(CheckpointError, match=rf"a/model.safetensors: tensor {name}: 2 of .* are inf or NaN"):
        seme.merge(recipe("ties"), "out")
    wanted = on_cpu(recipe("ties"), nonfinite="zero")
    use(FakeGpu())
    seme.merge(recipe("ties"), "out", nonfinite="zero")
    assert files(Path("out")) == wanted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    base = make.llama(root / "base", hidden=16, shards=2, dtype=torch.bfloat16)
    return [base, *(make.perturbed(base, root / f"tuned-{i}", seed=i) for i in (1, 2))]


def matrix_recipe(folders: list[Path], **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "seme",
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
        **more,
    }


class TestMatrices:
    @pytest.mark.parametrize("parameters", [{}, {"rule": "elect"}, {"sigma": 0.5}, {"axis": "latent"}])
    def test_the_bytes_of_the_cpu(
        self, parameters: dict[str, Any], folders: list[Path], here: Path, use: Callable[..., FakeGpu]
    ) -> None:
        """With the CPU's kernels, so only the way of the rows there and back is another; also when memory is short."""
        config = matrix_recipe(folders, parameters=parameters)
        wanted = on_cpu(config, threads=1)
        for i, fails in enumerate((lambda n: False, lambda n: n % 7 == 0 and n < 100)):
            fake = use(FakeGpu(fails=fails), "cpu")
            result = seme.merge(config, f"out{i}", threads=1)
            found = files(Path(f"out{i}"))
            found["README.md"] = found["README.md"].replace(f"# out{i}".encode(), b"# out")
            assert found == wanted
            assert result.bytes_written == sum(t.nbytes for t in _stored(folders[0]).values())
            assert bool(fake.emptied) == (i == 1)

    def test_what_does_not_fit_is_merged_on_the_cpu_and_said(
        self, folders: list[Path], here: Path, use: Callable[..., FakeGpu], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = matrix_recipe(folders)
        plan = planning.make(load(config))
        plan.close()
        most = max(matrix_engine.held(plan, t) for t in plan.tensors)
        fake = use(FakeGpu(limit=most), "cpu")  # not the rows beside it
        (said,) = matrix_engine.notes(plan, fake.place())
        assert "tensor(s) are merged on the CPU" in said
        assert matrix_engine.buffer_memory(plan, Options(memory=1), fake.place()) == most + 1
        assert matrix_engine.notes(plan, FakeGpu().place()) == []
        Path("recipe.yml").write_text(json.dumps(config))
        assert main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
        assert said in capsys.readouterr().out
        wanted = on_cpu(config, threads=1)
        use(FakeGpu(limit=most), "cpu")
        seme.merge(config, "out", threads=1)
        assert files(Path("out")) == wanted

    def test_bases_that_do_not_fit_are_made_on_the_cpu(
        self, folders: list[Path], here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from seme.semantics.bases import SemanticBases

        config = matrix_recipe(folders, parameters={"rule": "elect"})
        wanted = on_cpu(config, threads=1)
        real, asked = SemanticBases.from_checkpoint, []

        def made(path: Path, *, device: str, **more: Any) -> SemanticBases:
            asked.append(device)
            if device == "cuda:0":
                raise torch.OutOfMemoryError("planned")
            return real(path, device=device, **more)

        monkeypatch.setattr(SemanticBases, "from_checkpoint", made)
        for limit, devices in ((None, ["cuda:0", "cpu"]), (1000, ["cpu"])):
            asked.clear()
            fake = use(FakeGpu(limit=limit), "cpu")
            fake.name = "cuda:0"
            seme.merge(config, "out", threads=1, overwrite=True)
            assert files(Path("out")) == wanted
            assert asked == devices

    def test_a_gpu_that_takes_nothing(self, folders: list[Path], here: Path, use: Callable[..., FakeGpu]) -> None:
        """In the end the tensor goes to the CPU; here that is refused as well, so the reason is told."""
        use(FakeGpu(fails=lambda n: True), "cpu")
        with pytest.raises(BackendError, match=r"^cpu: out of memory"):
            seme.merge(matrix_recipe(folders), "out", threads=1)
        assert not Path("out").exists()

    def test_a_full_disk_is_told_from_the_writing_thread(
        self, folders: list[Path], here: Path, use: Callable[..., FakeGpu], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from seme.checkpoint import Writer
        from seme.errors import TargetError

        def full(*_: object) -> None:
            raise TargetError("planned")

        use(FakeGpu(), "cpu")
        monkeypatch.setattr(Writer, "write", full)
        with pytest.raises(TargetError, match=r"^planned$"):
            seme.merge(matrix_recipe(folders), "out", threads=1)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    from .checkpoints import read

    return read(folder)


class TestWhichDevice:
    """Without a GPU; what a driver and torch would say is planned."""

    @pytest.fixture
    def plan(self, here: Path) -> Plan:
        models()
        plan = planning.make(load(recipe("ties")))
        plan.close()
        return plan

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One GPU, of which Triton can make use."""
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(gpu, "why_none", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

        class Made(FakeGpu):
            def __init__(self, name: str, limit: int | None) -> None:
                super().__init__(limit)
                self.name = name

        monkeypatch.setattr(gpu, "Gpu", Made)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_none(self, plan: Plan) -> None:
        place = gpu.choose(plan, 1)
        assert (place.backend, place.device, place.gpu) == ("cpu", "cpu", None)
        assert place.why == gpu.why_none() != None  # noqa: E711

    @pytest.mark.usefixtures("machine")
    def test_a_short_merge_is_not_worth_its_start(self, plan: Plan) -> None:
        place = gpu.choose(plan, 1)
        assert place.device == "cpu"
        assert place.why == "about 0 s of computing on 1 CPU thread(s), a GPU takes about 5 s to start"

    @pytest.mark.usefixtures("machine")
    def test_a_long_one_is(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "CPU_BYTES", plan.bytes_read / 22)
        place = gpu.choose(plan, 2, limit=1 << 25)
        assert (place.device, place.backend) == ("cuda:0", "triton")
        assert place.why == "about 11 s of computing on 2 CPU thread(s)"
        assert place.gpu is not None
        assert place.gpu.limit == 1 << 25
        assert gpu.choose(plan, 3).device == "cpu"

    @pytest.mark.usefixtures("machine")
    def test_as_asked_for(self, plan: Plan) -> None:
        assert gpu.choose(plan, 1, device="cuda").device == "cuda:0"
        assert gpu.choose(plan, 1, "torch", "cuda:0").backend == "torch"
        assert gpu.choose(plan, 1, "cpu").why == "backend cpu works there"
        matrices = replace(plan, method=get("seme"))
        with pytest.raises(BackendError, match=r"^backend cuda: not all products of seme are in CUDA C\+\+; use auto"):
            gpu.choose(matrices, 1, "cuda", "cuda")
        with pytest.raises(BackendError, match=r"^device cuda:1: there are 1; the first one is cuda:0$"):
            gpu.choose(plan, 1, device="cuda:1")
        with pytest.raises(BackendError, match=r"^device cuda:x: expected auto, cpu, cuda or cuda:N$"):
            gpu.choose(plan, 1, device="cuda:x")
        with pytest.raises(BackendError, match=r"^backend cpu: .* works on CPU tensors, not on cuda"):
            gpu.choose(plan, 1, "cpu", "cuda")

    @pytest.mark.usefixtures("machine")
    def test_a_gpu_that_is_full_or_does_not_start(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "CPU_BYTES", plan.bytes_read / 100)
        place = gpu.choose(plan, 1)  # 80 % of 1 GiB
        assert (place.device, place.gpu) == ("cpu", None)
        assert place.why == "device cuda:0: 859.0 MB of its memory are for a merge"
        assert gpu.choose(plan, 1, device="cuda").device == "cuda:0"

        def busy(*_: object) -> None:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

        monkeypatch.setattr(gpu, "Gpu", busy)
        assert gpu.choose(plan, 1).why == "device cuda: CUDA error: out of memory"
        said = r"^device cuda: CUDA error: out of memory; free it, or use --device cpu$"
        with pytest.raises(BackendError, match=said):
            gpu.choose(plan, 1, device="cuda")
        with pytest.raises(BackendError, match=said):
            gpu.choose(plan, 1, backend="triton")

    @pytest.mark.usefixtures("machine")
    def test_more_models_than_cuda_takes(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "CUDA_MODELS", 2)
        monkeypatch.setattr(gpu, "choose_backend", lambda *_: "cuda")
        place = gpu.choose(plan, 1, device="cuda")
        assert place.backend == "torch"
        assert place.why == "device cuda asked for; backend cuda: takes 2 models, there are 4"
        with pytest.raises(BackendError, match=r"^backend cuda: takes 2 models, there are 4; use triton, torch"):
            gpu.choose(plan, 1, backend="cuda", device="cuda")

    def test_matrices_take_longer(self, folders: list[Path], plan: Plan) -> None:
        matrices = planning.make(load(matrix_recipe(folders)))
        matrices.close()
        weights = [t.spec.shape for t in matrices.tensors if len(t.spec.shape) == 2]
        flops = sum(8 * a * b * min(a, b) * 2 for a, b in weights)
        assert gpu.cpu_seconds(matrices, 2) == pytest.approx(flops / gpu.CPU_FLOPS / 2)
        assert gpu.cpu_seconds(plan, 1) == pytest.approx(plan.bytes_read / gpu.CPU_BYTES)
