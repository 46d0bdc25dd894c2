"""What `moesim tune` does: space, search, finalists, verdict, and the files of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna

from moesim.engine.deployment import Groundwork, groundwork
from moesim.engine.draws import LEVEL
from moesim.engine.moving import refuse_changes
from moesim.errors import BadInput, Infeasible, Interrupted
from moesim.output.console import console, print_json, progress_bar, with_interval
from moesim.output.leanings import of_plans
from moesim.output.steady import steadiness
from moesim.output.validation import Covered, cover, evidence_of, validated_over_nodes, validation_keys
from moesim.spec.faults import refuse_faults
from moesim.spec.scenario import Scenario, load_scenario
from placement.answers import binding_json, choices_json, choices_text
from placement.claims import Claims, open_claims
from placement.executors import start_workers
from placement.interrupts import Patience, patience
from placement.journal import remove_journal
from placement.objective import Evaluator
from placement.plans import Plan, baseline_plan, own_plan, plain_placement
from placement.pools import Pool, sizes
from placement.ranking import (
    LATENCY,
    SHOWN,
    Finalist,
    finalists_of,
    gain_json,
    level_metrics,
    pareto,
    plan_json,
    ranked,
    tied,
    verdict,
)
from placement.run_files import write_run
from placement.samplers import refuse_sampler
from placement.settle import settled
from placement.space import Space, enumerate_space, require_plans
from placement.training_command import tune_training
from placement.tuner import STUDY, Search, Trial, open_study, search, takes_first_look
from placement.whatif import what_if

FINAL_DRAWS = 20


def tune(
    scenario: Path,
    trials: int,
    out: Path | None = None,
    storage: str | None = None,
    workers: int = 1,
    ray: str | None = None,
    resume: bool = False,
    json_output: bool = False,
    overrides: tuple[str, ...] = (),
    ask_what_if: bool = False,
) -> dict[str, Any]:
    """Run the whole command; returns what `--json` prints. Raises MoesimError in one line.

    ask_what_if: also simulate the finalists in other worlds, and tell what would change the answer.
    """
    if trials < 1:
        raise BadInput(f"{trials} trials", where="--trials", mend="give at least 1")
    if workers < 1:
        raise BadInput(f"{workers} workers", where="--workers", mend="give at least 1")
    folder = out or Path("runs") / scenario.stem
    new = not folder.exists()
    with (
        open_claims(folder, storage) as claims,
        patience() as waiting,
        _forgotten(folder, storage, claims, resume, new),
    ):
        return _tune(
            scenario,
            trials,
            folder,
            storage,
            workers,
            ray,
            resume,
            json_output,
            overrides,
            ask_what_if,
            claims=claims,
            waiting=waiting,
        )


@contextmanager
def _forgotten(folder: Path, storage: str | None, claims: Claims, resume: bool, new: bool) -> Iterator[None]:
    """Leave nothing behind of a search in which no plan ran, so that the mended scenario can be searched in its place.

    One that is resumed, or that other processes share, stays. new: the folder was made for this search.
    """
    try:
        yield
    except Infeasible as error:
        if error.reason == "nothing_ran" and not resume and not claims.others():
            if storage is not None:
                optuna.delete_study(study_name=STUDY, storage=storage)
            else:
                remove_journal(folder)
                if new and not any(folder.iterdir()):
                    folder.rmdir()
        raise


def _tune(
    scenario: Path,
    trials: int,
    folder: Path,
    storage: str | None,
    workers: int,
    ray: str | None,
    resume: bool,
    json_output: bool,
    overrides: tuple[str, ...],
    ask_what_if: bool,
    *,
    claims: Claims,
    waiting: Patience,
) -> dict[str, Any]:
    started = (time.perf_counter(), time.process_time())
    spec = load_scenario(scenario, overrides)
    refuse_faults(spec.faults, "tune")
    refuse_changes(spec, "tune")
    refuse_sampler(spec)
    if spec.training is not None:
        if ray is not None:
            raise BadInput("training plans run on local workers", where="--ray", mend="use --workers")
        if ask_what_if:
            raise BadInput("training has no other worlds to ask about", where="--what-if", mend="leave it out")
        return tune_training(
            spec,
            str(scenario),
            folder,
            trials=trials,
            storage=storage,
            workers=workers,
            resume=resume,
            json_output=json_output,
            claims=claims,
            waiting=waiting,
        )
    evidence = evidence_of(spec)
    ground = groundwork(spec)
    spec = ground.scenario
    space = enumerate_space(ground, spec)
    require_plans(space, str(scenario), ground, spec)
    with claims.opening():
        study = open_study(spec, folder, storage, resume)
        first_look = takes_first_look(study, trials)
    evaluator = Evaluator(ground, spec, first_look=first_look)
    base = baseline_plan(ground, spec)
    search_started = time.perf_counter()
    with start_workers(spec, evaluator, workers, ray) as pool:
        recipes = known_recipes(ground, spec, space)
        with progress_bar(f"searching {_how_many(space)} plans") as progress:
            found = search(study, space, spec, pool, trials=trials, recipes=recipes, progress=progress, claims=claims)
        waiting.finishing = True
        if first_look:
            found = settled(found, pool, spec, [base, own_plan(ground, spec)])
        order = _ranked(found, spec)
        chosen = finalists_of(order)
        base_trial = next((trial for trial in found.trials if trial.plan == base), None)
        plans = [trial.plan for trial in chosen]
        with_base = base_trial is not None and base_trial.outcome.status == "ok" and base not in plans
        metrics = sorted({*SHOWN, spec.objective.maximize, *level_metrics(spec)})
        asked = list(dict.fromkeys([*plans, *([base] if with_base else []), plain_placement(ground, plans[0])]))
        drawn = dict(zip(asked, pool.draw(asked, FINAL_DRAWS, metrics), strict=True))
    search_s = time.perf_counter() - search_started
    finalists = [Finalist(trial, drawn[trial.plan]) for trial in chosen]
    base_final = Finalist(base_trial, drawn[base]) if base_trial is not None and base in drawn else None
    simulation = evaluator.run(plans[0])
    base_simulation = evaluator.run(base) if base_final is not None else None
    judged = [(plan.layout, plan.apply(spec)) for plan in (plans[0], *([base] if base_final is not None else []))]
    validation = cover(of_plans(judged, ground.cluster, ground.model), evidence)
    result = _result(ground, spec, space, found, finalists, base_trial, base_final, validation)
    plain_final = Finalist(chosen[0], drawn[plain_placement(ground, plans[0])])
    result["placement_gain"] = {metric: gain_json(finalists[0], plain_final, metric) for metric in (LATENCY, SHOWN[0])}
    if not found.exhausted:
        result["verdict"]["text"] += f" {len(found.trials)} of {_how_many(space)} legal plans were tried."
    result["verdict"]["text"] += _placement_sentence(plans[0], result["placement_gain"][LATENCY])
    for name, run in (("best plan", simulation), ("baseline", base_simulation)):
        fault = None if run is None else steadiness(run).fault
        if fault is not None:
            result["verdict"]["text"] += f" The {name}'s run has no steady state: its latencies depend on its length."
            result["notes"].append(f"{name}: {fault}")
    short = [plan.label() for plan, values in drawn.items() if len(values[LATENCY]) == 1]
    if short:
        result["notes"].append(f"no interval for {', '.join(short)}: some draws leave the profile")
    if ask_what_if:
        compared = [*plans, *([base] if base_final is not None and base not in plans else [])]
        result["what_if"] = what_if(evaluator, compared)
    result["interrupted"] = found.interrupted
    result["run"] = {
        "seed": spec.seed,
        "wall_s": time.perf_counter() - started[0],
        "search_s": search_s,
        "cpu_s": time.process_time() - started[1],
        "workers": pool.count,
        "resumed_trials": found.resumed,
        "final_draws": FINAL_DRAWS,
    }
    result["files"] = write_run(folder, result, plans[0].apply(spec), simulation, base_simulation)
    if json_output:
        print_json(result)
    else:
        print_tune(result)
    if found.interrupted:
        raise Interrupted(
            f"interrupted after {len(found.trials)} of {trials} trials; the best so far is in {folder}",
            mend="go on with --resume",
        )
    return result


def _ranked(found: Search, spec: Scenario) -> list[Trial]:
    try:
        return ranked(found, spec)
    except Infeasible as error:
        if not found.interrupted:
            raise
        told = f"so far, {error.what}" if found.trials else "nothing was found yet"
        raise Interrupted(f"interrupted after {len(found.trials)} trials; {told}", mend="go on with --resume") from None


def _how_many(space: Space) -> str:
    return f"about {space.size:.2g}" if space.estimated else str(space.size)


def known_recipes(ground: Groundwork, scenario: Scenario, space: Space) -> list[Plan]:
    """Plans that people run, tried first: the baseline, the scenario's own, and a greedy or whole-expert placement of
    every layout that stays within a node, or that spreads experts over nodes by DeepEP with attention inside them, or
    that has a node for each pipeline stage; of those that split contexts the ones that leave a single copy;
    of every split over roles, the usual pools side by side.
    """
    known: dict[str, Plan] = {}
    node = ground.cluster.gpus_per_node
    for plan in space.bases:
        if plan.prefill is not None:
            if all(_usual_pool(pool, node) for pool in plan.pools.values()) and plan in space:
                known.setdefault(plan.layout, plan)
            continue
        usual = plan.parallel.gpus <= node or (plan.backend == "deepep" and plan.parallel.tp < node)
        if plan.parallel.pp > 1:
            usual = plan.parallel.gpus == node * plan.parallel.pp
        copies = ground.model.attention.copies(plan.parallel.tp)
        usual = usual and plan.parallel.decode_cp in (1, copies)  # contexts are whole, or there is no copy left
        if usual and plan.solver == ("contiguous" if plan.parallel.ep == 1 else "greedy") and plan in space:
            known.setdefault(plan.layout, plan)
    wanted = [baseline_plan(ground, scenario), own_plan(ground, scenario), *known.values()]
    return [plan for plan in wanted if plan in space]


def _usual_pool(pool: Pool, node: int) -> bool:
    """Whether a pool is one that people run: instances as large as can be, attention DP and whole experts under DeepEP;
    or the largest within a node, tensor parallelism and whole experts under all-reduce.
    """
    layout, largest = pool.parallel, sizes(pool.gpus, node)
    if pool.backend == "deepep":
        return layout.tp == 1 and layout.gpus == max(largest)
    return pool.backend == "allreduce" and layout.ep == layout.tp == max(size for size in largest if size <= node)


def _placement_sentence(plan: Plan, gain: dict[str, Any]) -> str:
    if not plan.spread:
        return " Experts are not spread over ranks in this layout, so there is nothing to place."
    if gain["low"] is None:
        return ""
    saves = "saves" if gain["low"] > 0 else "loses" if gain["high"] < 0 else "saves nothing sure:"
    how = f"{plan.solver}, {plan.redundant_experts} redundant"
    if plan.pools:
        how = " and ".join(f"{name}: {pool.placed}" for name, pool in plan.pools.items())
    return (
        f" In this layout, placing the experts ({how}) instead of leaving "
        f"them in order {saves} {gain['value']:.1%} [{gain['low']:.1%}, {gain['high']:.1%}] of median TPOT."
    )


def _result(
    ground: Groundwork,
    scenario: Scenario,
    space: Space,
    found: Search,
    finalists: list[Finalist],
    base_trial: Trial | None,
    base: Finalist | None,
    validation: Sequence[Covered],
) -> dict[str, Any]:
    best = finalists[0]
    metric = scenario.objective.maximize if scenario.objective.maximize in best.drawn else SHOWN[0]
    base_reason = ""
    levels = level_metrics(scenario)
    base_plan = baseline_plan(ground, scenario)
    if base_trial is None:
        base_reason = "it is not a legal plan here" if base_plan not in space else "it was not tried"
    elif base_trial.outcome.status != "ok":
        base_reason = base_trial.outcome.status
    elif base_trial.outcome.violation > 0:
        base_reason = f"{base_trial.outcome.violation:.0%} over"
    counted = dict(space.infeasible)
    for reason, count in found.infeasible().items():
        counted[reason] = counted.get(reason, 0) + count
    missed = sum(1 for trial in found.trials if trial.outcome.status == "ok" and trial.outcome.violation > 0)
    nothing = {"value": None, "low": None, "high": None}
    gain = {"metric": metric, "level": LEVEL} | (nothing if base is None else gain_json(best, base, metric))
    saving = {"metric": LATENCY, "level": LEVEL} | (nothing if base is None else gain_json(best, base, LATENCY))
    baseline: dict[str, Any] | None = None
    if base_trial is not None:
        baseline = plan_json(base_trial, base, levels)
    choices = choices_json(found, scenario, best.trial)
    notes = []
    if scenario.search.capacity_factor is not None:
        notes.append("search.capacity_factor has no effect: only policies.capacity sets the factor")
    return {
        "schema_version": 1,
        "best": plan_json(best.trial, best, levels)
        | {"binding": binding_json(best.trial, scenario), "roles": _roles_json(best.trial.plan.apply(scenario))},
        "baseline": baseline,
        "gain": gain,
        "latency_gain": saving,
        "verdict": verdict(
            best,
            base,
            base_reason=base_reason,
            scenario=scenario,
            judged_on_fit=ground.judged_on_fit,
            gpus_per_node=ground.cluster.gpus_per_node,
            nodes_validated=validated_over_nodes(validation),
        ),
        **validation_keys(validation),
        "alternatives": [
            plan_json(one.trial, one, levels)
            | {"tied_with_best": tied(best, one, metric), "tpot_gain_of_best": gain_json(best, one, LATENCY)}
            | {"binding": binding_json(one.trial, scenario)}
            for one in finalists[1:]
        ],
        "pareto": [plan_json(trial) for trial in pareto(found, scenario)],
        "trials": len(found.trials),
        "space": space.size,
        "space_estimated": space.estimated,
        "exhausted": found.exhausted,
        "infeasible": dict(sorted(counted.items())),
        "missed_slo": missed,
        "notes": notes,
        "choices": choices,
        "choices_text": choices_text(choices, scenario.objective.maximize),
        "settled": len(found.trials) if found.settled is None else len(found.settled),
        "trial_list": [
            plan_json(trial) | {"in_full": found.settled is None or trial.number in found.settled}
            for trial in found.trials
        ],
    }


def _roles_json(scenario: Scenario) -> dict[str, Any] | None:
    """The roles of a plan's scenario, as it takes them; None where it has none."""
    assert scenario.serving is not None
    roles = scenario.serving.roles
    return None if roles is None else roles.model_dump(mode="json", exclude_none=True)


