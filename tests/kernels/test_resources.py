"""Registers, spills and shared memory of every compiled kernel are those that are on record.

After a change that is meant: ``python scripts/kernel_resources.py`` and a look at the diff of the record.
"""

import copy
import json

import pytest

from scripts.kernel_resources import RECORD, SLACK, compare, cuda_resources, nvcc_version, triton_resources

RECORDED = json.loads(RECORD.read_text())
ADVICE = "if this is meant: python scripts/kernel_resources.py"


def test_triton_kernels_are_on_record(compiled):
    differences = compare(RECORDED["triton"], compiled["triton"], triton_resources(compiled))
    assert not differences, "\n".join([*differences, ADVICE])


def test_cuda_kernels_are_on_record(built):
    differences = compare(RECORDED["cuda"], nvcc_version(), cuda_resources(built.log))
    assert not differences, "\n".join([*differences, ADVICE])


def test_every_cuda_kernel_is_accounted_for(built):
    """The compiler's words are parsed: as many kernels as there are entry points in the assembly."""
    kernels = cuda_resources(built.log)
    for gpu in ("sm_80", "sm_90a"):
        entries = sum(text.count(".entry ") for (_, target), text in built.assembly.items() if target == gpu)
        assert sum(name.startswith(f"{gpu} ") for name in kernels) == entries > 0


@pytest.mark.parametrize("kind", RECORDED)
def test_what_is_recorded_is_within_limits(kind):
    """255 registers are what a thread can have. Beyond them a few numbers may be put aside; sums that go through memory
    in every step would be thousands of bytes, and only those of more than 4 experts in float64 are."""
    for name, used in RECORDED[kind]["kernels"].items():
        assert 0 < used["registers"] <= 255, name
        assert used["spill"] < 256 or "coordinates_kernel<Scalar<ComputeF64, 16>, 8" in name, (name, used)


@pytest.mark.parametrize("kind", RECORDED)
def test_comparison_sees_what_changes(kind):
    kept = RECORDED[kind]
    name = next(iter(kept["kernels"]))

    def differences(compiler=kept["compiler"], **changes):
        kernels = copy.deepcopy(kept["kernels"])
        for what, by in changes.items():
            kernels[name][what] += by
        return compare(kept, compiler, kernels)

    assert differences() == []
    assert differences(registers=SLACK) == []
    assert len(differences(registers=SLACK + 1)) == 1
    assert len(differences(shared=16)) == 1
    assert len(differences(spill=4)) == 1
    assert differences("another", registers=100, shared=16) == []
    assert len(differences("another", spill=4)) == 1
    fewer = {k: v for k, v in kept["kernels"].items() if k != name}
    assert compare(kept, kept["compiler"], fewer) == [f"{name}: recorded, not compiled"]
    assert compare({**kept, "kernels": fewer}, kept["compiler"], kept["kernels"]) == [f"{name}: no record"]
