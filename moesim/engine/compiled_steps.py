"""How long a planned step takes, compiled, by the tables of a `StepModel`; what a step needs first is asked for.

What the loops cannot know yet (a table that is first needed, a prompt length that was not priced) they ask Python for,
and go on where they stopped.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Plan
from moesim.engine.kernel import kernel
from moesim.engine.lookups import DecodeAttention, Graphs, attention_of_rank, interpolated, sizes_of, trilinear
from moesim.engine.steptable import StepTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Why the loop came back to Python.
DONE, NEED_DECODE, NEED_PREFILL, NEED_PROMPT, TOO_SMALL, TOO_LARGE, LOG_FULL, GAPS_FULL = range(8)
# Places in a loop's `counters` and `clock` of the prompts that are asked for.
ASKED_SEQS, ASKED_TOKENS = 6, 7
ASKED_PREFIX = 2
# A step outside the priced grid by less than this (relative) is on its end.
ON_THE_END = 1e-9
FIRST_PROMPTS = 64


class Grid(NamedTuple):
    """A StepTable as the loop takes it; `known` is false until it is asked for, `ends` tells which ends refuse."""

    known: bool
    tokens: Floats
    hot: Floats
    attention_s: Floats
    seconds: Floats
    before_s: Floats
    ends_below: bool
    ends_above: bool


class Prompts(NamedTuple):
    """Attention seconds of prompts by (sequences, tokens, prefix of each): open addressing, sequences 0 where free."""

    seqs: Ints
    tokens: Ints
    prefix: Floats
    seconds: Floats


class Timed(Protocol):
    """What times the steps: `stepmodel.TimedModel`."""

    def table(self, kind: str) -> StepTable:
        """The timed table of a kind of step. Raises OutsideProfile."""
        ...

    def prompt_s(self, seqs: int, tokens: int, prefix: float) -> float:
        """Attention of the prompts that a rank reads, of one layer. Raises OutsideProfile."""
        ...

    def attention(self) -> DecodeAttention:
        """Decode attention."""
        ...

    def graphs_taken(self) -> Graphs:
        """Captured graphs."""
        ...


_NOTHING = np.zeros(0)
_UNKNOWN = Grid(False, _NOTHING, _NOTHING, _NOTHING, np.zeros((0, 0, 0)), _NOTHING, False, False)


def _grid(table: StepTable) -> Grid:
    return Grid(
        True, table.tokens, table.hot, table.attention_s, table.seconds, table.before_s, table.lower is not None,
        table.upper is not None,
    )  # fmt: skip


@kernel
def _place(prompts: Prompts, seqs: int, tokens: int, prefix: float) -> int:
    """Where a key stands, or the free place that it would take."""
    size = len(prompts.seqs)
    at = (seqs * 7919 + tokens * 104729 + int(prefix * 16.0) * 1299709) % size
    while prompts.seqs[at] != 0:
        if prompts.seqs[at] == seqs and prompts.tokens[at] == tokens and prompts.prefix[at] == prefix:
            return at
        at = (at + 1) % size
    return at


@kernel
def step_s(
    plan: Plan, decode: Grid, prefill: Grid, attention: DecodeAttention, graphs: Graphs, prompts: Prompts,
    counters: Ints, clock: Floats,
) -> tuple[int, float]:  # fmt: skip
    """Why a planned step cannot be timed yet (DONE where it can), and its seconds."""
    ranks = len(plan.decode_seqs)
    total, most, reading = sizes_of(plan.decode_seqs, plan.prefill_tokens)
    grid = prefill if reading > 0 else decode
    if not grid.known:
        return (NEED_PREFILL if reading > 0 else NEED_DECODE), 0.0
    mean = total / ranks
    longest = 0.0
    for rank in range(ranks):
        seconds = attention_of_rank(plan.decode_seqs[rank], plan.decode_kv[rank], attention)
        seqs = plan.prefill_seqs[rank]
        if plan.prefill_tokens[rank] > 0:
            prefix = plan.prefill_prefix[rank] / seqs
            at = _place(prompts, seqs, plan.prefill_tokens[rank], prefix)
            if prompts.seqs[at] == 0:
                counters[ASKED_SEQS], counters[ASKED_TOKENS] = seqs, plan.prefill_tokens[rank]
                clock[ASKED_PREFIX] = prefix
                return NEED_PROMPT, 0.0
            seconds += prompts.seconds[at]
        longest = max(longest, seconds)
    if mean < grid.tokens[0] * (1 - ON_THE_END) and grid.ends_below:
        return TOO_SMALL, 0.0
    if mean > grid.tokens[-1] * (1 + ON_THE_END) and grid.ends_above:
        return TOO_LARGE, 0.0
    if reading == 0:
        rows = float(most)
        place = int(np.searchsorted(graphs.sizes, most))
        if place < len(graphs.sizes):
            rows = float(graphs.sizes[place])
        padding = interpolated(grid.tokens, grid.before_s, rows) - interpolated(grid.tokens, grid.before_s, mean)
        longest = longest + max(0.0, padding)
        if len(graphs.sizes) > 0 and most > graphs.sizes[-1]:
            longest += graphs.eager_layer_s
    return DONE, trilinear(grid.tokens, grid.hot, grid.attention_s, grid.seconds, mean, most / mean, longest)


class StepTables:
    """What one kind of instance has been timed for so far: two grids, and the prompts that were met."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed
        self.tables: dict[str, StepTable] = {}
        self.decode, self.prefill = _UNKNOWN, _UNKNOWN
        self.prompts, self.priced = _no_prompts(FIRST_PROMPTS), 0

    def answer(self, why: int, counters: Ints, clock: Floats, kind: str) -> None:
        """Bring what a step asked for; `kind` of table it belongs to. Raises OutsideProfile."""
        if why == NEED_PROMPT:
            self._price(int(counters[ASKED_SEQS]), int(counters[ASKED_TOKENS]), float(clock[ASKED_PREFIX]))
        else:
            self._bring(why, kind)

    def _bring(self, why: int, kind: str) -> None:
        """The table that a step asks for; or the reason why it has no price, raised."""
        if why in (TOO_SMALL, TOO_LARGE):
            outside = self.tables[kind].lower if why == TOO_SMALL else self.tables[kind].upper
            assert outside is not None
            raise outside
        kind = "prefill" if why == NEED_PREFILL else "decode"
        self.tables[kind] = self.timed.table(kind)
        if kind == "decode":
            self.decode = _grid(self.tables[kind])
        else:
            self.prefill = _grid(self.tables[kind])

    def _price(self, seqs: int, tokens: int, prefix: float) -> None:
        """Price prompts that were not met before; the places are doubled before half of them are taken."""
        if 2 * (self.priced + 1) > len(self.prompts.seqs):
            old, self.prompts = self.prompts, _no_prompts(2 * len(self.prompts.seqs))
            for place in np.flatnonzero(old.seqs):
                self._keep(int(old.seqs[place]), int(old.tokens[place]), old.prefix[place], old.seconds[place])
        self._keep(seqs, tokens, prefix, self.timed.prompt_s(seqs, tokens, prefix))
        self.priced += 1

    def _keep(self, seqs: int, tokens: int, prefix: float, seconds: float) -> None:
        place = _place(self.prompts, seqs, tokens, prefix)
        self.prompts.seqs[place], self.prompts.tokens[place] = seqs, tokens
        self.prompts.prefix[place], self.prompts.seconds[place] = prefix, seconds


def _no_prompts(size: int) -> Prompts:
    return Prompts(np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size), np.zeros(size))
