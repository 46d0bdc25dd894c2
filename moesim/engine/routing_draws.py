"""Expert counts of single steps, drawn from the judged loads: the routing that a deployment meets."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.dispersion import Dispersion, dispersion_of
from moesim.routing.laws import CountSampler, sampler_of
from moesim.routing.trace import RoutingCounts

# Bytes of drawn counts that are kept for plans that ask for the same ones; the oldest go first.
KEPT_BYTES = 192 * 2**20


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
        self._kept: OrderedDict[tuple[object, ...], NDArray[np.generic]] = OrderedDict()
        self._kept_bytes = 0

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

    def seeded_counts(self, load: int, tokens: ArrayLike, seed: Sequence[int]) -> NDArray[np.float64]:
        """`counts` of a generator with this seed, one request for each token; drawn once, then remembered.

        They depend on no placement, schedule or backend, so plans that form the same steps meet the same draws.
        """
        sizes = np.asarray(tokens, dtype=np.float64)
        key = (load, sizes.tobytes(), tuple(seed))
        found = self._kept.get(key)
        if found is None:
            drawn = self.counts(load, sizes, np.random.default_rng(list(seed)))
            found = _compact(drawn)
            self._kept[key] = found
            self._kept_bytes += found.nbytes
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        else:
            self._kept.move_to_end(key)
        return found.astype(np.float64)


def _compact(counts: NDArray[np.float64]) -> NDArray[np.generic]:
    """The same numbers in two bytes each where they are whole and small, as counts mostly are."""
    if counts.max(initial=0.0) > np.iinfo(np.uint16).max:
        return counts
    small = counts.astype(np.uint16)
    return small if np.array_equal(small, counts) else counts


class _Same:
    """A load as a key: the very object, whatever its arrays hold."""

    def __init__(self, load: RoutingCounts) -> None:
        self.load = load

    def __hash__(self) -> int:
        return id(self.load)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.load is other.load


def shared_draws(loads: Sequence[RoutingCounts], top_k: int) -> RoutingDraws:
    """The draws of these very loads: one object for all plans that are judged on them."""
    return _shared_draws(tuple(_Same(load) for load in loads), top_k)


@functools.lru_cache(maxsize=4)
def _shared_draws(loads: tuple[_Same, ...], top_k: int) -> RoutingDraws:
    return RoutingDraws([one.load for one in loads], top_k)
