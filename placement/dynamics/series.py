"""A recorded series of counts under a policy: what its steps, its moves and its solving take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from placement.solvers.repack import hottest_each, table_moves

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Prices:
    """What time things take, linear: a step is other_s + token_s x (hottest rank's tokens, summed over layers).

    near_s, far_s: to bring one expert to a rank, inside its domain and from another; ranks receive side by side, layers
    follow one another (see `placement.solvers.repack.row_moves`). domain: int64 [ranks], of each rank. solve_s: of one
    layer's solution, while the engine waits. tag: of the prices.
    """

    token_s: float
    near_s: float
    far_s: float
    domain: Ints
    solve_s: float = 0.0
    other_s: float = 0.0
    tag: str = "given"

    @property
    def ranks(self) -> int:
        """EP ranks."""
        return len(self.domain)

    def steps_s(self, table: Ints, counts: Floats) -> Floats:
        """Seconds of each step [steps, layers] that counts [steps, layers, experts] take under a table."""
        return np.asarray(self.token_s * hottest_each(table, counts, self.ranks))

    def moves(self, old: Ints, new: Ints, experts: int) -> tuple[Ints, Floats]:
        """Experts that travel and seconds, both [layers]."""
        moved, seconds = table_moves(old, new, self.domain, experts, self.near_s, self.far_s)
        return moved, seconds


@dataclass(frozen=True)
class Choice:
    """What a policy wants before a step: a table (None = as it is), and how many layers it solved to know."""

    table: Ints | None = None
    solved: int = 0


KEEP = Choice()


class Policy(Protocol):
    """When to lay experts out anew. `choose` sees the counts of the steps before, and nothing later."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        ...

    def choose(self, past: Floats, table: Ints) -> Choice:
        """past: [steps so far, layers, experts]; table: [layers, slots] as it is."""
        ...


@dataclass(frozen=True)
class Run:
    """One policy over one series.

    step_s, move_s, solve_s: [steps]; moved: experts that travelled before each step [steps]. tables: every table it
    had, in order, with the step from which on it held. cpu_s: what deciding took here.
    """

    name: str
    step_s: Floats
    move_s: Floats
    solve_s: Floats
    moved: Ints
    tables: tuple[tuple[int, Ints], ...] = field(repr=False)
    cpu_s: float = 0.0

    @property
    def by_step_s(self) -> Floats:
        """All seconds of each step: [steps]."""
        return np.asarray(self.step_s + self.move_s + self.solve_s)

    @property
    def total_s(self) -> float:
        """All seconds."""
        return float(self.by_step_s.sum())

    @property
    def relayouts(self) -> int:
        """Steps before which at least one expert travelled."""
        return int((self.moved > 0).sum())

    def to_json(self) -> dict[str, Any]:
        """Its sums."""
        return {
            "total_s": self.total_s,
            "steps_s": float(self.step_s.sum()),
            "moves_s": float(self.move_s.sum()),
            "solves_s": float(self.solve_s.sum()),
            "relayouts": self.relayouts,
            "moved_experts": int(self.moved.sum()),
        }


def run(policy: Policy, counts: Floats, start: Ints, prices: Prices) -> Run:
    """Run a policy over counts [steps, layers, experts] from a table [layers, slots]; re-layouts come before steps."""
    steps, _, experts = counts.shape
    table = start
    step_s, move_s, solve_s = np.zeros(steps), np.zeros(steps), np.zeros(steps)
    moved = np.zeros(steps, dtype=np.int64)
    tables = [(0, start)]
    begun = time.process_time()
    for step in range(steps):
        choice = policy.choose(counts[:step], table)
        solve_s[step] = prices.solve_s * choice.solved
        if choice.table is not None:
            travel, seconds = prices.moves(table, choice.table, experts)
            moved[step], move_s[step] = travel.sum(), seconds.sum()
            table = choice.table
            tables.append((step, table))
        step_s[step] = prices.other_s + prices.steps_s(table, counts[step : step + 1]).sum()
    return Run(policy.name, step_s, move_s, solve_s, moved, tuple(tables), time.process_time() - begun)
