"""Continuous stand-ins for sampled codes: a distribution over a codebook, and its expectation."""

from softgen.relaxation.codebook_attention import logsumexp_linear, soft_embedding
from softgen.relaxation.diagnostics import Sharpness, decoding_gap, sharpness
from softgen.relaxation.distance_attention import expected_code
from softgen.relaxation.expectation import expected_embedding, probabilities
from softgen.relaxation.gumbel import gumbel_noise, gumbel_softmax_st
from softgen.relaxation.neighbour_loss import neighbour_cross_entropy, neighbour_entropy
from softgen.relaxation.neighbour_table import NeighbourTable, codebook_hash
from softgen.relaxation.neighbours import (
    Distance,
    auto_two_tau_squared,
    neighbour_distribution,
    neighbour_logits,
    perplexity,
)
from softgen.relaxation.precision import full_precision, widen
from softgen.relaxation.relaxed import Relaxation
from softgen.relaxation.sparse_loss import linear_cross_entropy
from softgen.relaxation.streaming import DENSE_LIMIT, Impl

__all__ = [
    "DENSE_LIMIT",
    "Distance",
    "Impl",
    "NeighbourTable",
    "Relaxation",
    "Sharpness",
    "auto_two_tau_squared",
    "codebook_hash",
    "decoding_gap",
    "expected_code",
    "expected_embedding",
    "full_precision",
    "gumbel_noise",
    "gumbel_softmax_st",
    "linear_cross_entropy",
    "logsumexp_linear",
    "neighbour_cross_entropy",
    "neighbour_distribution",
    "neighbour_entropy",
    "neighbour_logits",
    "perplexity",
    "probabilities",
    "sharpness",
    "soft_embedding",
    "widen",
]
