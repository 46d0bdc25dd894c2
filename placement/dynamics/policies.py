"""The plain policies: never, once, every n steps, a threshold with hysteresis, ski rental."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from placement.dynamics.series import KEEP, Choice, Floats, Ints, Prices
from placement.solvers.repack import descend, hottest_each, row_moves

Fit = Callable[[Floats, Ints], Ints]
"""A fresh solution of a load [layers, experts], its ranks matched to a table [layers, slots]."""

EVERY = (1, 5, 10, 25, 50, 100)
"""Intervals that are tried, the best in hindsight."""

RISE, REST = 0.1, 10
"""Threshold: acts where max/mean is a tenth over what the last re-layout brought, and rests ten steps between two."""

TOLERANCE = 1e-4
"""A path of changes ends when the hottest rank is within this share of the mean, as the default solver's swaps do."""


@dataclass
class Never:
    """Keeps what is."""

    name: str = "never"

    def choose(self, past: Floats, table: Ints) -> Choice:
        """As it is."""
        del past, table
        return KEEP


@dataclass
class Every:
    """A fresh solution every n steps from the counts of the last n, as SGLang does; once: only the first time."""

    n: int
    fit: Fit
    once: bool = False

    @property
    def name(self) -> str:
        """With its n."""
        return f"once after {self.n}" if self.once else f"every {self.n}"

    def choose(self, past: Floats, table: Ints) -> Choice:
        """Where a multiple of n steps is over."""
        steps = len(past)
        if steps == 0 or steps % self.n or (self.once and steps > self.n):
            return KEEP
        return Choice(self.fit(past[-self.n :].sum(axis=0), table), len(table))


@dataclass
class Threshold:
    """A fresh solution where max/mean has risen since the last one; the rise and the rest keep it from flapping."""

    fit: Fit
    ranks: int
    name: str = "threshold"
    _reached: float = 1.0
    _since: int = 0

    def choose(self, past: Floats, table: Ints) -> Choice:
        """Where the last steps are a tenth less even than what the last re-layout brought."""
        self._since += 1
        if self._since <= REST:
            return KEEP
        load = past[-REST:].sum(axis=0)
        if self._balance(table, load) <= self._reached * (1.0 + RISE):
            return KEEP
        new = self.fit(load, table)
        self._reached, self._since = self._balance(new, load), 0
        return Choice(new, len(table))

    def _balance(self, table: Ints, load: Floats) -> float:
        mean = load.sum(axis=-1) / self.ranks
        return float((hottest_each(table, load[None], self.ranks)[0] / mean).mean())


@dataclass
class SkiRental:
    """Moves a layer when keeping it has cost as much as moving it does; knows nothing of how long gains last.

    Regret of a step: what the layer took over what the best path of changes would have made of that very step. With
    one alternative of fixed cost whose lead never turns negative, regret and cost together are at most twice what the
    best choice in hindsight pays, and one step's regret more (A. Karlin et al., Algorithmica 3, 1988). Where loads
    alternate faster than a change pays back, there is no such bound.
    """

    prices: Prices
    node_ranks: int
    name: str = "ski rental"
    _regret: Floats = field(default_factory=lambda: np.zeros(0))

    def choose(self, past: Floats, table: Ints) -> Choice:
        """Layer by layer."""
        if len(past) == 0:
            self._regret = np.zeros(len(table))
            return KEEP
        new, prices = table.copy(), self.prices
        experts = past.shape[2]
        for layer in range(len(table)):
            rows, loads = descend(
                table[layer], past[-1, layer], prices.ranks, self.node_ranks, table.shape[1], TOLERANCE
            )
            self._regret[layer] += prices.token_s * (loads[0] - loads[-1])
            cost_s = row_moves(table[layer], rows[-1], prices.domain, experts, prices.near_s, prices.far_s)[1]
            if len(rows) > 1 and self._regret[layer] >= cost_s:
                new[layer], self._regret[layer] = rows[-1], 0.0
        return Choice(None if np.array_equal(new, table) else new, len(table))
