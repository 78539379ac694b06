"""Whole merges on the GPU: the bytes of the CPU for element-wise methods, within the stated bound for ``seme``.

On the CPU the same merges run on Triton's interpreter.
"""

from pathlib import Path

import pytest
import torch

import seme
from seme import native
from seme.errors import BackendError, CheckpointError

from .device import DEVICE, GPU, chosen, needs_gpu

pytest.importorskip("safetensors", reason="safetensors is not installed")

from tests import checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, in the interpreter
]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
VOCABULARY = chosen(300_007, 17)
"""Rows of 8 of the largest tensors: several chunks of whatever budget."""
LAYERS = chosen(3, 1)
RECIPES = {
    "linear": {"parameters": {"weight": [0.3, 0.5, 0.4]}},
    "slerp": {"parameters": {"t": 0.4}},
    "task_arithmetic": {"parameters": {"weight": [0.7, -0.2]}},
    "ties": {"parameters": {"weight": [0.6, 0.5], "density": 0.3}},
}


def options(backend="triton", **more):
    """Of :func:`seme.merge`."""
    return {"device": DEVICE, "backend": backend, "threads": 2, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three models of these dtypes, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(dtypes, vocabulary=VOCABULARY, layers=LAYERS):
        key = (dtypes, vocabulary, layers)
        if key not in made:
            folder = root / str(len(made))
            made[key] = [
                checkpoints.write(
                    folder / str(i), checkpoints.decoder(i, d, layers=layers, vocab=vocabulary), layout="shards"
                )
                for i, d in enumerate(dtypes)
            ]
        return made[key]

    return make


def recipe(method, folders, **more):
    base, *tuned = map(str, folders)
    parameters = dict(RECIPES.get(method, {}).get("parameters", {}))
    weights = parameters.pop("weight", None)
    names = [base, *tuned] if method == "linear" else tuned[:1] if method == "slerp" else tuned
    entries = [{"model": n} | ({"parameters": {"weight": weights[i]}} if weights else {}) for i, n in enumerate(names)]
    found = {"merge_method": method, "models": entries, "parameters": parameters, **more}
    return found if method == "linear" else {**found, "base_model": base}


def data(folder):
    """The bytes of all weight files."""
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.safetensors"))}


def same(recipe, tmp_path, **given):
    """A merge on the device gives the bytes of the CPU kernels."""
    seme.merge(recipe, tmp_path / "cpu", device="cpu", backend="cpu", threads=2)
    found = seme.merge(recipe, tmp_path / "gpu", **given)
    ours, theirs = data(tmp_path / "gpu"), data(tmp_path / "cpu")
    assert ours.keys() == theirs.keys()
    assert ours
    for name, content in ours.items():
        assert content == theirs[name], name
    return found


@pytest.mark.parametrize("method", RECIPES)
def test_bytes_of_the_cpu(method, backend, models, tmp_path):
    done = same(recipe(method, models((BF16,) * 3)), tmp_path, **options(backend))
    assert done.backend == backend


@pytest.mark.parametrize(
    ("dtypes", "more"),
    [
        ((F16,) * 3, {}),
        ((F32,) * 3, {"out_dtype": "bfloat16"}),
        ((F64,) * 3, {}),
        ((BF16, F32, F16), {"dtype": "float32", "out_dtype": "float16"}),
        ((F32, BF16, F64), {"dtype": "bfloat16"}),
    ],
    ids=["f16", "f32-to-bf16", "f64", "mixed", "mixed-in-bf16"],
)
@pytest.mark.parametrize("method", chosen(tuple(RECIPES), ("linear",)))
def test_bytes_in_every_dtype(method, dtypes, more, backend, models, tmp_path):
    same(recipe(method, models(dtypes), **more), tmp_path, **options(backend))


@pytest.mark.parametrize("size", chosen(["64MiB", "200MiB"], ["64MiB"]))
def test_a_small_budget(size, backend, models, tmp_path):
    """Chunks are cut so that the memory is enough; what torch held stays within it."""
    limit = int(size.removesuffix("MiB")) << 20
    if GPU:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    done = same(recipe("ties", models((BF16,) * 3)), tmp_path, **options(backend, gpu_memory=size))
    assert done.gpu_bytes <= limit
    if GPU:
        assert done.gpu_bytes > 0
        # Beside what is counted there are the numbers of the calls in flight, and counts per block.
        assert torch.cuda.max_memory_allocated() - before <= limit + (4 << 20)


@needs_gpu
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_out_of_memory(method, models, tmp_path):
    """Where the GPU has less than the budget says, chunks shrink and the merge goes on."""
    folders = models((BF16,) * 3, vocabulary=6_000_011, layers=1)  # 96 MB for each of the large tensors
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (128 << 20)) / total)
    try:
        same(recipe(method, folders), tmp_path, **options(gpu_memory="16GiB"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_without_the_cuda_module(models, tmp_path, monkeypatch):
    """Triton alone does it."""
    monkeypatch.setitem(native._loaded, "_C_cuda", "not built")
    given = {} if GPU else {"backend": "triton"}
    done = same(recipe("linear", models((BF16,) * 3)), tmp_path, device=DEVICE, **given)
    assert done.backend == "triton"


def test_auto(models, tmp_path):
    same(recipe("task_arithmetic", models((BF16,) * 3)), tmp_path, device="auto")


@pytest.mark.parametrize("device", ["cuda:99", "cuda"] if not GPU else ["cuda:99"])
def test_a_gpu_that_is_not_there(device, models, tmp_path):
    with pytest.raises(BackendError, match=device):
        seme.merge(recipe("linear", models((BF16,) * 3)), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", chosen([float("inf"), float("nan")], [float("nan")]))
def test_nonfinite(value, backend, tmp_path):
    """Named with its tensor; zeroed if asked for, as on the CPU."""
    tensors = checkpoints.decoder(2, BF16, layers=1, vocab=VOCABULARY)
    tensors["lm_head.weight"][-1, -1] = value
    others = [
        checkpoints.write(tmp_path / f"m{i}", checkpoints.decoder(i, BF16, layers=1, vocab=VOCABULARY)) for i in (0, 1)
    ]
    folders = [*others, checkpoints.write(tmp_path / "broken", tensors)]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*inf or NaN"):
        seme.merge(recipe("task_arithmetic", folders), tmp_path / "out", **options(backend))
    assert not (tmp_path / "out").exists()
    for name in ("zero", "keep"):
        for device, given in (("cpu", {"backend": "cpu"}), (DEVICE, {"backend": backend})):
            out = tmp_path / f"{name}-{device}-{given['backend']}"
            seme.merge(recipe("task_arithmetic", folders), out, device=device, nonfinite=name, **given)
    ours, theirs = (checkpoints.read(tmp_path / f"zero-{d}") for d in (f"{DEVICE}-{backend}", "cpu-cpu"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (checkpoints.read(tmp_path / f"keep-{d}") for d in (f"{DEVICE}-{backend}", "cpu-cpu"))
    assert all(torch.equal(ours[name].nan_to_num(7), theirs[name].nan_to_num(7)) for name in theirs)


# The bounds of docs/numerics.md, for task vectors in float32 relative to their norm. The products of ``seme`` have
# Triton kernels; CUDA C++ is for the others.


@pytest.mark.parametrize(
    ("parameters", "limit"), chosen([({"flatten": 0.0}, 1e-4), ({}, 2e-3), ({"rule": "elect"}, 1e-4)], [({}, 2e-3)])
)
def test_seme_is_within_its_bound(parameters, limit, models, tmp_path):
    folders = models((F32,) * 3, vocabulary=chosen(4099, 41))
    given = recipe("seme", folders) | {"parameters": parameters}
    seme.merge(given, tmp_path / "cpu", device="cpu", backend="cpu", threads=1)
    seme.merge(given, tmp_path / "gpu", **options())
    base, ours, theirs = (checkpoints.read(f) for f in (folders[0], tmp_path / "gpu", tmp_path / "cpu"))
    for name, tensor in theirs.items():
        change, off = tensor.double() - base[name], ours[name].double() - tensor
        assert off.norm() <= limit * change.norm(), name


def test_seme_in_bfloat16(models, tmp_path):
    """The kernels round task vectors to bfloat16, and the result is rounded to it: a step apart here and there."""
    folders = models((BF16,) * 3, vocabulary=chosen(4099, 41))
    given = recipe("seme", folders)
    seme.merge(given, tmp_path / "cpu", device="cpu", backend="cpu", threads=1)
    seme.merge(given, tmp_path / "gpu", **options())
    base, ours, theirs = (checkpoints.read(f) for f in (folders[0], tmp_path / "gpu", tmp_path / "cpu"))
    for name, tensor in theirs.items():
        change, off = tensor.double() - base[name].double(), ours[name].double() - tensor.double()
        # Task vectors off by 2^-9 of themselves, and two roundings of 2^-9 of the result.
        assert off.norm() <= 2.0**-8 * (2 * change.norm() + tensor.double().norm()), name


@pytest.mark.parametrize("dtype", chosen([BF16, F32, F16, F64], [BF16]), ids=str)
@pytest.mark.parametrize("method", chosen(tuple(RECIPES), ("task_arithmetic",)))
def test_state_dicts(method, dtype, backend):
    """Tensors that are on the device already."""
    states = [
        checkpoints.decoder(i, dtype, layers=1, vocab=chosen(4099, 17)) for i in range(2 if method == "slerp" else 3)
    ]
    given = {"base": None if method == "linear" else 0, "parameters": RECIPES[method]["parameters"]}
    expected = seme.merge_state_dicts(states, method, backend="cpu", **given)
    moved = [{name: t.to(DEVICE) for name, t in state.items()} for state in states]
    found = seme.merge_state_dicts(moved, method, backend=backend, **given)
    for name, tensor in expected.items():
        assert found[name].device.type == DEVICE
        assert torch.equal(found[name].cpu(), tensor), name
