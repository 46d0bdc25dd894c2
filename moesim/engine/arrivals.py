"""When requests come."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def poisson(requests_per_s: float, requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times [requests] of a Poisson process, in seconds from the start."""
    return np.cumsum(rng.exponential(1.0 / requests_per_s, size=requests))
