"""When requests come."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def poisson(requests_per_s: float, requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times [requests] of a Poisson process, in seconds from the start."""
    return np.cumsum(rng.exponential(1.0 / requests_per_s, size=requests))


def gamma(requests_per_s: float, burstiness: float, requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times [requests] whose gaps are gamma distributed with shape `burstiness`, in seconds from the start.

    The squared coefficient of variation of the gaps is 1 / burstiness; 1 is a Poisson process.
    """
    return np.cumsum(rng.gamma(burstiness, 1.0 / (requests_per_s * burstiness), size=requests))
