"""Which plans of a grid lie beside each other: those that differ in one choice."""

from __future__ import annotations

from collections.abc import Sequence

from placement.layouts import layout_name
from placement.plans import Plan
from placement.pools import NONE

Parts = tuple[str | int, ...]
# Of the parts of a plan, those that a plan without roles has; a plan with roles may differ from it in all others.
_PLAIN = 4


def parts_of(plan: Plan) -> Parts:
    """What two plans are compared by: layout, solver, budget, schedule; with roles the split and the prefill pool."""
    own = (layout_name(plan.parallel, plan.backend), plan.solver, plan.redundant_experts, plan.schedule)
    if plan.roles is None:
        return own
    pool = plan.prefill
    if pool is None:
        return (*own, NONE, NONE, NONE, 0)
    split = plan.roles.params(plan.parallel.gpus)["split"]
    return (*own, split, pool.layout, pool.solver, pool.redundant_experts)


class Grid:
    """The bases of a space by their parts."""

    def __init__(self, bases: Sequence[Plan]) -> None:
        parts = [parts_of(base) for base in bases]
        self.index = {one: number for number, one in enumerate(parts)}
        self.values = [sorted({one[place] for one in parts}, key=str) for place in range(len(parts[0]))]
        self.pools = sorted({one[_PLAIN:] for one in parts})

    def around(self, own: Parts) -> list[int]:
        """Bases that differ in one part, in their order."""
        near = [
            (*own[:place], value, *own[place + 1 :])
            for place, values in enumerate(self.values)
            for value in values
            if value != own[place]
        ]
        plain = own[_PLAIN:] == (NONE, NONE, NONE, 0)
        near += [(*own[:_PLAIN], *pool) for pool in self.pools if pool != own[_PLAIN:] and (plain or pool[0] == NONE)]
        return sorted({self.index[one] for one in near if one in self.index})
