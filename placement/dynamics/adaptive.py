"""The adaptive policy: single changes of single layers, worth it by how long earlier gains of their size have held."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.dynamics.forecast import Forecast
from placement.dynamics.policies import TOLERANCE, Fit
from placement.dynamics.series import KEEP, Choice, Floats, Ints, Prices
from placement.solvers.repack import descend, hottest, hottest_each, row_moves

CLASSES = 8
"""Classes of possible gain: over a half of the layer's time, over a quarter and so on; the last is all below 1/128."""

MOST_LOST = 0.02
"""Where the end is not known: share of the time so far, had nothing moved, that moves may cost beyond their saving."""

RECORDS = 128
"""Earlier decisions that are followed; when full, every other one is let go and only every other is taken in."""


@njit(cache=True)
def gain_class(share: float) -> int:
    """Class of a gain by its share of what the layer takes."""
    if share <= 0.0:
        return CLASSES - 1
    return min(int(np.floor(-np.log2(share))), CLASSES - 1)


@njit(cache=True)
def propose(
    table: NDArray[np.int64], fresh: NDArray[np.int64], load: NDArray[np.float64], held: NDArray[np.float64],
    peak: NDArray[np.float64], regret: NDArray[np.float64], left: float, domain: NDArray[np.int64],
    node_ranks: int, token_s: float, near_s: float, far_s: float, limit: int, tolerance: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """For each layer the row that pays most, the row with the largest gain, and figures [4, layers].

    The figures: both rows' gains in seconds of a step, what moving to the first costs, and what it is worth.

    load: [layers, experts], tokens of a step to come. held, peak: [classes], for how many steps gains of a class last
    when nothing is moved again, and when it is, at the same cost, at the best time. regret: [layers], seconds that
    keeping the layer has cost. left: steps to come at most. limit: changes that are looked at beside the fresh rows.
    """
    layers = len(table)
    experts, ranks = load.shape[1], len(domain)
    chosen, most = table.copy(), table.copy()
    figures = np.zeros((4, layers))
    for layer in range(layers):
        rows, loads = descend(table[layer], load[layer], ranks, node_ranks, limit, tolerance)
        other = hottest(fresh[layer], load[layer], ranks)
        gain = loads[0] - min(loads[-1], other)
        if gain <= 0.0:
            continue
        most[layer] = rows[-1] if loads[-1] <= other else fresh[layer]
        figures[1, layer] = token_s * gain
        most_steps = min(left, 1.0 + regret[layer] / figures[1, layer])
        stays = min(held[gain_class(gain / loads[0])], most_steps)
        leaves = min(peak[gain_class(gain / loads[0])], most_steps)
        best = 0.0
        for change in range(1, len(loads) + 1):
            row = rows[change] if change < len(loads) else fresh[layer]
            saved = token_s * (loads[0] - (loads[change] if change < len(loads) else other))
            if max(stays, leaves) * saved <= best:
                continue
            cost_s = row_moves(table[layer], row, domain, experts, near_s, far_s)[1]
            value = max(stays * saved - cost_s, leaves * saved - 2.0 * cost_s)
            if value > best:
                best = value
                chosen[layer] = row
                figures[0, layer], figures[2, layer], figures[3, layer] = saved, cost_s, value
    return chosen, most, figures


@njit(cache=True)
def realised(
    kept: NDArray[np.int64], taken: NDArray[np.int64], counts: NDArray[np.float64], ranks: int
) -> NDArray[np.float64]:
    """Tokens that the hottest rank is spared by `taken` [records, layers, slots] over `kept`: [records, layers]."""
    records, layers, _ = kept.shape
    found = np.empty((records, layers))
    for record in range(records):
        for layer in range(layers):
            found[record, layer] = hottest(kept[record, layer], counts[layer], ranks) - hottest(
                taken[record, layer], counts[layer], ranks
            )
    return found


@dataclass
class _Record:
    """A decision that could have been taken: what was, what would have been, what it promised and has kept."""

    step: int
    kept: Ints
    taken: Ints
    promised: Floats
    kept_s: Floats
    classes: Ints


@dataclass
class Adaptive:
    """Moves what is worth moving, for as long as gains of its size have been seen to hold.

    Before each step it looks, layer by layer, at the changes that relieve the hottest rank (one by one) and at a fresh
    solution, all on a forecast of the loads. A change pays if its gain in a step, times the steps that it holds, is
    over the time of its moves. How long gains hold is measured: every decision that could have been taken is followed
    (its old table and its new one priced on each later step), and a class of gains of one size holds as many steps as
    such decisions have gained up to now over what they promised for a step. So after t steps of steady loads gains
    hold t / 2, a gain that was noise holds 0, and where two loads alternate it holds half a period.
    steps: of the whole series where known (a training run's), which no gain can outlast. Where it is not, moves are
    paid from what has been saved so far and MOST_LOST of the time so far, so that the series may end at any time.
    """

    prices: Prices
    fit: Fit
    node_ranks: int
    steps: int | None = None
    name: str = "adaptive"
    forecast: Forecast = field(default_factory=Forecast)
    _records: list[_Record] = field(default_factory=list)
    _stride: int = 1
    _changes: float = 0.0
    _by_lag: Floats = field(default_factory=lambda: np.zeros((2, CLASSES, 0)))
    _start: Ints | None = None
    _never_s: float = 0.0  # time so far, had nothing been moved
    _kept_s: float = 0.0  # what was saved of it, moves not counted
    _spent_s: float = 0.0  # on moves and on solving
    _stands: Ints | None = None  # [2, layers, slots]: the table, and the one with the largest gain
    _reach: Floats | None = None
    _lost_s: float = 0.0
    _patience: float = 1.0
    _regret: Floats = field(default_factory=lambda: np.zeros(0))

    def choose(self, past: Floats, table: Ints) -> Choice:
        """Layer by layer, change by change; where solving takes time, mostly the last solution again."""
        now = len(past)
        if now == 0:
            self._start = table
            return KEEP
        prices = self.prices
        assert self._start is not None
        never_s = prices.steps_s(self._start, past[-1:]).sum()
        self._never_s += float(never_s) + prices.other_s
        self._kept_s += float(never_s - prices.steps_s(table, past[-1:]).sum())
        self._follow(now, past[-1], prices)
        solving = self._worth_solving(past[-1], table)
        held = self.held()
        between = now * len(table) / (1.0 + self._changes)
        load = self.forecast.next_steps(past, min(between, float(held.max())))
        fresh = self.fit(load, table) if solving or self._stands is None else self._stands[1]
        left = np.inf if self.steps is None else float(self.steps - now)
        chosen, most, (saved, gains, cost_s, worth_s) = propose(
            table, fresh, load, held, self.peak(), self._regret, left, prices.domain, self.node_ranks,
            prices.token_s, prices.near_s, prices.far_s, table.shape[1] if solving else 0, TOLERANCE,
        )  # fmt: skip
        if solving:
            self._spent_s += prices.solve_s * len(table)
            self._take_in(now, table, most, gains, load)
            self._reach = _hot(most, load, prices.ranks) / np.maximum(load.sum(axis=1), 1e-300)
        if self.steps is None:
            dear = ~self._within_budget(cost_s, worth_s)
            chosen[dear], saved[dear], cost_s[dear] = table[dear], 0.0, 0.0
        self._spent_s += float(cost_s.sum())
        if saved.any() or solving:
            self._patience = 1.0 if saved.any() else 2.0 * self._patience
        self._stands = np.stack([chosen, most if solving else fresh])
        differ = (chosen != table).any(axis=1)
        self._regret *= 1.0 - saved / np.where(gains > 0, gains, 1.0)
        self._changes += float(differ.sum())
        return Choice(chosen if differ.any() else None, len(table) if solving else 0)

    def _worth_solving(self, counts: Floats, table: Ints) -> bool:
        """Whether the layers have lost as much since they were last solved as solving takes, and it can be paid.

        Lost: time over what the last solutions would have reached, as a share of each layer's tokens. Each solution
        that moves nothing doubles what must be lost before the next one.
        """
        if self.prices.solve_s == 0.0 or self._reach is None:
            return True
        over = _hot(table, counts, self.prices.ranks) - self._reach * counts.sum(axis=1)
        self._lost_s += self.prices.token_s * float(np.maximum(over, 0.0).sum())
        solve_s = self.prices.solve_s * len(table)
        if self._lost_s < self._patience * solve_s or solve_s > self._budget_s():
            return False
        self._lost_s = 0.0
        return True

    def _budget_s(self) -> float:
        """What has been saved so far, and MOST_LOST of the time so far, less what has been spent."""
        return max(self._kept_s + MOST_LOST * self._never_s - self._spent_s, 0.0)

    def _within_budget(self, cost_s: Floats, worth_s: Floats) -> NDArray[np.bool_]:
        """Which layers' moves may be paid now, the most worth for its cost first: bool [layers]."""
        order = np.argsort(-worth_s / np.where(cost_s > 0, cost_s, 1e-300), kind="stable")
        found = np.zeros(len(cost_s), dtype=np.bool_)
        found[order] = cost_s[order].cumsum() <= self._budget_s()
        return found

    def held(self) -> Floats:
        """For how many steps gains of each class have held: [classes]; an unseen class is as the next larger one."""
        kept, promised = np.zeros(CLASSES), np.zeros(CLASSES)
        for one in self._records:
            np.add.at(kept, one.classes, one.kept_s)
            np.add.at(promised, one.classes, one.promised)
        found = np.ones(CLASSES)
        last = 1.0
        for index in range(CLASSES):
            if promised[index] > 0.0:
                last = kept[index] / promised[index]
            found[index] = last
        return found

    def peak(self) -> Floats:
        """The largest sum of what gains of each class kept at lags 0, 1, 2 ..., over what they promised: [classes]."""
        kept, promised = self._by_lag
        share = np.divide(kept, promised, out=np.zeros_like(kept), where=promised > 0.0)
        best = share.cumsum(axis=1).max(axis=1, initial=0.0)
        found = np.ones(CLASSES)
        last = 1.0
        for index in range(CLASSES):
            if promised[index].any():
                last = best[index]
            found[index] = last
        return found

    def _follow(self, now: int, counts: Floats, prices: Prices) -> None:
        """Price a step under every decision that is followed."""
        if self._stands is None:
            self._regret = np.zeros(len(counts))
            return
        stands, most = self._stands
        kept = np.stack([stands, *(one.kept for one in self._records)])
        taken = np.stack([most, *(one.taken for one in self._records)])
        gained = prices.token_s * realised(kept, taken, counts, prices.ranks)
        self._regret = np.maximum(self._regret + gained[0], 0.0)
        self._by_lag = np.concatenate([self._by_lag, np.zeros((2, CLASSES, 1))], axis=2)
        for one, row in zip(self._records, gained[1:], strict=True):
            one.kept_s += row
            lag = now - 1 - one.step
            np.add.at(self._by_lag[0, :, lag], one.classes, row)
            np.add.at(self._by_lag[1, :, lag], one.classes, one.promised)

    def _take_in(self, now: int, table: Ints, most: Ints, gains: Floats, load: Floats) -> None:
        if now % self._stride:
            return
        kept_s = self.prices.token_s * _hot(table, load, self.prices.ranks)
        share = gains / np.where(kept_s > 0, kept_s, 1.0)
        classes = np.asarray([gain_class(one) for one in share], dtype=np.int64)
        self._records.append(_Record(now, table.copy(), most, gains, np.zeros(len(table)), classes))
        if len(self._records) > RECORDS:
            self._stride *= 2
            self._records = [one for one in self._records if one.step % self._stride == 0]


def _hot(table: Ints, load: Floats, ranks: int) -> Floats:
    """Tokens of each layer's hottest rank: table [layers, slots], load [layers, experts]."""
    return np.asarray(hottest_each(table, np.ascontiguousarray(load[None]), ranks)[0])
