"""Semantics of the latent space: bases of the labels, resolution into them, transfer between models."""

from seme.semantics.bases import SemanticBases
from seme.semantics.resolve import MODES, coefficients, recompose, resolution, round_trip
from seme.semantics.transfer import Transfer, shared_labels, transfer

__all__ = [
    "MODES",
    "SemanticBases",
    "Transfer",
    "coefficients",
    "recompose",
    "resolution",
    "round_trip",
    "shared_labels",
    "transfer",
]
