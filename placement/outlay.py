"""What it takes to evaluate a plan after others, in runs: the run itself, and what has to be worked out for it first.

Plans share placements and the prices of layouts. As counts, not as seconds, so that a search asks for the same plans on
any machine and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from placement.near import Rows
from placement.plans import Plan
from placement.space import Space

# Measured on DeepSeek-V3 and Qwen3-235B, 16 and 32 GPUs, first looks: a run 0.018 s; a layout priced first 0.01 to
# 0.02 s; a placement by `greedy` or `eplb` 0.012 s, by a robust solver (annealed) 0.2 to 0.3 s.
_LAYOUT, _SOLVED, _ANNEALED = 1.0, 1.0, 12.0

_Thing = tuple[object, ...]


class Outlay:
    """The outlay of the plans of a space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._of_base: dict[int, dict[_Thing, float]] = {}

    def runs(self, rows: Rows, tried: Iterable[Plan]) -> NDArray[np.float64]:
        """Outlay of each row's plan [rows], at least 1, where these plans were evaluated."""
        known = {thing for plan in tried for thing in _things(plan)}
        bases, back = np.unique(rows[:, 0], return_inverse=True)
        return np.array([self._base(int(base), known) for base in bases])[back]

    def _base(self, base: int, known: Collection[_Thing]) -> float:
        if base not in self._of_base:
            self._of_base[base] = _things(self.space.bases[base])
        return 1.0 + sum(runs for thing, runs in self._of_base[base].items() if thing not in known)


def _things(plan: Plan) -> dict[_Thing, float]:
    """What a plan needs that others may need, too: the placement and the layout of each pool; and their outlay."""
    found: dict[_Thing, float] = {}
    for part in plan.pools.values() or [plan]:
        sizes = part.parallel
        solved = 0.0 if part.solver == "contiguous" else _ANNEALED if part.solver.startswith("robust") else _SOLVED
        found[part.solver, part.redundant_experts, sizes.ep] = solved
        degrees = (sizes.tp, sizes.pp, sizes.cp, sizes.decode_cp, sizes.attention_dp, sizes.ep, sizes.expert_tp)
        found[*degrees, part.backend, part.schedule] = _LAYOUT
    return found
