"""What a prediction is made of: how much of TTFT and TPOT each family of costs makes, by running again with it dearer.

In a closed loop every time scales with the costs, so what a tenth more of one family adds to a figure, over a tenth of
the figure, is that family's share of it, queueing included, and the shares of all families sum to 1 (to the share of
the front end, which is a constant, and to requests that meet at other steps). The shares so found tell which family
made a prediction drift, and which one a measurement contradicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate
from moesim.cost.ops import Operation
from moesim.cost.overlap import MeasuresOverlap, Slowdown
from moesim.engine.deployment import Groundwork
from moesim.engine.draws import FAMILIES, LATER, Draw
from moesim.engine.serving import Load, Served, StepTime, serve
from moesim.engine.simulate import Simulation
from moesim.errors import BadInput

# What people call a family of costs -> the families of `Estimate` in it. OTHER is found as what the rest leave of 1.
PARTS: dict[str, tuple[str, ...]] = {
    "experts": ("experts",),
    "attention": ("attention",),
    "dense GEMM": ("gemm",),
    "network": ("collective", "dispatch"),
    "other kernels": ("memory_bound",),
    "engine overhead": ("overhead",),
}
OTHER = "other kernels"
FRONT_END, WAITING, PROMPTS = "front end", "waiting", "beside prompts"
# How much dearer a family is made. Small enough to leave the order of steps alone, large enough to be no rounding.
STEP = 0.1
# What prices are made of: parts that a profile holds, to be scaled on purpose.
SCALED = ("experts", "attention", "dense GEMM", "network", "other kernels")


@dataclass(frozen=True)
class Causes:
    """Shares of a predicted TTFT and TPOT by part, and the relative sigma that the prices' own errors give each.

    ttft, tpot: part of PARTS (and FRONT_END) -> share, which sum to 1. waiting: share of TTFT before the request's own
    prompt is read. prompts: share of TPOT in steps that also read prompts. ttft_sigma, tpot_sigma: one standard
    deviation of ln(true / predicted) from the leave-out errors of the tables, families independent of each other.
    """

    ttft: Mapping[str, float]
    tpot: Mapping[str, float]
    waiting: float
    prompts: float
    ttft_sigma: float
    tpot_sigma: float


@dataclass
class Adjusted:
    """A cost model whose prices are scaled by family, and whose sigmas are all 1 and are remembered; a CostModel.

    scale: family of `Estimate` -> factor. weighed: family -> [sum of seconds, sum of seconds x sigma].
    """

    costs: CostModel
    scale: Mapping[str, float]
    weighed: dict[str, list[float]] = field(default_factory=dict)

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation. Raises what the model beneath raises."""
        one = self.costs.estimate(operation)
        seconds = float(one.seconds.mean()) if one.seconds.size else 0.0
        sums = self.weighed.setdefault(one.family, [0.0, 0.0])
        sums[0] += seconds
        sums[1] += seconds * one.rel_sigma
        factor = self.scale.get(one.family, 1.0)
        return replace(one, seconds=one.seconds if factor == 1.0 else one.seconds * factor, rel_sigma=1.0)

    def overlap(self, work: str, gpus: int, nodes: int) -> Slowdown | None:
        """What the model beneath measured; implements MeasuresOverlap."""
        return self.costs.overlap(work, gpus, nodes) if isinstance(self.costs, MeasuresOverlap) else None

    def sigma(self, family: str) -> float:
        """The mean sigma of a family's prices, weighted by seconds; 0 where none was asked for."""
        seconds, weighted = self.weighed.get(family, (0.0, 0.0))
        return weighted / seconds if seconds > 0.0 else 0.0


def adjusted(ground: Groundwork, scale: Mapping[str, float]) -> Groundwork:
    """The same groundwork with costs that `causes_of` can ask, scaled by part (see PARTS). Raises BadInput."""
    return replace(ground, costs=Adjusted(ground.costs, by_family(scale)))


