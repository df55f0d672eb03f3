"""Continuous stand-ins for sampled codes: a distribution over a codebook, and its expectation."""

from softgen.relaxation.diagnostics import Sharpness, decoding_gap, sharpness
from softgen.relaxation.expectation import expected_embedding, probabilities
from softgen.relaxation.gumbel import gumbel_noise, gumbel_softmax_st
from softgen.relaxation.neighbours import (
    Distance,
    auto_two_tau_squared,
    neighbour_distribution,
    neighbour_logits,
    perplexity,
)
from softgen.relaxation.precision import full_precision, widen
from softgen.relaxation.relaxed import Relaxation

__all__ = [
    "Distance",
    "Relaxation",
    "Sharpness",
    "auto_two_tau_squared",
    "decoding_gap",
    "expected_embedding",
    "full_precision",
    "gumbel_noise",
    "gumbel_softmax_st",
    "neighbour_distribution",
    "neighbour_logits",
    "perplexity",
    "probabilities",
    "sharpness",
    "widen",
]
