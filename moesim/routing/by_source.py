"""From which rank an expert's tokens come, where counts are of a whole step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def split_by_source(counts: Floats, source_tokens: Ints, rng: np.random.Generator) -> Floats:
    """Counts float64 [steps, layers, source rank, experts] drawn from counts [steps, layers, experts] of the step.

    source_tokens: int64 [steps, ranks], tokens of each rank. Assumed: which tokens picked an expert does not depend on
    their rank, so that an expert's n tokens are n of the step's, drawn without replacement (multivariate
    hypergeometric). An expert's sum over ranks is its count, and no rank gives it more than its tokens; a rank's own
    picks sum to tokens x top_k on average only. Raises BadInput when an expert has more tokens than the step.
    """
    left = np.rint(counts).astype(np.int64)
    rest = source_tokens.sum(axis=1)[:, None, None]
    if (left > rest).any():
        raise BadInput("an expert has more tokens than its step", mend="give the tokens of all ranks")
    out = np.zeros((*counts.shape[:2], source_tokens.shape[1], counts.shape[2]))
    for rank in range(source_tokens.shape[1]):
        held = source_tokens[:, rank, None, None]
        rest = rest - held
        drawn = rng.hypergeometric(np.broadcast_to(held, left.shape), np.broadcast_to(rest, left.shape), left)
        out[:, :, rank] = drawn
        left = left - drawn
    return out
