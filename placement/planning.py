"""What `moesim place` does: gather the loads, fit the map to all of them, judge separate fits, tell the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.output.leanings import of_placement
from moesim.output.validation import Covered, cover, evidence_of, validated_over_nodes, validation_keys
from moesim.routing.foretell import Expected, fit_expecting
from moesim.routing.trace import RoutingCounts
from moesim.spec.evidence import Evidence
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import HoldoutSpec, Scenario
from placement.budget import Budgets, judge_budgets
from placement.compare import (
    BASELINE,
    HeldOut,
    Split,
    judge_splits,
    make_splits,
)
from placement.costs import cost_of, with_cost
from placement.cross_node import CrossNode, judge_cross_node
from placement.dispatch import ChoiceTimes, judge_choices
from placement.expected import expect_json
from placement.given_loads import doubts, read_given
from placement.judge import Balance, Figure, balance
from placement.problem import DEFAULT_SOLVER, request_from_loads, solve, without_redundancy
from placement.steps import StepTime, judge_steps, where
from placement.verdict import Verdict, on_balance, on_step_time, tokens_list, withheld

# A scenario that asks for no solver has the plain one; to place by it would compare it with itself.
PLAIN_SOLVER = "contiguous"


@dataclass(frozen=True)
class Asked:
    """What the user asks of `place`, the scenario's part filled in."""

    loads: tuple[RoutingCounts, ...]
    ranks: int
    nodes: int
    slots: int
    groups: int
    solver: str
    holdout: HoldoutSpec
    seed: int
    scenario: Scenario | None = None
    current: ExpertPlacement | None = None
    budgets: tuple[int, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    doubts: tuple[str, ...] = ()
    expected: Expected | None = None


@dataclass(frozen=True)
class Placed:
    """The result of `place`."""

    asked: Asked
    placement: ExpertPlacement
    solve_cpu_s: float
    balance: Balance
    baseline: ExpertPlacement
    baseline_balance: Balance
    held: HeldOut | None
    step_time: StepTime | None
    verdict: Verdict
    choices: ChoiceTimes | None = None
    cross_node: CrossNode | None = None
    budgets: Budgets | None = None
    validation: tuple[Covered, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `placement.json` holds, and more."""
        held = self.held
        gain: dict[str, Any] = {"value": None, "low": None, "high": None}
        if self.step_time is not None:
            gain = {"by": "step_time", **_headline(self.step_time.that_run(self.step_time.gains))}
        elif held is not None:
            gain = {"by": "max_over_mean", **held.gain.to_json()}
        return {
            "schema_version": 1,
            "solver": self.placement.solver,
            "gpus": self.asked.ranks,
            "nodes": self.asked.nodes,
            "groups": self.asked.groups,
            "slots": self.placement.slots,
            "slots_per_gpu": self.placement.slots_per_rank,
            "redundant_experts": self.placement.redundant,
            "duplicates_on_one_gpu": self.placement.duplicates_on_one_rank(),
            "layers": self.placement.layers,
            "experts": self.placement.experts,
            "loads": [load.name for load in self.asked.loads],
            "expect": expect_json(self.asked.loads, self.asked.expected),
            "doubts": list(self.asked.doubts),
            "max_over_mean": self.balance.to_json(),
            "baseline": {
                "solver": self.baseline.solver,
                "slots": self.baseline.slots,
                "max_over_mean": self.baseline_balance.to_json(),
            },
            "holdout": None if held is None else held.to_json(),
            "gain": gain,
            "step_time": None if self.step_time is None else self.step_time.to_json(),
            "replica_choices": None if self.choices is None else self.choices.to_json(),
            "cross_node": None if self.cross_node is None else self.cross_node.to_json(),
            "verdict": self.verdict.to_json(),
            **validation_keys(self.validation),
            "budgets": None if self.budgets is None else self.budgets.to_json(),
            "solve_cpu_s": self.solve_cpu_s,
            "notes": self.placement.notes,
        }


def _headline(gains: dict[int, Figure]) -> dict[str, Any]:
    """The gain at the tokens per rank in the middle of those judged, which it names; no value where there are none."""
    if not gains:
        return {"tokens_per_rank": None, "value": None, "low": None, "high": None}
    tokens = sorted(gains)[len(gains) // 2]
    return {"tokens_per_rank": tokens, **gains[tokens].to_json()}


def ask(
    *,
    scenario: Scenario | None,
    load_files: Sequence[Path],
    gpus: int | None,
    nodes: int | None,
    slots: int | None,
    groups: int | None,
    solver: str | None,
    holdout: float | None,
    seed: int | None,
    current: Path | None = None,
    budgets: Sequence[int] = (),
    experts: int | None = None,
) -> Asked:
    """Fill what was not given from the scenario. Raises BadInput that names what is missing."""
    if experts is not None and scenario is not None:
        raise BadInput("the scenario's model tells its experts", where="--experts", mend="leave it out")
    if budgets and (scenario is None or scenario.serving is None):
        raise BadInput(
            "budgets are compared in step time, which takes a serving scenario",
            where="--budgets",
            mend="give a scenario",
        )
    if seed is None:
        seed = scenario.seed if scenario is not None else 0
    loads = _loads(scenario, load_files, seed, experts)
    ranks = gpus
    if scenario is not None:
        ep = scenario.parallel.ep if scenario.parallel is not None else _cluster_gpus(scenario)
        if ranks not in (None, ep):
            raise BadInput(
                f"{ranks} GPUs are not the {ep} expert-parallel ranks of the scenario",
                where="--gpus",
                mend="leave --gpus out, or change parallel.ep in the scenario",
            )
        ranks = ep
        if nodes is None and not isinstance(scenario.cluster, Path):
            nodes = scenario.cluster.nodes
        if slots is None:
            slots = loads[0].experts + scenario.placement.redundant_experts
        groups = scenario.placement.groups if groups is None else groups
        if solver is None and scenario.placement.solver != PLAIN_SOLVER:
            solver = scenario.placement.solver
    if ranks is None:
        raise BadInput("the number of GPUs is missing", where="--gpus", mend="give --gpus N or a scenario")
    if slots is None:
        raise BadInput(
            "the number of slots is missing",
            where="--slots",
            mend=f"give --slots N, e.g. {-(-loads[0].experts // ranks) * ranks if ranks > 0 else loads[0].experts}",
        )
    return Asked(
        loads=tuple(loads),
        ranks=ranks,
        nodes=1 if nodes is None else nodes,
        slots=slots,
        groups=1 if groups is None else groups,
        solver=solver or DEFAULT_SOLVER,
        holdout=_holdout(scenario, loads, holdout),
        seed=seed,
        scenario=scenario,
        current=None if current is None else read_placement(current),
        budgets=tuple(budgets),
        evidence=() if scenario is None else tuple(evidence_of(scenario)),
        doubts=() if scenario is not None else tuple(doubts(load_files, loads, experts)),
        expected=None if scenario is None else _expected(scenario, load_files),
    )


def budget_list(text: str | None) -> tuple[int, ...]:
    """`0,32,64` as numbers, each once and rising. Raises BadInput."""
    if text is None:
        return ()
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise BadInput(f"{text!r} is no list of redundant experts", where="--budgets", mend="give e.g. 0,32,64,128")
    return tuple(found)


def _loads(
    scenario: Scenario | None, files: Sequence[Path], seed: int, experts: int | None = None
) -> list[RoutingCounts]:
    from moesim.routing.holdout import refuse_repeats
    from moesim.routing.readers import read_loads
    from moesim.routing.resolve import fit_to_model, resolve_routing
    from moesim.spec.hf import load_model

    if scenario is None:
        if not files:
            raise BadInput("there are no loads to place for", where="--loads", mend="give --loads FILE or a scenario")
        found = read_given(files, experts)
    else:
        model = load_model(scenario.model)
        if not files:
            return list(resolve_routing(scenario.routing, model, np.random.default_rng(seed), tokens=True))
        known = model.moe.experts
        found = [fit_to_model(read_loads(path, experts=known, tokens=True), model, where=path) for path in files]
    refuse_repeats(found, where="--loads")
    return found


def _expected(scenario: Scenario, load_files: Sequence[Path]) -> Expected | None:
    from moesim.spec.hf import load_model

    if load_files and scenario.routing.expect is not None:
        raise BadInput(
            "nothing says what workloads these files are, from which the expected one is to be foretold",
            where="--loads",
            mend="list them under routing.loads with phase and prompt_tokens, or leave routing.expect out",
        )
    return Expected.of(scenario.routing.expect, load_model(scenario.model).moe.top_k)


def _cluster_gpus(scenario: Scenario) -> int:
    from moesim.spec.presets import load_cluster

    return load_cluster(scenario.cluster).gpus


def _holdout(scenario: Scenario | None, loads: Sequence[RoutingCounts], fraction: float | None) -> HoldoutSpec:
    if fraction is not None and not 0.0 <= fraction < 1.0:
        raise BadInput(f"the held-out fraction is {fraction}", where="--holdout", mend="give 0 (none) or up to below 1")
    spec = scenario.routing.holdout if scenario is not None else HoldoutSpec()
    if fraction == 0.0:
        return HoldoutSpec(by="none")
    if fraction is not None:
        spec = spec.model_copy(update={"fraction": fraction})
    if spec.by == "file" and len(loads) == 1:
        spec = spec.model_copy(update={"by": "step" if loads[0].per_step else "none"})
    return spec


def place(asked: Asked, *, draws: int = 200, choices: bool = False) -> Placed:
    """Fit the map to every load, and judge separate fits on what they were not fitted to.

    draws: of the joint draws behind the intervals of step time. choices: judge every replica choice, too. Raises what
    the solver and the cost model raise.
    """
    fit = fit_expecting(asked.loads, (), asked.expected)
    request = request_from_loads(
        fit,
        slots=asked.slots,
        ranks=asked.ranks,
        nodes=asked.nodes,
        groups=asked.groups,
        seed=asked.seed,
    )
    request = replace(request, current=asked.current)
    costs = cost_of(asked.scenario, asked.solver)
    solved = solve(with_cost(request, fit, costs), asked.solver)
    baseline = solve(without_redundancy(request), BASELINE).placement
    splits = make_splits(asked.loads, asked.holdout, np.random.default_rng(asked.seed), asked.expected)
    held = judge_splits(splits, request, asked.solver, asked.holdout, costs) if splits else None
    step_time = None
    if held is not None and asked.scenario is not None and asked.scenario.serving is not None:
        step_time = judge_steps(asked.scenario, splits, request, asked.solver, draws, costs)
    judged = None
    if choices:
        if held is None or asked.scenario is None or asked.scenario.serving is None:
            raise BadInput(
                "replica choices are judged in time, on loads that the map was not fitted to",
                where="--replica-choices",
                mend="give a serving scenario and loads of which some can be held out",
            )
        judged = judge_choices(asked.scenario, splits, request, asked.solver, draws, costs)
    cross_node = _cross_node(asked, splits[0], request) if splits else None
    validation = _validation(asked, step_time)
    budgets = None
    if asked.budgets and asked.scenario is not None:
        budgets = judge_budgets(asked.scenario, splits, request, asked.solver, asked.budgets, draws)
    return Placed(
        asked=asked,
        placement=solved.placement,
        solve_cpu_s=solved.solve_cpu_s,
        balance=balance(solved.placement, asked.loads),
        baseline=baseline,
        baseline_balance=balance(baseline, asked.loads),
        held=held,
        step_time=step_time,
        choices=judged,
        verdict=_with_copies(_verdict(asked, held, step_time, validation), asked, step_time, cross_node),
        cross_node=cross_node,
        budgets=budgets,
        validation=validation,
    )


def _validation(asked: Asked, step_time: StepTime | None) -> tuple[Covered, ...]:
    """Which records cover what a verdict in time leans on; a verdict on balance leans on counts alone."""
    from moesim.spec.hf import load_model
    from moesim.spec.presets import load_cluster

    scenario = asked.scenario
    if scenario is None or step_time is None:
        return ()
    sizes = [tokens for tokens in step_time.step_s if tokens not in step_time.refused] or list(step_time.step_s)
    tokens = (min(sizes), max(sizes))
    leans = of_placement(scenario, load_cluster(scenario.cluster), load_model(scenario.model), tokens=tokens)
    return tuple(cover(leans, asked.evidence))


def _cross_node(asked: Asked, split: Split, request: PlacementRequest) -> CrossNode | None:
    """Copies between nodes on the held-out part of the first split, in bytes too where a scenario says of what."""
    from moesim.network.traffic import message_bytes
    from moesim.spec.hf import load_model

    if asked.scenario is None:
        return judge_cross_node(split, request, asked.solver)
    model, precision = load_model(asked.scenario.model), asked.scenario.precision
    size = {"hidden": model.hidden, "top_k": model.moe.top_k}
    both = message_bytes("dispatch", "normal", dtype=precision.dispatch, **size)
    both += message_bytes("combine", "normal", dtype=precision.combine, **size)
    replica = "local_first" if asked.scenario.policies.dispatch.replica == "local_first" else "equal"
    return judge_cross_node(split, request, asked.solver, replica=replica, message_bytes=both)


def _with_copies(verdict: Verdict, asked: Asked, step_time: StepTime | None, cross_node: CrossNode | None) -> Verdict:
    """The verdict with a sentence on the copies between nodes, where tokens were at hand to count them."""
    if cross_node is None:
        return verdict
    text = f"{verdict.text} {cross_node.sentence(asked.solver)}"
    if step_time is not None:
        text += " Step times model the copies from counts alone and do not see the difference."
    return replace(verdict, text=text)


def _verdict(asked: Asked, held: HeldOut | None, step_time: StepTime | None, validation: Sequence[Covered]) -> Verdict:
    if held is None:
        if asked.holdout.by == "none" and len(asked.loads) == 1:
            return withheld("one snapshot: no split, no verdict")
        return withheld("no load was held out")
    if step_time is None:
        return on_balance(held, asked.solver)
    judged = f"judged on {' and '.join(step_time.judged)}, which the plan was not fitted to"
    leans = _leans_on(asked, step_time, validation)
    gains, replicas = step_time.that_run(step_time.gains), step_time.that_run(step_time.replicas)
    return on_step_time(gains, replicas, asked.solver, judged=judged, leans_on=leans)


def _leans_on(asked: Asked, step_time: StepTime, validation: Sequence[Covered]) -> str:
    """What the verdict leaves out, and what it leans on that nobody measured, in a sentence."""
    parts = []
    if step_time.unpriced:
        parts.append(
            f"{tokens_list(list(step_time.unpriced))} tokens per rank lie outside the profile and are left out"
        )
    if step_time.left_out:
        parts.append(f"outside the profile and left out: {where(step_time.left_out)} tokens per rank")
    if step_time.extrapolated:
        parts.append(f"extrapolated beyond the profile: {where(step_time.extrapolated)} tokens per rank")
    if step_time.refused:
        parts.append(f"{tokens_list(list(step_time.refused))} tokens per rank do not run here and are left out")
    if not any(load.per_step for load in asked.loads):
        parts.append("how far a step strays from these aggregate counts is assumed")
    if asked.nodes > 1 and not validated_over_nodes(validation):
        parts.append("expert parallelism over several nodes is not validated on hardware")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
