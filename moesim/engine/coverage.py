"""Which prices of a deployment's steps are measured: what `simulate` asks for, recorded while it asks.

Nothing here knows a kernel: the step model prices its whole grid of decode and prefill steps, and the batcher's own
plans give the prompts, against a cost model that writes down every question and its answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.cost.estimate import CostModel, Estimate, Tag
from moesim.cost.ops import ExpertGemm, Operation
from moesim.cost.roofline import Roofline
from moesim.engine.batcher import Limits, arrive, finish_step, new_plan, new_ranks, new_requests, plan_step
from moesim.engine.deployment import Deployment
from moesim.engine.stepmodel import StepModel
from moesim.engine.workload import lengths
from moesim.errors import OutsideProfile

Floats = NDArray[np.float64]
REFUSED = "refused"
LABELS = (*(tag.label for tag in Tag), REFUSED)
# Steps of the burst of prompts that are priced: enough for every chunk of long prompts to come up.
MOST_PROMPT_STEPS = 64


@dataclass(frozen=True)
class Coverage:
    """How one kernel at one shape is priced over all the sizes that the steps of a phase ask for.

    kernel, shape: the operation and what is fixed about it. shares: label of LABELS -> share of the prices asked.
    ranges: label -> size -> (least, most). sources: tables that answered. mend: what would measure what is not
    measured; "" where nothing is missing or nobody says.
    """

    phase: str
    kernel: str
    shape: dict[str, Any]
    prices: int
    shares: dict[str, float]
    ranges: dict[str, dict[str, tuple[float, float]]]
    sources: tuple[str, ...]
    mend: str

    @property
    def refused(self) -> float:
        """Share of the prices that the scenario's cost model refuses."""
        return self.shares.get(REFUSED, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def coverage(deployment: Deployment) -> list[Coverage]:
    """Price the steps that a deployment may meet, decode and prefill, and tell how each kernel was priced."""
    ground = deployment.ground
    scenario = ground.scenario
    make = plugins.load(plugins.COSTS, scenario.cost.source, where="cost.source")

    def costs(extrapolate: str) -> CostModel:
        cost = scenario.cost.model_copy(update={"extrapolate": extrapolate})
        made: CostModel = make(scenario.model_copy(update={"cost": cost}), ground.model, ground.cluster)
        return made

    recorder = Recorder(ground.costs, costs("refuse"), costs("allow"), Roofline(ground.cluster))
    watched = replace(deployment, ground=replace(ground, costs=recorder))
    recorder.phase = "decode"  # the step model prices decode attention when it is made
    model = StepModel(watched, seed=scenario.seed)
    model.grid("decode")
    recorder.phase = "prefill"
    model.grid("prefill")
    for seqs, new, prefix in sorted(set(prompts(model.limits, round(lengths(deployment.serving.workload).mean_isl)))):
        model.prefill_attention(seqs, new, prefix)
    return recorder.rows()


def prompts(limits: Limits, isl: int) -> Iterator[tuple[int, float, float]]:
    """Prompts that a rank reads in one step: (how many, mean new tokens, mean context before), by the batcher's plans.

    One prompt alone, and a burst that fills several steps.
    """
    for count in (1, 2 * math.ceil(limits.max_tokens / isl) + 2):
        lengths = np.full(count, isl, dtype=np.int64)
        # One output token each: prompts end when they are read, so that the burst is of prompts alone.
        requests, ranks = new_requests(lengths, np.ones(count, dtype=np.int64)), new_ranks(1, limits.max_running)
        for request in range(count):
            arrive(requests, ranks, 0, request)
        plan = new_plan(1, limits.max_running)
        ended, gaps_s = np.zeros(count + limits.max_running, dtype=np.int64), np.zeros(count + 1)
        gaps_n = np.zeros(count + 1, dtype=np.int64)
        for _ in range(MOST_PROMPT_STEPS):
            if not plan_step(requests, ranks, limits, plan):
                break
            seqs = int(plan.prefill_seqs[0])
            if seqs:
                yield seqs, float(plan.prefill_tokens[0]) / seqs, float(plan.prefill_prefix[0]) / seqs
            finish_step(requests, ranks, limits, plan, 0.0, gaps_s, gaps_n, 1, ended)


@dataclass
class Recorder:
    """A cost model that answers as the scenario's does, and writes down what was asked; never refuses.

    costs: the scenario's. strict: the same without extrapolation, whose refusal tells what would measure a point.
    lenient: the same with it, which tells the refused points apart. roofline: what stands in where nobody prices.
    """

    costs: CostModel
    strict: CostModel
    lenient: CostModel
    roofline: Roofline
    phase: str = ""
    seen: dict[tuple[Any, ...], _Asked] = field(default_factory=dict)

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation and remember how."""
        told, refused, mend = self._price(operation)
        labels = np.broadcast_to(told.tags, told.seconds.shape).astype(np.int64)
        if refused is not None:
            labels = np.where(refused, len(Tag), labels)
        shape = shape_of(operation)
        key = (self.phase, type(operation).__name__, *shape.items())
        asked = self.seen.setdefault(key, _Asked(self.phase, type(operation).__name__, shape))
        asked.add(labels, told.seconds > 0, sizes_of(operation, told.seconds.shape), told.source, mend)
        return told

    def _price(self, operation: Operation) -> tuple[Estimate, NDArray[np.bool_] | None, str]:
        """The price; which points are refused (None: none); what would measure what is missing."""
        try:
            told = self.costs.estimate(operation)
        except OutsideProfile as outside:
            stand_in = self._stand_in(operation)
            beyond = np.broadcast_to(stand_in.tags == int(Tag.EXTRAPOLATED), stand_in.seconds.shape)
            return stand_in, beyond if beyond.any() else np.ones(stand_in.seconds.shape, dtype=bool), outside.mend
        return told, None, self._mend(operation) if (told.tags == int(Tag.EXTRAPOLATED)).any() else ""

    def _stand_in(self, operation: Operation) -> Estimate:
        try:
            return self.lenient.estimate(operation)
        except OutsideProfile:  # a cost model of someone else's may know no extrapolation
            return self.roofline.estimate(operation)

    def _mend(self, operation: Operation) -> str:
        try:
            self.strict.estimate(operation)
        except OutsideProfile as outside:
            return outside.mend
        return ""

    def rows(self) -> list[Coverage]:
        """One row for each kernel, shape and phase, in the order in which they were first asked for."""
        return [asked.row() for asked in self.seen.values() if asked.counts.any()]


def shape_of(operation: Operation) -> dict[str, Any]:
    """What is fixed about an operation: every field that is no array of sizes; an expert kernel's local slots, too.

    The domains of a collective's ranks are left out where they follow from its nodes.
    """
    values = {entry.name: getattr(operation, entry.name) for entry in dataclasses.fields(operation)}
    fixed = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    if not fixed.get("domains", 1):
        del fixed["domains"]
    if isinstance(operation, ExpertGemm):
        fixed["local_experts"] = int(operation.tokens.shape[-1])
    return fixed


def sizes_of(operation: Operation, shape: tuple[int, ...]) -> dict[str, Floats]:
    """Sizes by name, each in the shape of the price."""
    found = {}
    for entry in dataclasses.fields(operation):
        value = getattr(operation, entry.name)
        if isinstance(value, np.ndarray):
            # The experts' tokens have an axis over the local experts; the price is of them together.
            sizes = value.sum(axis=-1) if isinstance(operation, ExpertGemm) else value
            found[entry.name] = np.broadcast_to(np.asarray(sizes, dtype=np.float64), shape)
    return found


@dataclass
class _Asked:
    """What was asked of one kernel at one shape in one phase."""

    phase: str
    kernel: str
    shape: dict[str, Any]
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LABELS), dtype=np.int64))
    ranges: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    mend: str = ""

    def add(
        self, labels: NDArray[np.int64], priced: NDArray[np.bool_], sizes: dict[str, Floats], source: str, mend: str
    ) -> None:
        """Count the prices that are any: no tokens, no time, and nothing to measure."""
        self.counts += np.bincount(labels[priced], minlength=len(LABELS))
        for place in np.unique(labels[priced]):
            own = priced & (labels == place)
            known = self.ranges.setdefault(LABELS[place], {})
            for name, values in sizes.items():
                low, high = float(values[own].min()), float(values[own].max())
                before = known.get(name, (low, high))
                known[name] = (min(low, before[0]), max(high, before[1]))
        if source not in self.sources:
            self.sources.append(source)
        self.mend = self.mend or mend

    def row(self) -> Coverage:
        """The counts as shares."""
        total = int(self.counts.sum())
        shares = {label: float(count) / total for label, count in zip(LABELS, self.counts, strict=True) if count}
        return Coverage(self.phase, self.kernel, self.shape, total, shares, self.ranges, tuple(self.sources), self.mend)
