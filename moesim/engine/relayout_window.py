"""What an engine knows of its loads: the counts of its last steps, and how large they were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Plan
from moesim.engine.mixtures import RequestMix
from moesim.engine.relayout_timers import Layouts
from moesim.engine.stepmodel import ExactModel, TimedModel
from moesim.routing.trace import RoutingCounts

Floats = NDArray[np.float64]

# Steps drawn at once: a batch of DeepSeek-V3's is 8 MB.
AT_ONCE = 64
# Steps of a window, evenly spread, on which two placements' step times are compared.
COMPARED = 16


class Window:
    """The last steps of one instance.

    Steps that were timed one by one bring the counts that they were priced with. Steps timed by table get theirs when
    the window is asked for: each step is drawn alone, from the loads that were served at its time.
    """

    def __init__(self, layouts: Layouts, rng: np.random.Generator) -> None:
        self.layouts, self.rng = layouts, rng
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self._tokens: dict[tuple[str, int], list[float]] = {}
        self._plans: list[Plan] = []
        self._counted: Floats | None = None
        self.steps = 0

    def add(self, plan: Plan, mix: int, exact: ExactModel | None) -> None:
        """Take in a step; exact: what timed it one by one, whose counts are then known."""
        model = self.layouts.model
        if exact is not None:
            for _, counts in exact.routed:
                whole = counts.sum(axis=0)
                self._counted = whole if self._counted is None else self._counted + whole
        else:
            kind = "prefill" if plan.prefill_tokens.any() else "decode"
            tokens = plan.decode_seqs.sum() * (1 + model.drafts) + plan.prefill_tokens.sum()
            self._tokens.setdefault((kind, mix), []).append(float(tokens))
        self._plans.append(Plan._make(part.copy() for part in plan))
        self.steps += 1
        if len(self._plans) >= 2 * COMPARED:
            self._plans = self._plans[::2]

    def counts(self) -> Floats:
        """Counts of all steps together: [layers, experts]."""
        found = self._counted
        for (kind, mix), tokens in self._tokens.items():
            sizes = np.asarray(tokens)
            for begin in range(0, len(sizes), AT_ONCE):
                drawn = self._draw(kind, mix, sizes[begin : begin + AT_ONCE])
                found = drawn if found is None else found + drawn
        assert found is not None
        return found

    def _draw(self, kind: str, mix: int, tokens: Floats) -> Floats:
        routing = self.layouts.routing(mix)
        loads = routing.for_phase(kind)
        if isinstance(routing, RequestMix):
            return np.asarray(routing.counts(loads[0], tokens, self.rng).sum(axis=0))
        weights = routing.weights[loads] / routing.weights[loads].sum()
        chosen = self.rng.choice(loads, size=len(tokens), p=weights)
        parts = [routing.counts(load, tokens[chosen == load], self.rng).sum(axis=0) for load in np.unique(chosen)]
        return np.asarray(np.sum(parts, axis=0))

    def as_load(self, counts: Floats) -> RoutingCounts:
        """Counts as a solver takes them."""
        placement = self.layouts.model.deployment.setup.placement
        return RoutingCounts(counts[None], placement.layer_ids, placement.absolute_layers, name="window")

    def mean_step_s(self, timers: Sequence[TimedModel]) -> list[float]:
        """Mean time of some of the steps under each timer."""
        return [float(np.mean([timer(plan) for plan in self._plans])) for timer in timers]
