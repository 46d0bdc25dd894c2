"""Joint draws of what is not known: the shared errors of the cost model, and which routing the deployment will meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Families of cost parameters that err together; see Estimate.family. LATER are drawn from a stream of their own: the
# draws of the first are what they were before there were others.
FAMILIES = ("attention", "collective", "dispatch", "experts", "gemm", "memory_bound", "overhead")
LATER = ("host_copy",)
LEVEL = 0.9


@dataclass(frozen=True)
class Draw:
    """One possible truth: standard normal by cost family, and a weight for each judged load (sum 1).

    All prices of a family err together, each by its own table's error: see `Part.seconds`.
    """

    normal: dict[str, float]
    load_weights: NDArray[np.float64]


def joint_draws(count: int, weights: NDArray[np.float64], seed: int) -> list[Draw]:
    """Seeded draws, the same for every plan that is compared.

    weights: [loads], the judged loads' own. Drawn weights come from a Bayesian bootstrap over the judged loads (Rubin,
    Annals of Statistics 9, 1981), whose mean is the loads' own weights: the deployment meets one mix of them, and it is
    not known which.
    """
    chances = len(weights) * weights / weights.sum()
    rng = np.random.default_rng([seed, 3])
    later = np.random.default_rng([seed, 10])
    found = []
    for _ in range(count):
        normal = {name: float(rng.standard_normal()) for name in FAMILIES}
        normal |= {name: float(later.standard_normal()) for name in LATER}
        found.append(Draw(normal, rng.dirichlet(chances)))
    return found


def interval(values: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Central interval of drawn values."""
    tail = (1.0 - level) / 2.0 * 100.0
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)
