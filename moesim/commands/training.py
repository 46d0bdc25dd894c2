"""`simulate` of a scenario that trains."""

from __future__ import annotations

from pathlib import Path

from moesim.spec.scenario import Scenario


def simulate_training_command(
    spec: Scenario, *, json_: bool, timeline: Path | None, report: Path | None, fidelity: str, draws: int, explain: bool
) -> None:
    """Run, print and write what was asked for. Raises BadInput for what training runs do not have."""
    from moesim.engine.training import simulate_training
    from moesim.engine.training_overlap import OVERLAPPED
    from moesim.errors import BadInput
    from moesim.output.console import print_json, progress_bar
    from moesim.output.leanings import leanings
    from moesim.output.training_metrics import training_json
    from moesim.output.training_page import print_training, write_training_report
    from moesim.output.validation import cover, evidence_of, validation_json

    if fidelity == "des":
        raise BadInput("training runs on maxplus alone", where="--fidelity", mend="leave it out")
    evidence = evidence_of(spec)
    with progress_bar("simulating") as progress:
        run = simulate_training(spec, draws=draws, progress=progress)
    result = training_json(run)
    leans = leanings(spec, run.model.setup.cluster, run.model.setup.model)
    result["validation"] = validation_json(cover(leans, evidence))
    if explain or (report is not None and run.model.setup.policies.schedule != OVERLAPPED):
        from moesim.engine.training_explain import explain_training
        from moesim.output.training_explain import training_explanation_json

        result["explain"] = training_explanation_json(explain_training(run))
    if run.faulted is not None:
        from moesim.output.training_faults import training_faults_json

        result["faults"] = training_faults_json(run)
    if timeline is not None:
        from moesim.output.training_timeline import write_pipeline_timeline

        write_pipeline_timeline(timeline, run)
    if report is not None:
        write_training_report(report, spec, result)
    if json_:
        print_json(result)
    else:
        print_training(result)
        if "faults" in result:
            from moesim.output.training_faults import print_training_faults

            print_training_faults(result)
        if explain:
            from moesim.output.training_explain import print_training_explanation

            print_training_explanation(result["explain"])
