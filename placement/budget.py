"""How many redundant experts pay: step time against the replica budget on held-out loads, and the memory they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import Scenario
from moesim.units import BYTES_PER_ELEMENT
from placement.compare import Split, refit
from placement.costs import cost_of, with_cost
from placement.judge import LEVEL, Figure
from placement.problem import solve
from placement.steps import TOKENS_PER_RANK

if TYPE_CHECKING:
    from moesim.engine.steptime import TimedPlacements

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Room:
    """What a budget leaves on a GPU: replica_bytes of the redundant experts, kv_tokens that an attention-DP rank holds.

    infeasible: why the budget does not fit at all; None where it does.
    """

    replica_bytes: float
    kv_tokens: int
    infeasible: str | None = None


@dataclass(frozen=True)
class BudgetTimes:
    """Step times of budgets at one batch size, paired: the same loads, steps and cost parameters for all.

    step_s and gain (over the smallest budget priced): by redundant experts of a layer. recommended: the smallest that
    no larger one is told to be faster than; None where none runs the batch, or one alone is priced. full: budgets that
    never run such a batch -> why. left_out: budgets that the profile does not cover -> why. extrapolated: budgets
    priced beyond what was measured.
    """

    tokens_per_rank: int
    mode: str
    step_s: Mapping[int, Figure]
    gain: Mapping[int, Figure]
    recommended: int | None
    full: Mapping[int, str]
    left_out: Mapping[int, str] = field(default_factory=dict)
    extrapolated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Budgets:
    """The map of where replicas pay. room: by redundant experts; unpriced: tokens per rank -> why they are left out."""

    solver: str
    judged: tuple[str, ...]
    rows: tuple[BudgetTimes, ...]
    room: Mapping[int, Room]
    unpriced: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        """One row for each batch size, one entry of each for a budget."""
        return {
            "solver": self.solver,
            "judged_on": list(self.judged),
            "memory": [
                {
                    "redundant_experts": budget,
                    "replica_bytes_per_gpu": room.replica_bytes,
                    "kv_capacity_tokens": room.kv_tokens,
                    "infeasible": room.infeasible,
                }
                for budget, room in self.room.items()
            ],
            "rows": [
                {
                    "tokens_per_rank": row.tokens_per_rank,
                    "dispatch_mode": row.mode,
                    "recommended_redundant_experts": row.recommended,
                    "budgets": [
                        {
                            "redundant_experts": budget,
                            "step_s": time.to_json(),
                            "gain": row.gain[budget].to_json(),
                            "holds_the_batch": budget not in row.full,
                            "does_not_run": row.full.get(budget),
                            "extrapolated": budget in row.extrapolated,
                        }
                        for budget, time in row.step_s.items()
                    ],
                    "left_out": [{"redundant_experts": budget, "reason": why} for budget, why in row.left_out.items()],
                }
                for row in self.rows
            ],
            "unpriced": [{"tokens_per_rank": tokens, "reason": why} for tokens, why in self.unpriced.items()],
            "text": self.text(),
        }

    def sizes(self) -> list[int]:
        """Redundant experts that are priced at some batch size, rising."""
        return sorted({budget for row in self.rows for budget in row.step_s})

    def text(self) -> str:
        """The recommendation in a few sentences."""
        return " ".join(_sentence(row, self.room) for row in self.rows)


def _sentence(row: BudgetTimes, room: Mapping[int, Room]) -> str:
    at = f"At {row.tokens_per_rank} tokens per rank"
    least = min(row.step_s)
    if row.recommended is None and set(row.full) >= set(row.step_s):
        return f"{at} nothing is recommended, as no budget runs: {row.full[least]}."
    if row.recommended is None:
        left = ", ".join(map(str, row.left_out))
        return f"{at} nothing is recommended, as too few budgets are priced to compare (not {left})."
    if row.recommended == least:
        rest = [one for one in row.gain if one > least and one not in row.full]
        if not rest:
            why = "; more do not run the batch" if any(one > least for one in row.full) else ""
            return f"{at}: {least} redundant experts{why}."
        most = max(rest, key=lambda one: row.gain[one].value)
        lead = "no replicas" if least == 0 else f"no more than {least} redundant experts"
        return f"{at}: {lead} (the best other budget, {most}, gains {_share(row.gain[most])})."
    taken = room[row.recommended].replica_bytes - room[least].replica_bytes
    text = (
        f"{at}: {row.recommended} redundant experts gain {_share(row.gain[row.recommended])} over {least} and take "
        f"{taken / 1e9:.1f} GB a GPU"
    )
    before = room[least].kv_tokens
    if before > 0:
        text += f" ({1.0 - room[row.recommended].kv_tokens / before:.0%} of the KV cache)"
    larger = [one for one in row.gain if one > row.recommended and one not in row.full]
    return f"{text}; more are no faster." if larger else f"{text}."


def _share(gain: Figure) -> str:
    return f"{gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"


def judge_budgets(
    scenario: Scenario,
    splits: Sequence[Split],
    request: PlacementRequest,
    solver: str,
    budgets: Sequence[int],
    draws: int,
) -> Budgets:
    """Fit a map for each budget to each split's first part, and time its decode steps on the second.

    Splits that hold decode loads out count where there are any, as in `placement.steps`. A solver that reads the cost
    of time fits each batch size anew, others once. Intervals are of joint draws of the cost parameters, and of the
    splits. Raises BadInput without a split or a budget, OutsideProfile where no batch size can be priced.
    """
    from moesim.engine.deployment import groundwork, reads_cost, refuse_roles
    from moesim.engine.steptime import timed_placements

    refuse_roles(scenario)
    judged = _decode_splits(splits)
    ground = groundwork(scenario)
    costs = cost_of(scenario, solver, ground=ground)
    by_size = reads_cost(plugins.load(plugins.SOLVERS, solver, where="--solver"))
    room = {budget: _room(scenario, ground, request, budget) for budget in sorted(set(budgets))}
    kept = [budget for budget, one in room.items() if one.infeasible is None]
    if not kept:
        raise Infeasible(
            "no budget fits: " + "; ".join(str(one.infeasible) for one in room.values()), where="--budgets",
            mend="give smaller budgets, or more GPUs",
        )  # fmt: skip
    fitted: dict[tuple[int, int | None], dict[str, ExpertPlacement]] = {}
    rows, unpriced = [], {}
    outside: OutsideProfile | None = None
    for tokens in TOKENS_PER_RANK:
        try:
            times: list[TimedPlacements] = []
            for index, part in enumerate(judged):
                key = (index, tokens if by_size else None)
                if key not in fitted:
                    asked = with_cost(refit(request, part.fit), part.fit, costs, tokens)
                    fitted[key] = {str(budget): solve(_sized(asked, budget), solver).placement for budget in kept}
                times += timed_placements(ground, fitted[key], part.judge, [tokens], draws, request.seed)
            row = _joined(times, kept, request.seed)
        except OutsideProfile as error:
            unpriced[tokens] = error.line()
            outside = error
            continue
        rows.append(row)
    if not rows and outside is not None:
        raise outside
    names = dict.fromkeys(load.name for part in judged for load in part.judge)
    return Budgets(solver, tuple(names), tuple(rows), room, unpriced)


def _decode_splits(splits: Sequence[Split]) -> list[Split]:
    if not splits:
        raise BadInput("nothing is held out to judge budgets on", where="--budgets", mend="give several loads")
    found = [Split(part.fit, tuple(load for load in part.judge if load.phase == "decode")) for part in splits]
    return [part for part in found if part.judge] or list(splits)


def _sized(request: PlacementRequest, budget: int) -> PlacementRequest:
    return replace(request, slots=request.experts + budget)


def _room(scenario: Scenario, ground: Any, request: PlacementRequest, budget: int) -> Room:
    from moesim.engine.deployment import check_plan

    model, bytes_each = ground.model, BYTES_PER_ELEMENT[scenario.precision.experts]
    taken = budget / request.ranks * model.moe_layers * model.expert_parameters() * bytes_each
    if scenario.parallel is not None:
        taken /= scenario.parallel.expert_tp
    spec = scenario.placement.model_copy(update={"redundant_experts": budget, "file": None})
    try:
        _sized(request, budget)
        _, counted = check_plan(ground, scenario.model_copy(update={"placement": spec}))
    except Infeasible as error:
        return Room(taken, 0, f"{budget}: {error.what}")
    return Room(taken, counted.kv_capacity_tokens)


def _joined(times: Sequence[TimedPlacements], kept: Sequence[int], seed: int) -> BudgetTimes:
    """One row of every split's times; a budget that one of them leaves out is left out. Raises OutsideProfile."""
    left_out = {int(name): why for one in times for name, why in one.left_out.items()}
    priced = [budget for budget in kept if budget not in left_out]
    if not priced:
        raise OutsideProfile(next(iter(left_out.values())))
    found = np.asarray([[one.step_s[str(budget)] for budget in priced] for one in times])
    full = {int(name): why for one in times for name, why in one.refused.items()}
    row = _row(times[0].tokens_per_rank, times[0].mode, priced, found, full, seed)
    beyond = {int(name) for one in times for name in one.extrapolated}
    if left_out and len([budget for budget in priced if budget not in full]) < 2:
        row = replace(row, recommended=None)  # one alone is better than nothing that is known
    return replace(row, left_out=left_out, extrapolated=tuple(one for one in priced if one in beyond))


