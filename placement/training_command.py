"""`moesim tune` of a scenario that trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moesim.engine.draws import LEVEL
from moesim.engine.training import TrainingRun
from moesim.engine.training_explain import explain_training
from moesim.engine.training_overlap import OVERLAPPED
from moesim.engine.training_plan import SharedTraining
from moesim.errors import Infeasible, Interrupted
from moesim.files import write_json, write_text
from moesim.output.console import console, generated_line, print_json, progress_bar, with_interval
from moesim.output.leanings import of_plans
from moesim.output.metrics import generated
from moesim.output.training_explain import training_explanation_json
from moesim.output.training_metrics import training_json
from moesim.output.training_page import write_training_report
from moesim.output.validation import Covered, cover, evidence_of, validated_over_nodes, validation_keys
from moesim.spec.scenario import ObjectiveSpec, Scenario, SearchSpec, resolve_paths
from moesim.systems.load import apply_system
from placement.claims import Claims
from placement.interrupts import Patience
from placement.objective import MOST_EXTRAPOLATED
from placement.plans import Plan
from placement.ranking import Finalist
from placement.space import Space
from placement.training_objective import TrainingEvaluator, limits_of, objective_of, training_workers
from placement.training_ranking import (
    ranked_training,
    tied_training,
    training_finalists,
    training_gain,
    training_pareto,
    training_verdict,
)
from placement.training_space import require_training_plans, training_space
from placement.tuner import Search, Trial, open_study, search

FINAL_DRAWS = 20
# Fixed, so that a search that is resumed for more trials goes on as one that was asked for them at once.
RECIPES = 24
_COLUMNS = (
    ("step s", "step_s", 1.0, 4),
    ("tok/s/GPU", "tokens_per_s_per_gpu", 1.0, 4),
    ("MFU %", "mfu", 100.0, 3),
    ("dropped %", "dropped_fraction", 100.0, 3),
    ("memory GB", "memory_peak_bytes", 1e-9, 3),
)


def tune_training(
    spec: Scenario,
    where: str,
    folder: Path,
    *,
    trials: int,
    storage: str | None,
    workers: int,
    resume: bool,
    json_output: bool,
    claims: Claims,
    waiting: Patience,
) -> dict[str, Any]:
    """Search the training plans of a scenario; returns what `--json` prints. Raises MoesimError in one line."""
    started = (time.perf_counter(), time.process_time())
    evidence = evidence_of(spec)
    spec, shared = apply_system(spec), SharedTraining()
    space, own, near = training_space(spec, shared)
    require_training_plans(space, near, where)
    with claims.opening():
        study = open_study(spec, folder, storage, resume)
    evaluator = TrainingEvaluator(spec, shared)
    with training_workers(evaluator, workers) as pool:
        size = f"about {space.size:.2g}" if space.estimated else str(space.size)
        with progress_bar(f"searching {size} plans") as progress:
            recipes = _recipes(space, own)[:RECIPES]
            found = search(study, space, spec, pool, trials=trials, recipes=recipes, progress=progress, claims=claims)
        waiting.finishing = True
        order = _ranked(found, spec)
        chosen = training_finalists(order)
        base_trial = next((trial for trial in found.trials if trial.plan == own), None)
        drawn = {trial.plan: evaluator.draw(trial.plan, FINAL_DRAWS) for trial in chosen}
        if base_trial is not None and base_trial.outcome.status == "ok" and own not in drawn:
            drawn[own] = evaluator.draw(own, FINAL_DRAWS)
    finalists = [Finalist(trial, drawn[trial.plan]) for trial in chosen]
    base = Finalist(base_trial, drawn[own]) if base_trial is not None and own in drawn else None
    run = evaluator.run(chosen[0].plan, draws=FINAL_DRAWS)
    _, ground, _ = evaluator.shared.ground(spec)
    judged = [(plan.layout, plan.apply(spec)) for plan in (chosen[0].plan, *([own] if base is not None else []))]
    validation = cover(of_plans(judged, ground.cluster, ground.model), evidence)
    result = _result(spec, space, own, found, finalists, base_trial, base, evaluator, validation)
    if not found.exhausted:
        result["verdict"]["text"] += f" {len(found.trials)} of {size} legal plans were tried."
    result["interrupted"] = found.interrupted
    result["run"] = {
        "seed": spec.seed,
        "wall_s": time.perf_counter() - started[0],
        "cpu_s": time.process_time() - started[1],
        "workers": workers,
        "resumed_trials": found.resumed,
        "final_draws": FINAL_DRAWS,
    }
    result["files"] = _write(folder, result, chosen[0].plan.apply(spec), run)
    if json_output:
        print_json(result)
    else:
        _print(result)
    if found.interrupted:
        raise Interrupted(
            f"interrupted after {len(found.trials)} of {trials} trials; the best so far is in {folder}",
            mend="go on with --resume",
        )
    return result


def _ranked(found: Search, spec: Scenario) -> list[Trial]:
    try:
        return ranked_training(found, spec)
    except Infeasible as error:
        if not found.interrupted:
            raise
        raise Interrupted(
            f"interrupted after {len(found.trials)} trials; so far, {error.what}", mend="go on with --resume"
        ) from None


def _recipes(space: Space, own: Plan) -> list[Plan]:
    """Tried first: the scenario's own plan, and what differs from it in one choice."""
    wanted = [own]
    for base in space.bases:
        same = (base.parallel == own.parallel, base.backend == own.backend, base.schedule == own.schedule)
        if sum(same) == 2 and base.solver == own.solver:
            wanted.append(base)
    for place, axis in enumerate(space.axes):
        for value in axis.values:
            options = (*own.options[:place], (axis.key, value), *own.options[place + 1 :])
            wanted.append(replace(own, options=options))
    return [plan for plan in dict.fromkeys(wanted) if plan in space]


