"""The default sampler: Gaussian processes over the choices of a plan say which untried plans are worth a look.

Layouts are coded by their sizes, budgets and numbers by rank, words by equality, so that what one plan taught holds for
its neighbours. Picks of a batch take turns: expected improvement of the objective times the chance of keeping the
bounds, and expected gain of the front's hypervolume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from moesim.spec.parallel import ParallelSpec
from placement.near import parts_of
from placement.objective import MOST_EXTRAPOLATED, Outcome
from placement.plans import Plan
from placement.pools import NONE
from placement.space import Space

Array = NDArray[np.float64]
# Trials before the model says anything; those it is fitted to (the best and the newest), and those its length scales
# are: a fit costs the cube of them.
LEAST, SHOWN, FITTED = 16, 256, 96
# From so many trials on, the length scales are fitted anew after each so many more only: by then they hardly move.
OFTEN_UNTIL, REFIT = 96, 32
# Untried plans that are weighed: all of a small space, else so many at random and the neighbours of the best ones.
WEIGHED, ELITES = 3_000, 8
# In a space too large to weigh whole: climbs of the model from its best candidates to their neighbours.
CLIMBS = 3
_DRAWS = 16
_NUGGET = 1e-4
_ROOT5 = math.sqrt(5.0)
_NONE = np.zeros(0)


@dataclass(frozen=True)
class _Coding:
    """Plans as points: columns of numbers in [0, 1], and the choice that each column belongs to."""

    codes: tuple[dict[object, Array], ...]
    group: NDArray[np.int64]

    def points(self, plans: Sequence[Plan]) -> Array:
        """Coordinates [plans, columns]."""
        choices = zip(*(_choices(plan) for plan in plans), strict=True)
        kept = [np.array([code[one] for one in column]) for code, column in zip(self.codes, choices, strict=True)]
        return np.concatenate(kept, axis=1)


def _choices(plan: Plan) -> tuple[object, ...]:
    named = (plan.backend, plan.solver, plan.schedule)
    own = (*_sizes(plan.parallel), plan.redundant_experts, *named, *_pool_choices(plan))
    return (*own, *(f"{value}" for _, value in plan.options))


def _sizes(sizes: ParallelSpec) -> tuple[int, ...]:
    contexts = sizes.cp * sizes.decode_cp  # the first is of training, the second of serving
    return (sizes.gpus, sizes.tp, sizes.pp, contexts, sizes.attention_dp, sizes.ep, sizes.expert_tp)


def _pool_choices(plan: Plan) -> tuple[object, ...]:
    """The choices that roles add: the split, the replicas, and the prefill pool; 0 and `none` in a plan without."""
    if plan.roles is None:
        return ()
    pool = plan.prefill
    if pool is None:
        return (*[0] * 11, *[NONE] * 4)
    numbers = (pool.gpus, plan.roles.replicas, pool.replicas, *_sizes(pool.parallel), pool.redundant_experts)
    return (*numbers, "roles", pool.backend, pool.solver, pool.schedule)


def coding(space: Space) -> _Coding:
    """The coding of a space: sizes and numbers by rank, words one column each."""
    base = [_choices(plan) for plan in space.bases]
    cut = len(base[0]) - len(space.axes)
    values = [sorted({one[place] for one in base}, key=lambda value: (str(type(value)), value)) for place in range(cut)]
    codes = [_code(list(one), all(isinstance(value, int) for value in one)) for one in values]
    for axis in space.axes:
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)
        order = sorted(axis.values, key=lambda value: value if numeric else str(value))  # type: ignore[arg-type,return-value]
        codes.append(_code([f"{value}" for value in order], numeric))
    group = np.concatenate([np.full(len(next(iter(code.values()))), place) for place, code in enumerate(codes)])
    return _Coding(tuple(codes), group)


def _code(values: list[object], ordered: bool) -> dict[object, Array]:
    if ordered:
        return {value: np.array([rank / max(len(values) - 1, 1)]) for rank, value in enumerate(values)}
    return {value: row * math.sqrt(0.5) for value, row in zip(values, np.eye(len(values)), strict=True)}


class Surrogate:
    """The sampler of one search: what it proposes follows from the space and the trials told, in order, alone."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._coding: _Coding | None = None
        self._fitted: tuple[int, Array, float] = (0, _NONE, 0.0)

    def propose(
        self, trials: Sequence[tuple[Plan, Outcome]], room: int, seen: set[Plan], rng: np.random.Generator
    ) -> list[Plan]:
        """Up to `room` legal plans outside `seen` worth an evaluation; random ones before anything is known."""
        space = self.space
        ran = [outcome for _, outcome in trials if outcome.status == "ok"]
        if len(trials) < LEAST or len(ran) < 2:
            return space.untried(seen, room, rng)
        told = _shown(trials)
        candidates = _candidates(told, space, seen, rng)
        if not candidates:
            return space.untried(seen, room, rng)
        coded = self.coded()
        targets = _targets([outcome for _, outcome in told])
        model = _Model([plan for plan, _ in told], targets, coded, self.scales(trials))
        known = _Known([outcome for _, outcome in told], model)
        if len(candidates) >= WEIGHED or space.estimated:
            candidates = _climbed(candidates, model, known, coded, space, seen)
        believed = _Believed(model, candidates, coded)
        found: list[Plan] = []
        open_ = np.ones(len(candidates), bool)
        for turn in range(len(candidates)):
            if len(found) == room:
                break
            value = known.improvement(believed) if turn % 2 == 0 else known.volume(believed, rng)
            # Rounded, so that the last bits of a linear algebra library decide nothing.
            value = np.where(open_, np.round(value / max(float(value[open_].max()), 1e-300), 6), -1.0)
            index = int(value.argmax())
            open_[index] = False
            if space.estimated and space.why_not(candidates[index]) is not None:
                continue
            believed.take(index)
            found.append(candidates[index])
        return found + space.untried(seen | set(found), room - len(found), rng)

    def coded(self) -> _Coding:
        """The coding of the space."""
        if self._coding is None:
            self._coding = coding(self.space)
        return self._coding

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
            points = self.coded().points([told[int(index)][0] for index in some])
            self._fitted = (due, *_fitted(points, standard[some], self.coded().group))
        return self._fitted[1:]