def by_family(scale: Mapping[str, float]) -> dict[str, float]:
    """Factors of families from factors of parts; `all` stands for every part of SCALED. Raises BadInput."""
    found: dict[str, float] = {}
    for name, factor in scale.items():
        parts = SCALED if name == "all" else (name,)
        if not set(parts) <= set(SCALED) or not 0.0 < factor < math.inf:
            raise BadInput(
                f"{name}={factor:g} scales nothing", where="--scale",
                mend=f"write PART=FACTOR with a factor above 0 and one of: {', '.join(SCALED)}, all",
            )  # fmt: skip
        found |= {family: factor for part in parts for family in PARTS[part]}
    return found


def causes_of(simulation: Simulation, seen: Callable[[Served], tuple[float, float]], front_end_s: float) -> Causes:
    """Shares of the means of TTFT and TPOT of a run without roles whose groundwork is `adjusted`.

    seen: a run -> TTFT and TPOT in seconds, as the prediction takes them. front_end_s: constant part of TTFT. Costs
    about as much as the run itself.
    """
    costs = simulation.deployment.ground.costs
    assert isinstance(costs, Adjusted)
    ttft_s, tpot_s = seen(simulation.served)
    shares: dict[str, dict[str, float]] = {"ttft": {FRONT_END: front_end_s / ttft_s}, "tpot": {FRONT_END: 0.0}}
    for part in PARTS:
        if part == OTHER:
            continue
        more = seen(_served(simulation, simulation.load, simulation.model.under(_dearer(simulation, part))))
        for name, now, then in zip(shares, (ttft_s, tpot_s), more, strict=True):
            shares[name][part] = (then / now - 1.0) / STEP if now > 0.0 else 0.0
    for found in shares.values():
        found[OTHER] = 1.0 - sum(found.values())
    sigmas = {
        part: math.sqrt(sum(costs.sigma(family) ** 2 for family in families) / len(families))
        for part, families in PARTS.items()
    }
    sigmas["engine overhead"] = simulation.deployment.rules.overhead_rel_sigma
    spread = {
        name: math.sqrt(sum((found[part] * sigma) ** 2 for part, sigma in sigmas.items()))
        for name, found in shares.items()
    }
    return Causes(
        shares["ttft"],
        shares["tpot"],
        waiting=_waiting(simulation, ttft_s, front_end_s),
        prompts=_beside_prompts(simulation.served),
        ttft_sigma=spread["ttft"],
        tpot_sigma=spread["tpot"],
    )


def _dearer(simulation: Simulation, part: str) -> Draw:
    """The possible truth in which one part costs a STEP more; prices have sigma 1, the engine's rules their own."""
    normal = dict.fromkeys((*FAMILIES, *LATER), 0.0)
    for family in PARTS[part]:
        sigma = simulation.deployment.rules.overhead_rel_sigma if family == "overhead" else 1.0
        normal[family] = math.log1p(STEP) / sigma
    return Draw(normal, simulation.model.routing.weights)


def _served(simulation: Simulation, load: Load, timed: StepTime) -> Served:
    deployment = simulation.deployment
    return serve(
        load,
        simulation.model.limits,
        ranks=deployment.setup.parallel.attention_dp,
        instances=deployment.instances,
        step_time=timed,
        balance=deployment.serving.balance,
    )


def _waiting(simulation: Simulation, ttft_s: float, front_end_s: float) -> float:
    """Share of the mean TTFT that a prompt of the mean length alone on the machine would not take."""
    load = simulation.load
    isl = np.array([max(1, round(float(load.isl.mean())))], dtype=np.int64)
    one = _served(simulation, Load(isl, np.array([2], dtype=np.int64), None, 1), simulation.model.under(None))
    alone_s = float(one.first_token_s[0] - one.arrival_s[0])
    return min(max(1.0 - (alone_s + front_end_s) / ttft_s, 0.0), 1.0)


def _beside_prompts(served: Served) -> float:
    """Share of the time between first and last tokens in steps that read prompts, over all requests."""
    ends_s = served.step_start_s + served.step_s
    reading_s = np.cumsum(np.where(served.step_prefill_tokens > 0, served.step_s, 0.0))

    def until(times_s: NDArray[np.float64]) -> Any:
        return np.interp(times_s, ends_s, reading_s, left=0.0)

    done = np.isfinite(served.finish_s)
    first_s, finish_s = served.first_token_s[done], served.finish_s[done]
    whole_s = float((finish_s - first_s).sum())
    return float((until(finish_s) - until(first_s)).sum()) / whole_s if whole_s > 0.0 else 0.0
