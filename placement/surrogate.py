"""The default sampler: Gaussian processes over the choices of a plan say which untried plans are worth a look.

Picks of a batch take turns: expected improvement of the objective times the chance of keeping the bounds, and expected
gain of the front's hypervolume. In a space too large to weigh whole, half of the picks are neighbours of the best plan,
one of four is for the front, and what a pick promises is weighed against what it takes to evaluate it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from placement.coding import Array, Coding
from placement.near import Rows
from placement.objective import MOST_EXTRAPOLATED, Outcome
from placement.outlay import Outlay
from placement.plans import Plan
from placement.space import Space

# Trials before the model says anything; those it is fitted to (the best and the newest), and those its length scales
# are: a fit costs the cube of them.
LEAST, SHOWN, FITTED = 16, 256, 96
# From so many trials on, the length scales are fitted anew after each so many more only: by then they hardly move.
OFTEN_UNTIL, REFIT = 96, 32
# Untried plans that are weighed: all of a small space, else so many at random and the neighbours of the best ones.
WEIGHED, ELITES = 3_000, 8
# Picks in turn, of a space that was checked whole and of a larger one.
TURNS = ("improvement", "front")
LARGE_TURNS = ("near", "near", "improvement", "front")
# In a space too large to weigh whole: climbs of the model from its best candidates to their neighbours.
CLIMBS = 3
_DRAWS = 16
_NUGGET = 1e-4
_ROOT5 = math.sqrt(5.0)
_NONE = np.zeros(0)


class Surrogate:
    """The sampler of one search: what it proposes follows from the space and the trials told, in order, alone."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._fitted: tuple[int, Array, float] = (0, _NONE, 0.0)
        self._checked: dict[int, bool] = {}

    @functools.cached_property
    def coded(self) -> Coding:
        """The coding of the space."""
        return Coding(self.space)

    @functools.cached_property
    def outlay(self) -> Outlay:
        """What it takes to evaluate a plan."""
        return Outlay(self.space)

    @functools.cached_property
    def _legal(self) -> Rows:
        """Rows of the plans known to be legal: all that are, in a space that was checked whole, else its sample."""
        return self.space.grid.rows(self.space.plans)

    def propose(
        self, trials: Sequence[tuple[Plan, Outcome]], room: int, seen: set[Plan], rng: np.random.Generator
    ) -> list[Plan]:
        """Up to `room` legal plans outside `seen` worth an evaluation; random ones before anything is known."""
        space = self.space
        ran = [outcome for _, outcome in trials if outcome.status == "ok"]
        if len(trials) < LEAST or len(ran) < 2:
            return space.untried(seen, room, rng)
        told = _shown(trials)
        tried = space.grid.keys(space.grid.rows(list(seen)))
        candidates = self._candidates(told, tried, rng)
        if not len(candidates):
            return space.untried(seen, room, rng)
        targets = _targets([outcome for _, outcome in told])
        points = self.coded.points(space.grid.rows([plan for plan, _ in told]))
        model = _Model(points, targets, self.coded.group, self.scales(trials))
        known = _Known([outcome for _, outcome in told], model)
        if len(candidates) >= WEIGHED or space.estimated:
            candidates, believed = self._climbed(candidates, tried, model, known)
        else:
            believed = _Believed.of(model, self.coded.points(candidates))
        turns = LARGE_TURNS if space.estimated else TURNS
        near = self._beside_best(told, candidates) if "near" in turns else np.zeros(len(candidates), bool)
        found: list[Plan] = []
        open_ = np.ones(len(candidates), bool)
        runs = self.outlay.runs(candidates, seen) if space.estimated else np.ones(len(candidates))
        while len(found) < room and open_.any():
            turn = turns[len(found) % len(turns)]
            value = known.volume(believed, rng) if turn == "front" else known.improvement(believed)
            value = value / runs
            # Rounded, so that the last bits of a linear algebra library decide nothing.
            value = np.round(value / max(float(value[open_].max()), 1e-300), 6)
            first = near if turn == "near" else open_
            for index in np.lexsort((-value, ~first, ~open_))[: int(open_.sum())]:
                open_[index] = False
                if self._runs(candidates[index]):
                    believed.take(index)
                    found.append(space.grid.plan(candidates[index]))
                    if runs[index] > 1.0:  # what it needs, others have now
                        runs = self.outlay.runs(candidates, [*seen, *found])
                    break
        return found + space.untried(seen | set(found), room - len(found), rng)

    def scales(self, trials: Sequence[tuple[Plan, Outcome]]) -> tuple[Array, float]:
        """Weights of the choices and the nugget, of the trials up to the last one after which they were due."""
        count = len(trials)
        due = count if count < OFTEN_UNTIL else count - count % REFIT
        if sum(outcome.status == "ok" for _, outcome in trials[:due]) < 2:  # nearly all of them failed
            due = count
        if self._fitted[0] != due:
            told = _shown(trials[:due])
            standard = _standard(_targets([outcome for _, outcome in told])[0])[2]
            some = np.sort(np.random.default_rng([due, 0x5CA1E]).permutation(len(told))[:FITTED])
            rows = self.space.grid.rows([told[int(index)][0] for index in some])
            self._fitted = (due, *_fitted(self.coded.points(rows), standard[some], self.coded.group))
        return self._fitted[1:]

    def _candidates(
        self, told: Sequence[tuple[Plan, Outcome]], tried: NDArray[np.int64], rng: np.random.Generator
    ) -> Rows:
        """Untried plans to weigh: in a space that was not checked whole the sample, and plans that may not be legal."""
        grid = self.space.grid
        left = self._legal[~np.isin(grid.keys(self._legal), tried)]
        if not self.space.estimated and len(left) <= WEIGHED:
            return left
        ran = [one for one in told if one[1].status == "ok"]
        front = [ran[index] for index in front_of(np.array([one[1].goals() for one in ran]))]
        elite = [*sorted(ran, key=lambda one: worth(one[1]))[:ELITES], *front[:ELITES]]
        near = self._once(grid.around(grid.rows([plan for plan, _ in elite])), tried)
        drawn = left[rng.permutation(len(left))][: max(WEIGHED - len(near), 0)]
        return self._once(np.concatenate([near, drawn]), tried)

    def _runs(self, row: Rows) -> bool:
        """Whether a plan is legal; each is checked once."""
        if not self.space.estimated:
            return True
        key = int(self.space.grid.keys(row))
        if key not in self._checked:
            self._checked[key] = self.space.why_not(self.space.grid.plan(row)) is None
        return self._checked[key]

    def _beside_best(self, told: Sequence[tuple[Plan, Outcome]], candidates: Rows) -> NDArray[np.bool_]:
        """Which candidates are neighbours of the best plan told."""
        grid = self.space.grid
        best = min((one for one in told if one[1].status == "ok"), key=lambda one: worth(one[1]))[0]
        return np.isin(grid.keys(candidates), grid.keys(grid.around(grid.rows([best]))))

    def _once(self, rows: Rows, without: NDArray[np.int64]) -> Rows:
        """The rows in order, each once, without those of some keys, and without illegal ones where these are known."""
        keys = self.space.grid.keys(rows)
        kept = np.sort(np.unique(keys, return_index=True)[1])
        kept = kept[~np.isin(keys[kept], without)]
        if not self.space.estimated:
            kept = kept[np.isin(keys[kept], self.space.grid.keys(self._legal))]
        return rows[kept]

    def _climbed(
        self, candidates: Rows, tried: NDArray[np.int64], model: _Model, known: _Known
    ) -> tuple[Rows, _Believed]:
        """The candidates, with neighbours of those that promise the greatest improvement, and theirs in turn.

        As SMAC optimises its acquisition function in spaces of categories (Hutter, Hoos and Leyton-Brown, LION 5,
        2011).
        """
        grid = self.space.grid
        found, parts = [candidates], [_Believed.of(model, self.coded.points(candidates))]
        top, height = candidates[:0], np.zeros(0)
        taken = np.concatenate([tried, grid.keys(candidates)])
        for _ in range(CLIMBS):
            value = known.improvement(parts[-1])
            falling = np.argsort(-value, kind="stable")
            best = list(itertools.islice((place for place in falling if self._runs(found[-1][place])), ELITES))
            top, height = np.concatenate([top, found[-1][best]]), np.concatenate([height, value[best]])
            order = np.argsort(-height, kind="stable")[:ELITES]
            top, height = top[order], height[order]
            new = self._once(grid.around(top), taken)
            if not len(new):
                break
            found.append(new)
            parts.append(_Believed.of(model, self.coded.points(new)))
            taken = np.concatenate([taken, grid.keys(new)])
        return np.concatenate(found), _Believed.joined(parts)


