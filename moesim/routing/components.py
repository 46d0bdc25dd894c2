"""How much of routing's over-dispersion is of requests, of domains and of time, fitted on records that tell them apart.

An expert's chance of being picked in a token is its mean times a factor for the token's request, one for its domain and
one for its step, each of mean 1 with a squared coefficient of variation of its own. Two different tokens then agree in
an expert, in the mean, by chance^2 times 1 + cv2 of every factor that they share. So each component is a quotient of
agreements between pairs of tokens that share it and pairs that do not, all else alike (an analysis of variance by
moments; U-statistics, Hoeffding 1948). No model of how tokens are drawn enters, only that they are drawn apart: pairs
of one token with itself are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.records import Records
from moesim.routing.trace import RoutingCounts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Picks of a mean expert from which on a load counts picks; one that holds shares has about one in all.
COUNTED = 1.0


@dataclass(frozen=True)
class Component:
    """A squared coefficient of variation and its standard error (jackknife over layers; None with fewer than two)."""

    cv2: float
    error: float | None


@dataclass(frozen=True)
class Components:
    """What a trace shows of each; None where it does not tell."""

    request: Component | None
    domain: Component | None
    time: Component | None


@dataclass(frozen=True)
class _Pairs:
    """Agreements [layers] of a set of pairs of tokens, and how many pairs there are [layers]."""

    agree: Floats
    pairs: Floats

    def __sub__(self, other: _Pairs) -> _Pairs:
        return _Pairs(self.agree - other.agree, self.pairs - other.pairs)

    def __add__(self, other: _Pairs) -> _Pairs:
        return _Pairs(self.agree + other.agree, self.pairs + other.pairs)


def fit_components(records: Records, top_k: int = 1) -> Components:
    """Fit what the labels of the records tell apart.

    request: tokens of one request against others of the same step and domain. time: requests of one step against those
    of other steps, same domain. domain: requests of one domain against those of others, other steps where there are
    steps. Without request labels a cell's tokens count as of different requests, so that requests are in `time`, an
    upper bound then. Estimates may be negative; a component of truth 0 is as often so as not.
    """
    counts = records.counts
    tokens = counts.sum(axis=2) / top_k
    cells = len(counts)
    one = np.zeros(cells, dtype=np.int64)
    step = one if records.step is None else records.step
    domain = one if records.domain is None else records.domain
    if cells == 0:
        raise BadInput("there are no records", mend="record a loaded server")

    def within(*labels: Ints) -> _Pairs:
        _, group = np.unique(np.stack(labels, axis=1), axis=0, return_inverse=True)
        groups = int(group.max()) + 1
        sums, sizes = np.zeros((groups, *counts.shape[1:])), np.zeros((groups, counts.shape[1]))
        np.add.at(sums, group.ravel(), counts)
        np.add.at(sizes, group.ravel(), tokens)
        return _Pairs((sums**2).sum(axis=(0, 2)), (sizes**2).sum(axis=0))

    itself = _Pairs(counts.sum(axis=(0, 2)), tokens.sum(axis=0))
    if records.request is None:
        same, same_step = itself, itself
    else:
        same, same_step = within(records.request), within(records.request, step)
    near = within(domain, step) - same_step  # same domain and step, another request
    later = within(domain) - within(domain, step) - (same - same_step)  # same domain, another step and request
    of_time = _quotient(near, later) if records.step is not None else None
    spread = later if records.step is not None else near
    others = within(one) - within(domain) - within(step) + within(domain, step)
    if records.step is None:
        others = within(one) - within(domain)
    return Components(
        request=None if records.request is None else _quotient(same_step - itself, near),
        domain=None if records.domain is None else _quotient(spread, others),
        time=of_time,
    )


def _quotient(shared: _Pairs, apart: _Pairs) -> Component | None:
    """cv2 of what the first pairs share and the second do not; None where there are no such pairs."""
    least = 1e-9 * max(float(shared.pairs.max()), float(apart.pairs.max()), 1.0)
    if (shared.pairs <= least).any() or (apart.pairs <= least).any():
        return None
    upper, lower = shared.agree / shared.pairs, apart.agree / apart.pairs
    if lower.sum() <= 0:
        return None
    found = float(upper.sum() / lower.sum()) - 1.0
    layers = len(upper)
    if layers < 2:
        return Component(found, None)
    without = (upper.sum() - upper) / (lower.sum() - lower) - 1.0
    error = float(np.sqrt((layers - 1) / layers * ((without - without.mean()) ** 2).sum()))
    return Component(found, error)


def between_loads(loads: Sequence[RoutingCounts], top_k: int) -> Component | None:
    """The domain component of loads that are one domain each: how far their mean shares are apart.

    None for fewer than two, and for loads that hold shares instead of counts, whose scatter is not known.
    """
    counts = np.stack([load.counts.sum(axis=0) for load in loads])
    if len(loads) < 2 or (counts.sum(axis=2) < COUNTED * counts.shape[2]).any():
        return None
    scale = counts.sum(axis=2, keepdims=True).min() / counts.sum(axis=2, keepdims=True)
    return fit_components(Records(counts * scale, domain=np.arange(len(loads))), top_k).domain