def print_tune(result: dict[str, Any]) -> None:
    """The ranked table and the verdict for a person."""
    from rich.table import Table

    out = console()
    how = "all of them evaluated" if result["exhausted"] else f"{result['trials']} evaluated"
    size = f"about {result['space']:.2g}" if result["space_estimated"] else result["space"]
    out.print(f"{size} legal plans, {how}; not legal or not priced: {_counts(result['infeasible'])}.")
    table = Table(title="Plans, best first (90 % interval over joint draws of costs and routing)", title_justify="left")
    for column in (
        "plan",
        "out tok/s/GPU",
        "TTFT p50 ms",
        "TPOT p50 ms",
        "TPOT p99 ms",
        "max/mean load",
        "memory GB",
        "SLO",
    ):
        table.add_column(column, justify="left" if column == "plan" else "right", no_wrap=True)
    rows = [("best", result["best"]), *(("", one) for one in result["alternatives"])]
    if result["baseline"] is not None and result["baseline"]["label"] != result["best"]["label"]:
        rows.append(("baseline", result["baseline"]))
    for name, plan in rows:
        if plan["status"] != "ok":
            table.add_row(f"{name}: {plan['label']}", *["-"] * 6, plan["status"])
            continue
        metrics, found = plan["metrics"], plan["intervals"]
        cells = [
            with_interval(metrics[key], found.get(key), scale, digits)
            .replace(" [", "\n")
            .replace(", ", "..")
            .rstrip("]")
            for key, scale, digits in (
                ("output_tokens_per_s_per_gpu", 1.0, 4),
                ("ttft_s.p50", 1e3, 3),
                ("tpot_s.p50", 1e3, 3),
                ("tpot_s.p99", 1e3, 3),
                ("rank_load_max_over_mean", 1.0, 4),
                ("memory_peak_bytes", 1e-9, 3),
            )
        ]
        label = (f"{name}: {plan['label']}" if name else plan["label"]).replace("; ", "\n")
        table.add_row(label, *cells, _level_word(plan))
    out.print(table)
    out.print("AR: all-reduce; AG+RS: all-gather and reduce-scatter; ETP: TP inside experts; +N: redundant experts.")
    out.print(result["verdict"]["text"])
    out.print(result["validation_text"])
    for text in (_binding_text(result["best"]), result["choices_text"], result.get("what_if", {}).get("text", "")):
        if text:
            out.print(text)
    for note in result["notes"]:
        out.print(f"note: {note}")
    out.print("Wrote " + ", ".join(result["files"]) + ".")


def _binding_text(plan: dict[str, Any]) -> str:
    """What the best plan is closest to."""
    bound = [f"{one['limit'].replace('_', ' ')} ({one['room']:.0%} left)" for one in plan["binding"] if one["binds"]]
    return f"The best plan is held back by {', '.join(bound)}." if bound else ""


def _level_word(plan: dict[str, Any]) -> str:
    if not plan["meets_slo"]:
        return "missed"
    return {True: "met", False: "met,\nnot sure", None: "met"}[plan["slo_sure"]]


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
