"""Two tools on one task: their choices, their figures for the same plans, how far they agree, and what each would lose.

Nothing here says which of the two is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from validate.accuracy import spearman
from validate.side_by_side.plans import (
    OWN,
    Seen,
    SidePlan,
    Stage,
    aic_grouped,
    alike,
    assumed,
    plan_of,
    rungs,
)
from validate.side_by_side.sweep import AicPrice, AicRow, AicTask

SCHEDULE = "schedule"
OVERLAP = "overlap of micro-batches"
ROUNDING = 1e-9
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Both:
    """A plan with what aiconfigurator says of it and what moesim does, under its assumptions and the scenario's own."""

    plan: SidePlan
    priced: AicPrice
    assumed: Seen
    own: Seen


@dataclass(frozen=True)
class Agreement:
    """How far two orders of the same plans agree, over those that both price; regret: share lost by the choice.

    theirs_lost: what the best of aiconfigurator's figures loses as moesim sees it; ours_lost: the reverse. NaN where
    none keeps the limits. *_breaks: the choice breaks the limits in the other's figures.
    """

    plans: int
    spearman: float
    theirs_lost: float
    theirs_breaks: bool
    ours_lost: float
    ours_breaks: bool


def distinct(
    rows: Sequence[AicRow], prices: Sequence[AicPrice], gpus: int
) -> tuple[list[tuple[SidePlan, AicPrice]], dict[str, int]]:
    """aiconfigurator's rows as plans with their prices, the best first and each once; and why others are left out."""
    found: dict[SidePlan, AicPrice] = {}
    left: dict[str, int] = {}
    for row, price in zip(rows, prices, strict=True):
        plan = plan_of(row.point, price, gpus)
        if isinstance(plan, str):
            left[plan] = left.get(plan, 0) + 1
        else:
            found.setdefault(plan, price)
    return list(found.items()), left


def of_trial(trial: Mapping[str, Any], concurrency: int, spec: Scenario) -> SidePlan:
    """A plan of `moesim tune --json` at its concurrency."""
    assert spec.serving is not None
    options = dict(trial["options"])
    limits = {
        name: int(options.pop(f"serving.batching.{name}", getattr(spec.serving.batching, name)))
        for name in ("max_batch_tokens_per_dp_rank", "max_running_requests_per_dp_rank")
    }
    return SidePlan(
        parallel=ParallelSpec.model_validate(trial["parallel"]),
        backend=str(trial["backend"]),
        concurrency=concurrency,
        batch_tokens=limits["max_batch_tokens_per_dp_rank"],
        running=limits["max_running_requests_per_dp_rank"],
        chosen_by="moesim",
        schedule=str(trial["schedule"]),
        solver=str(trial["solver"]),
        redundant=int(trial["redundant_experts"]),
        options=tuple(options.items()),
    )


def look(stage: Stage, plans: Sequence[tuple[SidePlan, AicPrice]], power_law: AicPrice) -> list[Both]:
    """Simulate each plan under both views. power_law: a price whose assumptions stand for plans it has no figure of."""
    found = []
    for plan, price in plans:
        view = assumed(price if price.error is None else power_law)
        found.append(Both(plan, price, stage.see(plan, view), stage.see(plan, OWN)))
    return found


def agreement(plans: Sequence[Both], task: AicTask, seen: Callable[[Both], Seen]) -> Agreement:
    """Order and regret by output tokens/s/GPU under the limits, over plans that both tools have a figure for."""
    usable = [one for one in plans if one.priced.error is None and seen(one).error is None]
    theirs = np.asarray([one.priced.tokens_per_s_per_gpu for one in usable])
    ours = np.asarray([seen(one).tokens_per_s_per_gpu for one in usable])
    order = spearman(theirs, ours) if len(usable) > 1 else math.nan
    theirs_keep = np.asarray([aic_meets(one.priced, task) for one in usable], dtype=bool)
    ours_keep = np.asarray([seen(one).meets(task.ttft_ms / 1e3, task.tpot_ms / 1e3) for one in usable], dtype=bool)
    theirs_lost, theirs_breaks = lost(theirs, theirs_keep, ours, ours_keep)
    ours_lost, ours_breaks = lost(ours, ours_keep, theirs, theirs_keep)
    return Agreement(len(usable), order, theirs_lost, theirs_breaks, ours_lost, ours_breaks)


def at_one_load(plans: Sequence[Both]) -> list[Both]:
    """The plans at the concurrency that most of them have: layouts compared without the order of loads."""
    loads = [one.plan.concurrency for one in plans]
    common = max(dict.fromkeys(loads), key=loads.count)
    return [one for one in plans if one.plan.concurrency == common]


def aic_meets(price: AicPrice, task: AicTask) -> bool:
    """Whether aiconfigurator's averages keep the limits and the plan fits the memory."""
    fits = price.error is None and not price.out_of_memory
    return fits and price.ttft_ms <= task.ttft_ms and price.tpot_ms <= task.tpot_ms


def lost(chosen_by: Floats, chooser_keeps: Bools, judged_by: Floats, judge_keeps: Bools) -> tuple[float, bool]:
    """Share of the judge's best rate, among plans that keep its limits, that the chooser's best plan loses.

    And whether that plan breaks the judge's limits: its rate counts all the same, so that a loss may be negative.
    """
    if not np.any(chooser_keeps) or not np.any(judge_keeps):
        return math.nan, False
    pick = int(np.argmax(np.where(chooser_keeps, chosen_by, -np.inf)))
    best = float(np.max(np.where(judge_keeps, judged_by, -np.inf)))
    return 1.0 - float(judged_by[pick]) / best, not bool(judge_keeps[pick])