def worth(outcome: Outcome) -> tuple[float, ...]:
    """Sorts outcomes, the best first: bounds, then the objective."""
    if outcome.status != "ok":
        return (math.inf,)
    outside = outcome.metrics.get("extrapolated_share", 0.0)
    maximised, minimised = outcome.goals()
    return (max(outcome.violation, 0.0) + max(outside - MOST_EXTRAPOLATED, 0.0), -maximised, minimised)


def _shown(trials: Sequence[tuple[Plan, Outcome]]) -> list[tuple[Plan, Outcome]]:
    if len(trials) <= SHOWN:
        return list(trials)
    newest = trials[-SHOWN // 2 :]
    best = sorted(trials[: -SHOWN // 2], key=lambda one: worth(one[1]))[: SHOWN // 2]
    return [*best, *newest]


def _scale(values: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Values on the scale that is modelled, and the way back: logarithms where all are positive."""
    return (np.log(values), np.exp) if (values > 0).all() else (values, lambda one: one)


def _targets(outcomes: Sequence[Outcome]) -> tuple[Array, tuple[Callable[[Array], Array], ...]]:
    """What is modelled [trials, 4]: what is maximised, what is minimised, the worst level over its limit, outside.

    A plan that could not run is as bad as the worst that ran.
    """
    ok = [one for one in outcomes if one.status == "ok"]
    goals = np.array([one.goals() for one in ok])
    up, up_back = _scale(goals[:, 0])
    down, down_back = _scale(goals[:, 1])
    level = np.clip(np.log1p(np.maximum([one.violation for one in ok], -0.99)), -3.0, 3.0)
    outside = np.sqrt(np.clip([one.metrics.get("extrapolated_share", 0.0) for one in ok], 0.0, 1.0))
    rows = iter(np.stack([up, down, level, outside], axis=1))
    worst = np.array([up.min(), down.max(), max(float(level.max()), 0.7), outside.max()])
    table = np.array([next(rows) if one.status == "ok" else worst for one in outcomes])
    return table, (up_back, down_back)


def _standard(raw: Array) -> tuple[Array, Array, Array]:
    """Mean and standard deviation of each target [4], and the targets in units of it [trials, 4]."""
    mean, spread = raw.mean(axis=0), np.maximum(raw.std(axis=0), 1e-9)
    return mean, spread, (raw - mean) / spread


class _Model:
    """One Gaussian process for each target, with length scales in common: Matern 5/2, each choice with its own weight
    (Rasmussen and Williams 2006, chapters 4 and 5)."""

    def __init__(
        self,
        points: Array,
        targets: tuple[Array, tuple[Callable[[Array], Array], ...]],
        group: NDArray[np.int64],
        scales: tuple[Array, float],
    ) -> None:
        self.raw, self.back = targets
        self.mean, self.spread, self.standard = _standard(self.raw)
        weights, self.nugget = scales
        self.stretch = np.sqrt(weights)[group]
        self.points = points * self.stretch
        kernel = _matern(_square(self.points, self.points)) + self.nugget * np.eye(len(points))
        self.lower = np.linalg.cholesky(kernel)
        self.white = solve_triangular(self.lower, self.standard, lower=True)
        self.amplitude = np.maximum((self.white**2).mean(axis=0), 1e-6)


class _Believed:
    """The model's mean and variance of the candidates, the variance as if the picks so far were known."""

    def __init__(self, model: _Model, points: Array, rows: Array, mean: Array, variance: Array) -> None:
        self.model, self.points, self.rows, self.mean, self.variance = model, points, rows, mean, variance

    @staticmethod
    def of(model: _Model, points: Array) -> _Believed:
        """What the model makes of these points [candidates, columns]."""
        points = points * model.stretch
        rows = solve_triangular(model.lower, _matern(_square(model.points, points)), lower=True, check_finite=False)
        mean = (rows.T @ model.white) * model.spread + model.mean
        return _Believed(model, points, rows, mean, np.maximum(1.0 - (rows**2).sum(axis=0), 1e-9))

    @staticmethod
    def joined(parts: Sequence[_Believed]) -> _Believed:
        """Parts side by side, before any pick."""
        points, mean, variance = (
            np.concatenate([getattr(one, name) for one in parts]) for name in ("points", "mean", "variance")
        )
        return _Believed(parts[0].model, points, np.concatenate([one.rows for one in parts], axis=1), mean, variance)

    def spread(self, target: int) -> Array:
        """Standard deviation of a target [candidates]."""
        return np.asarray(np.sqrt(self.variance * self.model.amplitude[target]) * self.model.spread[target])

    def take(self, index: int) -> None:
        """A candidate becomes a pick: what is near it is less uncertain."""
        kernel = _matern(_square(self.points[index : index + 1], self.points))[0]
        row = (kernel - self.rows[:, index] @ self.rows) / math.sqrt(self.variance[index] + self.model.nugget)
        self.rows = np.concatenate([self.rows, row[None]])
        self.variance = np.maximum(self.variance - row**2, 1e-9)


class _Known:
    """The best kept plan and the front so far, on the model's scale."""

    def __init__(self, outcomes: Sequence[Outcome], model: _Model) -> None:
        kept = np.array([worth(one)[0] <= 0.0 for one in outcomes])
        self.best = float(model.raw[kept, 0].max()) if kept.any() else None
        self.back = model.back
        goals = np.array([one.goals() for one in outcomes if one.status == "ok"])
        self.front = goals[front_of(goals)]
        self.reference = reference_of(self.front)

    def improvement(self, believed: _Believed) -> Array:
        """Expected improvement of what is maximised, times the chance that the bounds are kept [candidates]."""
        keeps = ndtr(-believed.mean[:, 2] / believed.spread(2))
        keeps *= ndtr((math.sqrt(MOST_EXTRAPOLATED) - believed.mean[:, 3]) / believed.spread(3))
        if self.best is None:
            return np.asarray(keeps)
        spread = believed.spread(0)
        above = (believed.mean[:, 0] - self.best) / spread
        density = np.exp(-0.5 * above**2) / math.sqrt(2.0 * math.pi)
        return np.asarray(keeps * spread * (above * ndtr(above) + density))

    def volume(self, believed: _Believed, rng: np.random.Generator) -> Array:
        """Expected gain of the front's hypervolume, by draws in common [candidates]."""
        draws = rng.standard_normal((2, _DRAWS, 1))
        up = self.back[0](believed.mean[:, 0] + draws[0] * believed.spread(0))
        down = self.back[1](believed.mean[:, 1] + draws[1] * believed.spread(1))
        return np.asarray(gained(up, down, self.front, self.reference).mean(axis=0))


def front_of(goals: Array) -> list[int]:
    """Points [n, 2] that no other beats in both (first up, second down), the highest first."""
    order = np.lexsort((goals[:, 1], -goals[:, 0]))
    front: list[int] = []
    for index in order:
        if not front or goals[index, 1] < goals[front[-1], 1]:
            front.append(int(index))
    return front


def reference_of(front: Array) -> tuple[float, float]:
    """The corner that a front's hypervolume is measured from: 0 (or its least), and a tenth over its largest second."""
    low, high = float(front[:, 0].min()), float(front[:, 1].max())
    return min(low, 0.0), high + 0.1 * (abs(high) or 1.0)


def gained(up: Array, down: Array, front: Array, reference: tuple[float, float]) -> Array:
    """Hypervolume that a point would add to a front (highest first) [shape of up]."""
    # The front is a staircase: at heights of `up` between two of its points the second goal reaches to the higher one.
    heights = np.concatenate([front[:, 0], [reference[0]]])
    floors = np.concatenate([[reference[1]], np.minimum(front[:, 1], reference[1])])
    tops = np.concatenate([[np.inf], heights[:-1]])
    total = np.zeros(up.shape)
    for top, bottom, floor in zip(tops, heights, floors, strict=True):
        total += np.maximum(np.minimum(up, top) - max(bottom, reference[0]), 0.0) * np.maximum(floor - down, 0.0)
    return total


def hypervolume(goals: Array, reference: tuple[float, float]) -> float:
    """Area between the front of points [n, 2] (first up, second down) and a reference corner."""
    inside = goals[(goals[:, 0] > reference[0]) & (goals[:, 1] < reference[1])]
    if not len(inside):
        return 0.0
    front = inside[front_of(inside)]
    lower = np.concatenate([front[1:, 0], [reference[0]]])
    return float(((front[:, 0] - lower) * (reference[1] - front[:, 1])).sum())


def _square(first: Array, second: Array) -> Array:
    """Squared distances [first, second]."""
    square = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2.0 * first @ second.T
    return np.asarray(np.maximum(square, 0.0))


def _matern(square: Array) -> Array:
    root = _ROOT5 * np.sqrt(square)
    return np.asarray((1.0 + root + root**2 / 3.0) * np.exp(-root))


def _fitted(points: Array, standard: Array, group: NDArray[np.int64]) -> tuple[Array, float]:
    """Weights of the choices and the nugget at the largest posterior; each logarithm is normal around 1 (nugget: 1e-4).

    The gradient is that of Rasmussen and Williams (2006), equation 5.9, with the amplitudes maximised.
    """
    count, n = int(group.max()) + 1, len(points)
    apart = np.stack([_square(points[:, group == one], points[:, group == one]) for one in range(count)])
    used = apart.any(axis=(1, 2))
    apart = apart[used]
    centre = np.concatenate([np.zeros(len(apart)), [math.log(_NUGGET)]])

    def loss(theta: Array) -> tuple[float, Array]:
        weights, nugget = np.exp(theta[:-1]), math.exp(theta[-1])
        square = np.tensordot(weights, apart, axes=1)
        root = _ROOT5 * np.sqrt(square)
        decay = np.exp(-root)
        kernel = (1.0 + root + root**2 / 3.0) * decay + nugget * np.eye(n)
        lower = np.linalg.cholesky(kernel)
        inverse = np.linalg.inv(kernel)
        alpha = inverse @ standard
        amplitude = np.maximum((standard * alpha).mean(axis=0), 1e-9)
        outputs = standard.shape[1]
        value = 0.5 * n * np.log(amplitude).sum() + outputs * np.log(np.diag(lower)).sum()
        outer = 0.5 * (outputs * inverse - (alpha / amplitude) @ alpha.T)
        slope = outer * (-5.0 / 6.0) * (1.0 + root) * decay
        gradient = np.concatenate([weights * np.tensordot(apart, slope, axes=2), [nugget * np.trace(outer)]])
        pull = theta - centre
        return float(value + 0.5 * (pull**2).sum() / 4.0), gradient + pull / 4.0

    bounds = [(-8.0, 5.0)] * len(apart) + [(math.log(1e-6), math.log(0.3))]
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 20})
    weights = np.zeros(count)
    weights[used] = np.exp(found.x[:-1])
    return weights, math.exp(float(found.x[-1]))