def _result(
    scenario: Scenario,
    space: Space,
    own: Plan,
    found: Search,
    finalists: list[Finalist],
    base_trial: Trial | None,
    base: Finalist | None,
    evaluator: TrainingEvaluator,
    validation: Sequence[Covered],
) -> dict[str, Any]:
    best, metric = finalists[0], objective_of(scenario.objective)[0]
    reason = ""
    if base_trial is None:
        reason = (space.why_not(own) or "it was not tried").replace("_", " ")
    elif base_trial.outcome.status != "ok":
        reason = base_trial.outcome.status
    elif base_trial.outcome.violation > 0:
        reason = f"{base_trial.outcome.violation:.0%} over"
    counted = dict(space.infeasible)
    for name, count in found.infeasible().items():
        counted[name] = counted.get(name, 0) + count
    notes = []
    if scenario.search.capacity_factor is not None and scenario.policies.capacity.rule == "dropless":
        notes.append("search.capacity_factor has no effect: policies.capacity.rule is dropless")
    nothing = {"value": None, "low": None, "high": None}
    return {
        "schema_version": 1,
        "workload": "training",
        "best": training_plan_json(best.trial, scenario, best),
        "baseline": None if base_trial is None else training_plan_json(base_trial, scenario, base),
        "gain": {"metric": metric, "level": LEVEL} | (nothing if base is None else training_gain(best, base, metric)),
        "verdict": training_verdict(
            best, base, base_reason=reason, objective=scenario.objective, caveat=_caveat(best, evaluator, validation)
        ),
        **validation_keys(validation),
        "alternatives": [
            training_plan_json(one.trial, scenario, one)
            | {"tied_with_best": tied_training(best, one, metric), "gain_of_best": training_gain(best, one, metric)}
            for one in finalists[1:]
        ],
        "pareto_axes": ["step_s", "memory_peak_bytes" if evaluator.second == "step_s" else evaluator.second],
        "pareto": [training_plan_json(trial, scenario) for trial in training_pareto(found, evaluator.second)],
        "trials": len(found.trials),
        "space": space.size,
        "space_estimated": space.estimated,
        "exhausted": found.exhausted,
        "infeasible": dict(sorted(counted.items())),
        "missed_limits": sum(
            1 for trial in found.trials if trial.outcome.status == "ok" and trial.outcome.violation > 0
        ),
        "notes": notes,
        "routing_generated": generated(scenario),
        "trial_list": [training_plan_json(trial, scenario) for trial in found.trials],
    }


