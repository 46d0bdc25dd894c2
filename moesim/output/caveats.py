"""What a result rests on, in plain sentences, derived from the scenario and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moesim.output.run_folder import Told
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario


def caveats(
    scenario: Scenario, told: Told, baseline: Told | None = None, *, nodes_validated: bool = False
) -> list[str]:
    """What is assumed, generated or not validated here, most important first.

    nodes_validated: whether records cover all that happens between nodes.
    """
    figures, found = told.figures, []
    for name, run in (("This plan's run", told), ("The baseline's run", baseline)):
        load = run.figures.load if run is not None else None
        if load is not None and load.fault is not None:
            found.append(f"{name} has no steady state: {load.fault}.")
    cluster = scenario.cluster
    if not nodes_validated and (isinstance(cluster, Path) or cluster.nodes > 1):
        found.append(
            "Plans that span nodes are not validated: no hardware that this project could use has run expert "
            "parallelism over several nodes. Costs of operations are tagged as above; how they add up over nodes is "
            "the simulator's model."
        )
    if _in_stages(scenario, told, baseline):
        found.append(
            "Serving in pipeline stages is not validated: no measured run at hand has more than one stage. A stage's "
            "own step is priced like any other; how batches follow each other through the stages is the simulator's "
            "model."
        )
    if figures.routing.judged_on_fit:
        found.append("The placement is judged on the very loads it was fitted to: nothing was left to hold out.")
    if scenario.routing.synthetic is not None:
        found.append(
            f"The routing is generated ({scenario.routing.synthetic.kind}), not recorded from your traffic. Give your "
            "own counts under routing.loads for a verdict about your deployment."
        )
    if figures.routing.dispersion == "assumed":
        found.append(
            "How far single steps stray from the mean routing is assumed, from other models' public records: aggregate "
            "counts do not tell. A trace with steps or tokens replaces the assumption."
        )
    if scenario.policies.gate != "model":
        found.append(
            "Another gate than the model's own is simulated: token scores behind the recorded counts are assumed "
            "(preferences plus independent noise), and the model's quality under that gate is not judged."
        )
    if scenario.policies.capacity.rule != "dropless":
        found.append(
            "Experts keep to a capacity: how many tokens of one rank an expert is asked for is modelled from the "
            "counts of the whole step, and what dropped tokens do to the model's quality is not judged."
        )
    if scenario.cost.extrapolate == "allow":
        found.append("cost.extrapolate is `allow`: figures beyond the measured tables are estimates, tagged as such.")
    found.append(
        "Intervals hold what is drawn jointly: errors that a family of costs shares, and which mix of the judged loads "
        "the deployment meets. They do not hold errors of the simulator's structure (what overlaps, what the engine's "
        "scheduler does) or faults, and arrivals are one draw that all plans share."
    )
    found.append(_overheads(scenario))
    work = scenario.serving.workload if scenario.serving is not None else None
    if work is not None and work.isl is not None and work.osl is not None:
        found.append(f"All requests are alike: {work.isl} tokens in, {work.osl} out, no shared prefixes.")
    return found


def _in_stages(scenario: Scenario, *runs: Told | None) -> bool:
    """Whether a plan that is told of has several pipeline stages."""
    roles = scenario.serving.roles if scenario.serving is not None else None
    plans: list[ParallelSpec | None] = [run.figures.plan.parallel for run in runs if run is not None]
    if roles is not None:
        plans += [role.parallel or scenario.parallel for role in (roles.prefill, roles.decode)]
    return any(parallel is not None and parallel.pp > 1 for parallel in plans)


def _overheads(scenario: Scenario) -> str:
    given = scenario.cost.overheads
    if isinstance(given, Path):
        return (
            f"Host overheads of the engine come from {given.name}, fitted to benchmark runs; what such a fit "
            "absorbs of other errors of the simulator holds at loads like those runs' only."
        )
    if given is not None:
        return "Host overheads of the engine are given in the scenario; their spread is assumed."
    return (
        "Host overheads of the engine (between steps, and per layer without a captured graph) are assumed until they "
        "are calibrated against measured runs; their spread enters the intervals."
    )


def caveats_of(
    scenario: Scenario, told: Told, baseline: Told | None, notes: Sequence[str], *, nodes_validated: bool = False
) -> str:
    """The caveats and a run's own notes as HTML lists."""
    found = caveats(scenario, told, baseline, nodes_validated=nodes_validated)
    listed = "".join(f"<li>{escape(line)}</li>" for line in found)
    noted = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{listed}</ul>" + (f"<h3>Notes of this run</h3><ul>{noted}</ul>" if noted else "")
