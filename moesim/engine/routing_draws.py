"""Expert counts of single steps, drawn from the judged loads: the routing that a deployment meets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.dispersion import Dispersion, dispersion_of
from moesim.routing.laws import CountSampler, sampler_of
from moesim.routing.trace import RoutingCounts


class RoutingDraws:
    """Prepared draws for each judged load.

    weights: float64 [loads], the loads' own weights, sum 1. dispersion: how steps differ beyond chance.
    """

    def __init__(self, loads: Sequence[RoutingCounts], top_k: int, dispersion: Dispersion | None = None) -> None:
        self.loads = tuple(loads)
        self.top_k = top_k
        self.dispersion = dispersion or dispersion_of(loads, top_k=top_k)
        weights = np.asarray([load.weight for load in loads])
        self.weights: NDArray[np.float64] = weights / weights.sum()
        self.samplers: list[CountSampler] = [sampler_of(load, top_k) for load in loads]

    def for_phase(self, phase: str) -> list[int]:
        """Indices of the loads of a phase; of all loads where none is marked with it."""
        chosen = [index for index, load in enumerate(self.loads) if load.phase in (phase, "any")]
        return chosen or list(range(len(self.loads)))

    def counts(
        self, load: int, tokens: ArrayLike, rng: np.random.Generator, *, requests: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Counts [steps, layers, experts] of steps with `tokens` [steps] tokens (rounded) over all ranks, at least 1.

        requests: [steps] whose tokens these are; none = one each, as in decode.
        """
        whole = np.maximum(1, np.rint(np.asarray(tokens, dtype=np.float64))).astype(np.int64)
        return self.samplers[load].counts(whole, rng, self.dispersion, requests=requests)