def _row(
    tokens: int, mode: str, budgets: Sequence[int], times: Floats, full: Mapping[int, str], seed: int
) -> BudgetTimes:
    """times: [splits, budgets, draws + 1]; entry 0 is as best known."""
    splits, _, drawn = times.shape
    rng = np.random.default_rng([seed, 15])
    often = rng.multinomial(splits, np.full(splits, 1.0 / splits), size=drawn - 1) / splits
    each = np.concatenate([times[:, :, :1].mean(axis=0), np.einsum("ds,sbd->bd", often, times[:, :, 1:])], axis=1)

    def figure(values: Floats) -> Figure:
        if drawn == 1:
            return Figure(float(values[0]), float(values[0]), float(values[0]))
        low, high = np.quantile(values[1:], [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
        return Figure(float(values[0]), float(low), float(high))

    gain = {budget: figure(1.0 - each[at] / each[0]) for at, budget in enumerate(budgets)}
    open_ = [at for at, budget in enumerate(budgets) if budget not in full]
    recommended = None
    for at in open_:
        later = [figure(1.0 - each[other] / each[at]) for other in open_ if other > at]
        if not any(one.low > 0.0 and one.value > 0.0 for one in later):
            recommended = budgets[at]
            break
    step_s = {budget: figure(each[at]) for at, budget in enumerate(budgets)}
    return BudgetTimes(tokens, mode, step_s, gain, recommended, full)
