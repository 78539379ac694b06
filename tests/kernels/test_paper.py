"""docs/gpu.md: what ops cost on paper is there for all of them, and the page says what the formulas say."""

import json

import pytest
import torch

from benchmarks import matrix, ops, paper, tables
from benchmarks.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "gpu.md"
SIZES = paper.Sizes()


def test_every_op_has_a_formula():
    assert paper.missing() == set()


def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert all(f"<!-- table {name} -->" in page for name in paper.TABLES)
    assert tables.fill(page, RESULTS) == page, "python -m benchmarks.tables"


def test_bytes_are_those_that_the_benchmark_counts():
    counted = {key: case.bytes(SIZES.elements) for key, case in ops.cases(0).items()}
    for op, cost in paper.ELEMENT_WISE.items():
        assert cost.bytes(SIZES) == counted[f"{op} {cost.inputs}"], op


def test_flops_are_those_that_the_benchmark_counts():
    sizes = matrix.Sizes(SIZES.rows, SIZES.few, SIZES.width, SIZES.labels, torch.bfloat16)
    for op, (m, k, n), dtype in sizes.products().values():
        cost, product = paper.MATRIX[op], 2 * m * k * n
        if op == "weighted_gram":
            product *= 10  # of a tenth of the rows
        if op == "resolve":  # the benchmark counts the selection
            product += SIZES.few * SIZES.k * (SIZES.k + 6) * SIZES.width
        assert cost.flops(SIZES) == product, op
        assert cost.arithmetic == {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def test_floor_is_the_slower_of_memory_and_arithmetic():
    gpu = paper.Gpu("one", 1e9, {"fp32": 4e9})
    for flops, fused, expected in ((1e9, True, 1.0), (8e9, True, 2.0), (8e9, False, 4.0)):
        cost = paper.Cost("", lambda s, flops=flops: flops, lambda s: 1e9, "fp32", "")
        assert paper.floor(cost, SIZES, gpu, fused) == pytest.approx(expected)


def test_what_was_measured_is_filled_in(tmp_path):
    run = {"date": "2030-01-02T03:04:05Z", "commit": "0123456789abcdef", "machine": {"gpu": {"name": "NVIDIA H200"}}}
    entries = {
        "ties 1+3, quota": {"run": "a", "of_copy": {"triton": 0.625, "cuda": 0.5}},
        "selection, 32 labels": {"run": "a", "of_product": {"cuda": 0.5}},
        "elect 1+3, 4096 rows": {"run": "a", "of_product": {"triton": 0.75, "torch": 0.25}},
    }
    (tmp_path / "gpu-h200.json").write_text(json.dumps({"runs": {"a": run}, "entries": entries}))
    where = "H200, 2030-01-02, 0123456789"
    assert paper.measured("ties", tmp_path) == f"1+3, quota: triton 0.62, cuda 0.50 of copy, {where}"
    assert paper.measured("elect", tmp_path) == f"1+3, 4096 rows: triton 0.75 of cuBLAS, {where}"
    assert paper.measured("resolve", tmp_path) == f"selection, 32 labels: cuda 0.50 of cuBLAS, {where}"
    assert paper.measured("elect_select", tmp_path) == paper.NOT_RUN
    assert "not yet run" in paper.element_wise_table(tmp_path)
