"""How evenly tokens are spread over experts: entropy and utilisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Edges of the utilisation histogram, in mean loads: an expert at 1 has its even share.
UTILISATION_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)


def routing_entropy(counts: Floats) -> Floats:
    """Entropy [...] of counts [..., experts] over that of even routing: 1 is even, 0 one expert; no tokens: 1."""
    experts = counts.shape[-1]
    total = counts.sum(axis=-1, keepdims=True)
    share = counts / np.where(total > 0, total, 1.0)
    nats = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return np.asarray(np.where((total[..., 0] > 0) & (experts > 1), nats / np.log(max(experts, 2)), 1.0))


def utilisation(counts: Floats) -> Floats:
    """Load of each expert over the mean of its layer [..., experts]; 0 where there are no tokens."""
    mean = counts.mean(axis=-1, keepdims=True)
    return np.asarray(counts / np.where(mean > 0, mean, 1.0))


def utilisation_histogram(counts: Floats) -> Floats:
    """Share of experts, over all leading axes, between UTILISATION_EDGES and above the last: [len(edges)]."""
    edges = np.append(np.asarray(UTILISATION_EDGES), np.inf)
    found, _ = np.histogram(utilisation(counts), bins=edges)
    return np.asarray(found / max(int(found.sum()), 1))
