"""Plans as points: layouts by their sizes, budgets and numbers by rank, words by equality, so that what one plan taught
holds for its neighbours."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moesim.spec.parallel import ParallelSpec
from placement.near import Rows
from placement.plans import Plan
from placement.pools import NONE
from placement.space import Space

Array = NDArray[np.float64]


class Coding:
    """The coding of a space. group: of each column [columns], which choice it belongs to."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._sizes: dict[int, tuple[int, ...]] = {}
        # Every value of every choice, from plans that show them all: a space has many plans of few pools.
        some = {
            (id(one.parallel), one.backend, one.solver, one.redundant_experts, one.schedule): one for one in space.bases
        }
        shown = list(some.values())
        if shown[0].roles is not None:
            shown += {(id(one.roles.prefill), one.roles.replicas): one for one in space.bases if one.roles}.values()
        values = [
            sorted(set(column), key=lambda value: (str(type(value)), value))
            for column in zip(*map(self._choices, shown), strict=True)
        ]
        own = [_code(len(one), all(isinstance(value, int) for value in one)) for one in values]
        self._own = [dict(zip(one, code, strict=True)) for one, code in zip(values, own, strict=True)]
        self._axes = []
        for axis in space.axes:
            numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)
            order = sorted(axis.values, key=lambda value: value if numeric else str(value))  # type: ignore[arg-type,return-value]
            code = _code(len(order), numeric)
            self._axes.append(code[[order.index(value) for value in axis.values]])
        widths = [code.shape[1] for code in (*own, *self._axes)]
        self.group = np.repeat(np.arange(len(widths)), widths)
        # Points of the bases that were asked for so far, and where each is.
        self._slot = np.full(len(space.bases), -1)
        self._points = np.zeros((0, sum(code.shape[1] for code in own)))

    def points(self, rows: Rows) -> Array:
        """Coordinates in [0, 1] [rows, columns]."""
        bases = rows[:, 0]
        new = np.unique(bases[self._slot[bases] < 0])
        if len(new):
            self._slot[new] = len(self._points) + np.arange(len(new))
            choices = zip(*(self._choices(self.space.bases[base]) for base in new), strict=True)
            columns = [np.array([code[one] for one in column]) for code, column in zip(self._own, choices, strict=True)]
            self._points = np.concatenate([self._points, np.concatenate(columns, axis=1)])
        further = [code[rows[:, place]] for place, code in enumerate(self._axes, start=1)]
        return np.concatenate([self._points[self._slot[bases]], *further], axis=1)

    def _choices(self, plan: Plan) -> tuple[object, ...]:
        own = (*self._sizes_of(plan.parallel), plan.redundant_experts, plan.backend, plan.solver, plan.schedule)
        return own if plan.roles is None else (*own, *self._pool_choices(plan))

    def _pool_choices(self, plan: Plan) -> tuple[object, ...]:
        """The choices that roles add: the split, the replicas, the prefill pool; 0 and `none` in a plan without."""
        assert plan.roles is not None
        pool = plan.roles.prefill
        if pool is None:
            return (*[0] * 11, *[NONE] * 4)
        sizes = self._sizes_of(pool.parallel)
        numbers = (sizes[0] * pool.replicas, plan.roles.replicas, pool.replicas, *sizes, pool.redundant_experts)
        return (*numbers, "roles", pool.backend, pool.solver, pool.schedule)

    def _sizes_of(self, sizes: ParallelSpec) -> tuple[int, ...]:
        if id(sizes) not in self._sizes:  # those of the space's bases, which outlive this
            contexts = sizes.cp * sizes.decode_cp  # the first is of training, the second of serving
            degrees = (sizes.tp, sizes.pp, contexts, sizes.attention_dp, sizes.ep, sizes.expert_tp)
            self._sizes[id(sizes)] = (sizes.gpus, *degrees)
        return self._sizes[id(sizes)]


def _code(count: int, ordered: bool) -> Array:
    """Points of so many values in order [values, columns]."""
    if ordered:
        return np.arange(count)[:, None] / max(count - 1, 1)
    return np.eye(count) * math.sqrt(0.5)
