"""The command `simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (YAML).")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    timeline: Annotated[Path | None, typer.Option(help="Write a Chrome trace (gzip) of a typical step here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report page (HTML) here.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    fidelity: Annotated[str, typer.Option(help="table, maxplus or des.")] = "table",
    draws: Annotated[int, typer.Option(min=0, help="Joint draws behind the intervals; 0 gives none.")] = 20,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; the scenario's if left out.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Tell why steps are slow and what would help.")] = False,
) -> None:
    """Simulate a scenario, serving or training: throughput, latencies or step time, memory, with intervals."""
    from moesim.engine.deployment import groundwork, resolve
    from moesim.engine.simulate import simulate as run
    from moesim.engine.stepmodel import FIDELITIES
    from moesim.errors import BadInput
    from moesim.output.console import print_json, print_simulation, progress_bar
    from moesim.output.leanings import leanings
    from moesim.output.metrics import simulation_json
    from moesim.output.validation import cover, evidence_of, validation_json
    from moesim.spec.scenario import load_scenario

    if fidelity not in FIDELITIES:
        raise BadInput(f"unknown fidelity {fidelity!r}", where="--fidelity", mend=f"use {', '.join(FIDELITIES)}")
    spec = load_scenario(scenario, tuple(set_ or ()))
    if seed is not None:
        spec = spec.model_copy(update={"seed": seed})
    if spec.training is not None:
        from moesim.commands.training import simulate_training_command

        simulate_training_command(
            spec, json_=json_, timeline=timeline, report=report, fidelity=fidelity, draws=draws, explain=explain
        )  # fmt: skip
        return
    evidence = evidence_of(spec)
    deployment = resolve(groundwork(spec))
    with progress_bar("simulating") as progress:
        simulation = run(deployment, draws=draws, fidelity=FIDELITIES[fidelity], progress=progress)
    result = simulation_json(simulation)
    ground = deployment.ground
    leans = leanings(deployment.scenario, ground.cluster, ground.model)
    result["validation"] = validation_json(cover(leans, evidence))
    if explain or report is not None:
        from moesim.engine.explain import explain as explained
        from moesim.output.explain import explanation_json

        result["explain"] = explanation_json(explained(simulation))
    if simulation.without_faults is not None:
        from moesim.output.faults import faults_json

        result["faults"] = faults_json(simulation)
    if simulation.without_relayouts is not None:
        from moesim.output.relayouts import relayouts_json

        result["relayouts"] = relayouts_json(simulation)
    if timeline is not None:
        from moesim.output.steptrace import write_step_timeline

        write_step_timeline(timeline, simulation)
    if report is not None:
        from moesim.output.report import write_simulation_report
        from moesim.output.series import simulation_series

        write_simulation_report(report, deployment.scenario, result, simulation_series(simulation))
    if json_:
        print_json(result)
    else:
        print_simulation(result)
        if "faults" in result:
            from moesim.output.faults import print_faults

            print_faults(result)
        if "relayouts" in result:
            from moesim.output.relayouts import print_relayouts

            print_relayouts(result)
        if explain:
            from moesim.output.explain_console import print_explanation

            print_explanation(result["explain"])
