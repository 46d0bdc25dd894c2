"""The plans of a space as rows of whole numbers, and which of them lie beside each other: one choice apart.

A row is the place of the plan's base, then of its value on each further axis. A search weighs thousands of plans and
evaluates a few: only those become plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from placement.axes import Axis
from placement.layouts import layout_name
from placement.plans import Plan, told
from placement.pools import NONE

Parts = tuple[str | int, ...]
Rows = NDArray[np.int64]
# Of the parts of a plan, those that a plan without roles has; a plan with roles may differ from it in all others.
_PLAIN = 4
_LARGEST_KEY = 2**62


class _Namer:
    """Parts of plans, each layout and pool put into words once: a space has many plans of few of them."""

    def __init__(self) -> None:
        self._own: dict[tuple[int, str], tuple[str, int]] = {}
        self._tails: dict[tuple[int, int], Parts] = {}
        self._kept: list[object] = []  # so that no number of an object is given to another one meanwhile

    def parts(self, plan: Plan) -> Parts:
        """What two plans are compared by: layout, solver, budget, schedule; with roles the split and prefill pool."""
        key = (id(plan.parallel), plan.backend)
        if key not in self._own:
            self._kept.append(plan.parallel)
            self._own[key] = (layout_name(plan.parallel, plan.backend), plan.parallel.gpus)
        name, gpus = self._own[key]
        own = (name, plan.solver, plan.redundant_experts, plan.schedule)
        if plan.roles is None:
            return own
        pool = plan.roles.prefill
        if pool is None:
            return (*own, NONE, NONE, NONE, 0)
        decoding = gpus * plan.roles.replicas
        if (id(pool), decoding) not in self._tails:
            self._kept.append(pool)
            split = plan.roles.params(gpus)["split"]
            self._tails[id(pool), decoding] = (split, pool.layout, pool.solver, pool.redundant_experts)
        return (*own, *self._tails[id(pool), decoding])


class Grid:
    """The grid of a space: bases x values of the further axes."""

    def __init__(self, bases: Sequence[Plan], axes: Sequence[Axis]) -> None:
        self.bases, self.axes = bases, axes
        self.counts = np.array([len(bases), *(len(axis.values) for axis in axes)])
        size = math.prod(int(count) for count in self.counts)
        # A key is the row's place in the grid; of a grid with more than int64 holds, an integer of Python.
        strides = [math.prod(int(count) for count in self.counts[place + 1 :]) for place in range(len(self.counts))]
        self._strides = np.array(strides, dtype=np.int64 if size < _LARGEST_KEY else object)
        self._places = [{value: place for place, value in enumerate(axis.values)} for axis in axes]
        self._rows: dict[Plan, Rows] = {}
        self._beside: dict[int, Rows] = {}

    def rows(self, plans: Sequence[Plan]) -> Rows:
        """The rows of plans [plans, 1 + axes]. Raises KeyError for one outside the grid."""
        for plan in plans:
            if plan not in self._rows:
                values = (place[value] for place, (_, value) in zip(self._places, plan.options, strict=True))
                self._rows[plan] = np.array([self._index[self._namer.parts(plan)], *values])
        return np.array([self._rows[plan] for plan in plans], dtype=np.int64).reshape(len(plans), len(self.counts))

    def plan(self, row: Rows) -> Plan:
        """The plan of a row."""
        chosen = zip(self.axes, row[1:], strict=True)
        base: Plan = self.bases[int(row[0])]
        return replace(base, options=tuple((axis.key, axis.values[place]) for axis, place in chosen))

    def keys(self, rows: Rows) -> NDArray[np.int64]:
        """One number for each row [rows]: equal where the rows are."""
        return np.asarray(rows @ self._strides)

    def around(self, rows: Rows) -> Rows:
        """The rows that differ from one of these in one choice, those of the first row first.

        A choice: layout, solver, budget, schedule, or one further axis. With roles also the split (the layouts kept),
        or the layout, solver or budget of the prefill pool; a plan without roles is beside those whose decode pool is
        like it.
        """
        found = []
        for row in rows:
            others = self._bases_beside(int(row[0]))
            more = [
                np.flatnonzero(np.arange(count) != place) for count, place in zip(self.counts[1:], row[1:], strict=True)
            ]
            near = np.tile(row, (len(others) + sum(map(len, more)), 1))
            near[: len(others), 0] = others
            start = len(others)
            for place, values in enumerate(more, start=1):
                near[start : start + len(values), place] = values
                start += len(values)
            found.append(near)
        return np.concatenate(found) if found else np.zeros((0, len(self.counts)), np.int64)

    def neighbours(self, plan: Plan) -> list[Plan]:
        """The plans that differ from a plan of the grid in one choice."""
        return [self.plan(row) for row in self.around(self.rows([plan]))]

    @functools.cached_property
    def choices(self) -> dict[str, list[str]]:
        """The values of each parameter of a plan (`Plan.params`), in order; of the further axes as they are given."""
        parts = list(self._index)
        found = {
            "layout": {one[0] for one in parts},
            "schedule": {one[3] for one in parts},
            "placement": {f"{solver} +{budget}" for solver, budget in {one[1:3] for one in parts}},
        }
        if len(parts[0]) > _PLAIN:
            found |= {
                "split": {one[4] for one in parts},
                "prefill": {one[5] for one in parts},
                "prefill_placement": {
                    NONE if solver == NONE else f"{solver} +{budget}" for solver, budget in {one[6:] for one in parts}
                },
            }
        named = {name: sorted(map(str, values)) for name, values in found.items()}  # type: ignore[call-overload]
        return named | {axis.key: [told(value) for value in axis.values] for axis in self.axes}

    @functools.cached_property
    def _namer(self) -> _Namer:
        return _Namer()

    @functools.cached_property
    def _index(self) -> dict[Parts, int]:
        return {self._namer.parts(base): number for number, base in enumerate(self.bases)}

    @functools.cached_property
    def _values(self) -> list[list[str | int]]:
        count = len(next(iter(self._index)))
        return [sorted({one[place] for one in self._index}, key=str) for place in range(count)]

    @functools.cached_property
    def _pools(self) -> list[Parts]:
        return sorted({one[_PLAIN:] for one in self._index})

    def _bases_beside(self, base: int) -> Rows:
        if base not in self._beside:
            own = self._namer.parts(self.bases[base])
            near = [
                (*own[:place], value, *own[place + 1 :])
                for place, values in enumerate(self._values)
                for value in values
                if value != own[place]
            ]
            plain = own[_PLAIN:] == (NONE, NONE, NONE, 0)
            near += [
                (*own[:_PLAIN], *pool) for pool in self._pools if pool != own[_PLAIN:] and (plain or pool[0] == NONE)
            ]
            self._beside[base] = np.array(sorted({self._index[one] for one in near if one in self._index}), np.int64)
        return self._beside[base]
