"""TSV-M and Iso-C: properties that their papers state."""

import pytest
import torch

import seme
from seme.methods import get


def models(shape=(30, 20), experts=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [base, *(base + 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(experts))]


def merge(method, tensors, **parameters):
    return seme.merge_state_dicts([{"w": t} for t in tensors], method, base=0, parameters=parameters)["w"]


def test_iso_c_has_a_flat_spectrum_of_the_same_sum():
    tensors = models()
    found = torch.linalg.svdvals(merge("iso_c", tensors) - tensors[0])
    total = torch.linalg.svdvals(sum(tensors[1:]) - 3 * tensors[0])
    assert torch.allclose(found, total.mean().expand(20))
    assert not torch.allclose(total, total.mean().expand(20))


def test_iso_c_does_not_amplify_directions_that_are_zero():
    base = torch.zeros(30, 20, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    tuned = [base + thin @ torch.randn(3, 20, dtype=torch.float64, generator=generator) for _ in range(2)]
    assert (torch.linalg.svdvals(merge("iso_c", [base, *tuned])) > 1e-6).sum() == 3


def test_tsv_m_of_orthogonal_experts_is_their_sum():
    """Whitening changes nothing where the kept vectors of different experts are orthogonal already."""
    base = torch.zeros(12, 12, dtype=torch.float64)
    tuned = []
    for i in range(3):
        tensor = torch.zeros_like(base)
        block = slice(4 * i, 4 * i + 4)
        tensor[block, block] = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        tuned.append(tensor)
    assert torch.allclose(merge("tsv_m", [base, *tuned]), sum(tuned))


def test_tsv_m_whitens_what_overlaps():
    """The singular values of the merge are those that were kept of each expert, whatever their vectors were."""
    tensors = models()
    found = torch.linalg.svdvals(merge("tsv_m", tensors) - tensors[0])
    kept = torch.cat([torch.linalg.svdvals(t - tensors[0])[:6] for t in tensors[1:]])
    assert torch.allclose(found[:18], kept.sort(descending=True).values)
    assert torch.allclose(found[18:], torch.zeros(2, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_reference_weights_scale_and_vectors(method):
    for shape in ((30, 20), (20, 30), (7,), (2, 9), (1, 1)):
        tensors = models(shape)
        found = merge(method, [t.float() for t in tensors], weight=[1.0, 2.0, 0.5], **{"lambda": 0.6})
        inputs = [t.float() for t in tensors]
        wanted = get(method).reference(inputs, base=0, weight=[1.0, 2.0, 0.5], lambda_=0.6)
        # float32 SVDs against float64 ones: errors of some ulp times the spread of the singular values.
        assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_tsv_m_of_what_did_not_move_or_does_not_count(weight):
    """An expert that is the base, or has no weight, takes no share of the rank."""
    base, first, second, third = models()
    wanted = merge("tsv_m", [base, first, second])
    other = base if weight else third
    assert torch.equal(merge("tsv_m", [base, first, second, other], weight=[1.0, 1.0, weight]), wanted)


def test_tsv_m_of_low_rank_experts_in_orthogonal_spaces_is_their_sum():
    gen = torch.Generator().manual_seed(3)
    base = torch.randn(30, 20, generator=gen)
    left, right = (
        torch.linalg.qr(torch.randn(30, 4, generator=gen))[0],
        torch.linalg.qr(torch.randn(20, 4, generator=gen))[0],
    )
    deltas = [left[:, i : i + 2] @ right[:, i : i + 2].T for i in (0, 2)]
    found = merge("tsv_m", [base, *(base + d for d in deltas)])
    assert torch.allclose(found, base + sum(deltas), atol=1e-5)  # float32 sums of numbers near 1


def test_no_expert_moved():
    base = models()[0]
    for method in ("tsv_m", "iso_c"):
        assert torch.equal(merge(method, [base, base, base]), base)
