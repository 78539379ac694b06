"""How a call finds its backend, and what it says when it is wrong."""

import pytest
import torch

from seme import native
from seme.errors import BackendError, OpError
from seme.ops import _op as op_module
from seme.ops import magnitude_histogram, task_vector_sum, ties, weighted_sum

X = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_sum([], []), "weighted_sum: no tensors given"),
        (lambda: weighted_sum([X], [1.0, 2.0]), "weighted_sum: weights has 2 entries for 1 tensors"),
        (lambda: weighted_sum([X, X[:2]], [1, 1]), r"weighted_sum: tensor 1 has shape \[2\], tensor 0 has \[3\]"),
        (lambda: weighted_sum([X.int()], [1]), "weighted_sum: tensor 0 is int32; supported: float32"),
        (lambda: weighted_sum([X], [1], compute_dtype=torch.int8), "compute_dtype int8 is not a floating-point"),
        (lambda: weighted_sum([X], [1], out=X[:2]), r"weighted_sum: out is \[2\] float32, expected \[3\] float32"),
        (lambda: task_vector_sum(X, [X], []), "task_vector_sum: weights has 0 entries for 1 tensors"),
        (lambda: ties(X, [], [], thresholds=[], tie_quotas=[]), "ties: no tensors besides the base"),
        (lambda: ties(X, [X], [1], thresholds=[-1], tie_quotas=[0]), r"ties: thresholds\[0\] is -1"),
        (lambda: magnitude_histogram(X, [X], lowest=[0], shift=[48]), "magnitude_histogram: shift"),
        (lambda: weighted_sum([X, X.to("meta")], [1, 1]), "tensors on cpu and meta; one device expected"),
    ],
)
def test_messages(call, message):
    with pytest.raises(OpError, match=message):
        call()


def test_unknown_and_unusable_backends():
    with pytest.raises(BackendError, match="unknown backend 'gpu'; known: auto, torch, cpu, triton, cuda"):
        weighted_sum([X], [1], backend="gpu")
    with pytest.raises(BackendError, match="backend cuda: backend cuda works on CUDA tensors, not on cpu"):
        weighted_sum([X], [1], backend="cuda")


def test_environment_changes_auto(monkeypatch):
    monkeypatch.setenv("SEME_BACKEND", "cuda")
    with pytest.raises(BackendError):
        weighted_sum([X], [1])
    weighted_sum([X], [1], backend="torch")


def test_without_the_module_torch_computes_and_warns_once(monkeypatch):
    monkeypatch.setitem(native._loaded, "_C", "not built")
    monkeypatch.setattr(op_module, "_warned", False)
    with pytest.warns(UserWarning, match="no fast kernels for cpu"):
        assert weighted_sum([X], [2.0]).tolist() == [2, 2, 2]
    with pytest.raises(BackendError, match="not built"):
        weighted_sum([X], [1], backend="cpu")


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="interpreter"):
        weighted_sum([X], [1], backend="triton")


def test_out_may_be_an_input():
    a, b = torch.arange(5.0), torch.ones(5)
    weighted_sum([a, b], [1, 1], out=a)
    assert a.tolist() == [1, 2, 3, 4, 5]