def ladder(stage: Stage, plan: SidePlan, price: AicPrice) -> list[tuple[str, Seen]]:
    """moesim's figures of a plan from aiconfigurator's assumptions to the scenario's own, one at a time.

    Before them, its assumptions without any skew: what its power law is worth in moesim.
    """
    even = replace(assumed(price), name="as it assumes, but every expert gets the same", even=True)
    return [(view.name, stage.see(plan, view)) for view in (even, *rungs(price))]


def apart(one: Both) -> dict[str, Any]:
    """The steps of a plan under aiconfigurator's assumptions, taken apart by operation (seconds)."""
    price, seen = one.priced, one.assumed
    return {
        "plan": one.plan.label(),
        "overlaps": one.plan.schedule not in (None, "sequential"),
        "decode": {
            "aiconfigurator_s": _seconds(price.decode_step_ms),
            "moesim_s": seen.decode_step_s,
            "tokens_per_rank": seen.decode_tokens,
            "by_group": alike(aic_grouped(price.decode_by_operation_ms), seen.decode_by_group_s),
        },
        "mixed": {
            "aiconfigurator_s": _seconds(price.mixed_step_ms),
            "moesim_s": seen.mixed_step_s,
            "tokens_per_rank": seen.mixed_tokens,
            "by_group": alike(aic_grouped(price.mixed_by_operation_ms), seen.mixed_by_group_s),
        },
        "memory": {
            "aiconfigurator_bytes": price.memory_gib * 2**30,
            "moesim_bytes": seen.peak_bytes,
            "moesim_limit_bytes": seen.limit_bytes,
        },
        "tpot": {
            "aiconfigurator_s": price.tpot_ms / 1e3,
            "moesim_s": seen.tpot_s,
            "parts": tpot_apart(one),
        },
        "kv_cache": price.kv_cache,
        "attention": price.fmha,
        "power_law": price.power_law,
        "exchange": dict(price.comm),
        "mixed_steps": price.mixed_steps,
        "decode_steps": price.decode_steps,
    }


def tpot_apart(one: Both) -> list[tuple[str, float]]:
    """What leads from aiconfigurator's TPOT to moesim's under its assumptions, in seconds; the parts add up.

    aiconfigurator's TPOT is a mean of its two steps, w of the one with prompts: tpot = w mixed + (1 - w) decode. Each
    group counts with its difference in both steps, so weighted; SCHEDULE is the rest: how often, and with how many
    tokens, prompts are read. Where moesim's schedule overlaps, OVERLAP is what its parts do not add up to. Empty where
    either has no figure.
    """
    price, seen = one.priced, one.assumed
    decode, mixed = _seconds(price.decode_step_ms), _seconds(price.mixed_step_ms)
    if price.error is not None or seen.error is not None or not mixed > decode or not math.isfinite(seen.mixed_step_s):
        return []
    weight = (price.tpot_ms / 1e3 - decode) / (mixed - decode)
    found: dict[str, float] = {}
    for share, theirs, ours in (
        (1.0 - weight, price.decode_by_operation_ms, seen.decode_by_group_s),
        (weight, price.mixed_by_operation_ms, seen.mixed_by_group_s),
    ):
        for name, one_s, other_s in alike(aic_grouped(theirs), ours, whole_block=blocked(price)):
            found[name] = found.get(name, 0.0) + share * (other_s - one_s)
    steps = (1.0 - weight) * (seen.decode_step_s - decode) + weight * (seen.mixed_step_s - mixed)
    overlap = steps - sum(found.values())
    if abs(overlap) > ROUNDING * steps_scale(one):
        found[OVERLAP] = overlap
    found[SCHEDULE] = seen.tpot_s - price.tpot_ms / 1e3 - steps
    return sorted(found.items(), key=lambda part: -abs(part[1]))


def steps_scale(one: Both) -> float:
    """Seconds that a difference of the steps is small or large beside."""
    return max(one.assumed.decode_step_s, one.assumed.mixed_step_s)


def blocked(price: AicPrice) -> bool:
    """Whether either step of aiconfigurator's has its expert block in one figure."""
    both = (price.decode_by_operation_ms, price.mixed_by_operation_ms)
    return any("expert block" in aic_grouped(step) for step in both)


def _seconds(milliseconds: float | None) -> float:
    return math.nan if milliseconds is None else milliseconds / 1e3


def both_json(one: Both, task: AicTask) -> dict[str, Any]:
    """A plan with both tools' figures, ready for JSON."""
    limits = (task.ttft_ms / 1e3, task.tpot_ms / 1e3)
    plan = asdict(one.plan)
    plan["parallel"] = one.plan.parallel.model_dump(mode="json")
    return {
        "label": one.plan.label(),
        "chosen_by": one.plan.chosen_by,
        "plan": plan,
        "aiconfigurator": {**asdict(one.priced), "meets_limits": aic_meets(one.priced, task)},
        "moesim_assumed": {**asdict(one.assumed), "meets_limits": one.assumed.meets(*limits)},
        "moesim_own": {**asdict(one.own), "meets_limits": one.own.meets(*limits)},
    }


def finite(value: Any) -> Any:
    """The same with None where a number is not finite, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