def _caveat(best: Finalist, evaluator: TrainingEvaluator, validation: Sequence[Covered]) -> str:
    lean = best.trial.outcome.metrics["extrapolated_share"]
    caveat = f" {lean:.0%} of its working time lies outside the profile." if 0.005 <= lean <= MOST_EXTRAPOLATED else ""
    _, ground, _ = evaluator.shared.ground(evaluator.scenario)
    if ground.cluster.gpus > ground.cluster.gpus_per_node and not validated_over_nodes(validation):
        caveat += " Training over several nodes is not validated on hardware."
    return caveat


def training_plan_json(trial: Trial, scenario: Scenario, finalist: Finalist | None = None) -> dict[str, Any]:
    """A training plan with its figures, ready for JSON."""
    plan, outcome = trial.plan, trial.outcome
    intervals = {}
    if finalist is not None and len(finalist.drawn["step_s"]) > 1:
        intervals = {name: finalist.interval(name) for name in finalist.drawn}
    limits = limits_of(scenario.objective)
    return {
        "label": plan.label(),
        "parallel": plan.parallel.model_dump(mode="json"),
        "backend": plan.backend,
        "schedule": plan.schedule,
        "solver": plan.solver,
        "options": dict(plan.options),
        "trial": trial.number,
        "status": outcome.status,
        "meets_limits": outcome.status == "ok" and outcome.violation <= 0,
        "limits_sure": all(intervals[name]["high"] <= limit for name, limit in limits.items())
        if limits and intervals
        else None,
        "metrics": outcome.metrics,
        "intervals": intervals,
    }


def _write(folder: Path, result: dict[str, Any], chosen: Scenario, run: TrainingRun) -> list[str]:
    """Write the run's files, each whole or not at all: plan.yaml is a scenario that `moesim simulate` takes."""
    plain = resolve_paths(chosen, Path.cwd()).model_copy(update={"search": SearchSpec(), "objective": ObjectiveSpec()})
    text = yaml.safe_dump(plain.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    write_text(folder / "plan.yaml", f"# {result['verdict']['text']}\n{text}")
    run.model.setup.placement.write(folder / "placement.json")
    figures = training_json(run)
    if chosen.policies.schedule != OVERLAPPED:
        figures["explain"] = training_explanation_json(explain_training(run))
    write_json(folder / "result.json", result, indent=1)
    write_json(folder / "simulation.json", figures, indent=1)
    write_training_report(folder / "report.html", chosen, figures)
    return [str(folder / name) for name in ("plan.yaml", "placement.json", "result.json", "simulation.json")] + [
        str(folder / "report.html")
    ]


def _print(result: dict[str, Any]) -> None:
    out = console()
    size = f"about {result['space']:.2g}" if result["space_estimated"] else result["space"]
    how = "all of them evaluated" if result["exhausted"] else f"{result['trials']} evaluated"
    refused = ", ".join(f"{count} {reason}" for reason, count in result["infeasible"].items()) or "none"
    out.print(f"{size} legal plans, {how}; not legal or not priced: {refused}.")
    rows = [("best: ", result["best"]), *(("", one) for one in result["alternatives"])]
    if result["baseline"] is not None and result["baseline"]["label"] != result["best"]["label"]:
        rows.append(("own: ", result["baseline"]))
    out.print(_table("Plans, best first (90 % interval over joint draws)", rows))
    first, second = result["pareto_axes"]
    out.print(_table(f"Nothing beats these in both {first} and {second}", [("", one) for one in result["pareto"]]))
    out.print(result["verdict"]["text"])
    out.print(result["validation_text"])
    if result["routing_generated"] is not None:
        out.print(generated_line(result["routing_generated"]))
    for note in result["notes"]:
        out.print(f"note: {note}")
    out.print("Wrote " + ", ".join(result["files"]) + ".")


def _table(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("plan")
    for name, *_ in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for head, plan in rows:
        if plan["status"] != "ok":
            table.add_row(head + plan["label"], plan["status"], *["-"] * (len(_COLUMNS) - 1))
            continue
        cells = [
            with_interval(plan["metrics"][key], plan["intervals"].get(key), scale, digits).replace(" [", "\n[")
            for _, key, scale, digits in _COLUMNS
        ]
        tie = " (tied with the best)" if plan.get("tied_with_best") else ""
        table.add_row(head + plan["label"] + tie, *cells)
    return table
