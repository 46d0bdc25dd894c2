"""Counts of a step under gates whose tokens do not each pick top_k experts by chance: even by rule, or as many as they
need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.dispersion import NONE, Dispersion
from moesim.routing.inclusion import cap_shares
from moesim.routing.sample import prepare
from moesim.routing.trace import RoutingCounts

Floats = NDArray[np.float64]


class CountSampler(Protocol):
    """Draws the counts of steps."""

    def counts(
        self,
        tokens: ArrayLike,
        rng: np.random.Generator,
        dispersion: Dispersion = NONE,
        *,
        requests: ArrayLike | None = None,
    ) -> Floats:
        """Counts float64 [steps, layers, experts] of passes with `tokens` int [steps], all ranks together."""
        ...


@dataclass(frozen=True)
class EvenSampler:
    """All experts get the same; what tokens x picks leaves over goes to experts drawn at random, one each."""

    layers: int
    experts: int
    picks: int

    def counts(
        self,
        tokens: ArrayLike,
        rng: np.random.Generator,
        dispersion: Dispersion = NONE,
        *,
        requests: ArrayLike | None = None,
    ) -> Floats:
        """See CountSampler; each layer of a step sums to tokens x picks. There is nothing to disperse."""
        steps = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
        whole = steps * self.picks
        order = rng.random((len(steps), self.layers, self.experts)).argsort(axis=2)
        return np.asarray(whole // self.experts, dtype=np.float64)[:, None, None] + (
            order < (whole % self.experts)[:, None, None]
        )


@dataclass(frozen=True)
class VariableSampler:
    """Tokens pick as many experts as they need; each expert's count is binomial, drawn on its own.

    chance: float64 [layers, experts], mean picks of an expert by one token. That experts are drawn apart is assumed: it
    leaves the mean and each expert's variance exact and the number of picks of a step free.
    """

    chance: Floats

    def counts(
        self,
        tokens: ArrayLike,
        rng: np.random.Generator,
        dispersion: Dispersion = NONE,
        *,
        requests: ArrayLike | None = None,
    ) -> Floats:
        """See CountSampler; the dispersion shakes each expert's chance by a gamma factor of mean 1."""
        steps = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
        cv2 = np.broadcast_to(dispersion.step_cv2(steps if requests is None else requests), steps.shape)
        chance = np.broadcast_to(self.chance, (len(steps), *self.chance.shape))
        if (cv2 > 0).any():
            spread = np.maximum(cv2, 1e-12)[:, None, None]
            chance = chance * rng.gamma(1.0 / spread, spread, size=chance.shape)
        return rng.binomial(steps[:, None, None], np.minimum(chance, 1.0)).astype(np.float64)


def sampler_of(load: RoutingCounts, top_k: int) -> CountSampler:
    """The draws that a load's law asks for. Raises BadInput (see moesim.routing.sample.prepare)."""
    if load.law == "even":
        return EvenSampler(load.counts.shape[1], load.experts, top_k)
    if load.law == "variable":
        return VariableSampler(load.counts[0])
    # Shares estimated under another gate may pass what top_k allows by the noise of their sample.
    profile = load.profile() if load.picks is None else cap_shares(load.profile(), top_k)
    return prepare(profile, top_k, where=load.name)