def _climbed(
    candidates: list[Plan], model: _Model, known: _Known, coded: _Coding, space: Space, seen: set[Plan]
) -> list[Plan]:
    """The candidates, with neighbours of those that promise the greatest improvement, and theirs in turn.

    As SMAC optimises its acquisition function in spaces of categories (Hutter, Hoos and Leyton-Brown, LION 5, 2011).
    """
    found = dict.fromkeys(candidates)
    top: dict[Plan, float] = {}
    new = candidates
    for _ in range(CLIMBS):
        value = known.improvement(_Believed(model, new, coded))
        top |= {new[int(index)]: float(value[index]) for index in np.argsort(-value, kind="stable")[:ELITES]}
        top = dict(sorted(top.items(), key=lambda one: -one[1])[:ELITES])
        near = dict.fromkeys(other for plan in top for other in neighbours(plan, space))
        new = [plan for plan in near if plan not in found and plan not in seen and (space.estimated or plan in space)]
        if not new:
            break
        found |= dict.fromkeys(new)
    return list(found)


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


def _candidates(
    told: Sequence[tuple[Plan, Outcome]], space: Space, seen: set[Plan], rng: np.random.Generator
) -> list[Plan]:
    """Untried plans to weigh; in a space that was not checked whole, not all of them are legal."""
    if not space.estimated:
        left = [plan for plan in space.plans if plan not in seen]
        if len(left) <= WEIGHED:
            return left
    ran = [one for one in told if one[1].status == "ok"]
    front = [ran[index] for index in front_of(np.array([one[1].goals() for one in ran]))]
    elite = [*sorted(ran, key=lambda one: worth(one[1]))[:ELITES], *front[:ELITES]]
    near = [other for plan, _ in elite for other in neighbours(plan, space)]
    drawn = space.draw(WEIGHED // 2, rng) if space.estimated else [left[int(i)] for i in rng.permutation(len(left))]
    fitting = [plan for plan in dict.fromkeys(near) if plan not in seen and (space.estimated or plan in space)]
    room = WEIGHED - len(fitting)
    return list(dict.fromkeys([*fitting, *[plan for plan in drawn if plan not in seen][: max(room, 0)]]))


def neighbours(plan: Plan, space: Space) -> list[Plan]:
    """Plans of the grid that differ in one choice: layout, solver, budget, schedule, or one further axis.

    With roles also in the split (the layouts kept), or in the layout, solver or budget of the prefill pool; a plan
    without roles is beside those whose decode pool is like it.
    """
    found = [replace(space.bases[index], options=plan.options) for index in space.grid.around(parts_of(plan))]
    for place, axis in enumerate(space.axes):
        for value in axis.values:
            options = (*plan.options[:place], (axis.key, value), *plan.options[place + 1 :])
            if options != plan.options:
                found.append(replace(plan, options=options))
    return found


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
        plans: Sequence[Plan],
        targets: tuple[Array, tuple[Callable[[Array], Array], ...]],
        coded: _Coding,
        scales: tuple[Array, float],
    ) -> None:
        self.raw, self.back = targets
        self.coded = coded
        self.mean, self.spread, self.standard = _standard(self.raw)
        points = coded.points(plans)
        self.weights, self.nugget = scales
        self.points = points * np.sqrt(self.weights)[coded.group]
        kernel = _matern(_square(self.points, self.points)) + self.nugget * np.eye(len(points))
        self.lower = np.linalg.cholesky(kernel)
        self.white = solve_triangular(self.lower, self.standard, lower=True)
        self.amplitude = np.maximum((self.white**2).mean(axis=0), 1e-6)


class _Believed:
    """The model's mean and variance of the candidates, the variance as if the picks so far were known."""

    def __init__(self, model: _Model, candidates: Sequence[Plan], coded: _Coding) -> None:
        self.model = model
        self.points = coded.points(candidates) * np.sqrt(model.weights)[coded.group]
        self.rows = solve_triangular(model.lower, _matern(_square(model.points, self.points)), lower=True)
        self.mean = (self.rows.T @ model.white) * model.spread + model.mean
        self.variance = np.maximum(1.0 - (self.rows**2).sum(axis=0), 1e-9)

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
