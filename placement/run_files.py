"""The files of a run of `moesim tune`: the plan, of each role where it has roles, what engines load, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moesim.engine.explain import explain
from moesim.engine.role_specs import role_scenarios
from moesim.engine.simulate import Simulation
from moesim.errors import Infeasible
from moesim.files import write_json, write_text
from moesim.output.explain import explanation_json
from moesim.output.metrics import simulation_json
from moesim.output.report import write_run_report
from moesim.output.series import simulation_series
from moesim.output.steptrace import write_step_timeline
from moesim.spec.cluster import ClusterSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import ClusterChoice, Scenario, resolve_paths
from placement.export.engines import export_placement, write_map

MAP_NAMES = {"sglang": "expert_location.json", "trtllm": "moe_load_balancer.yaml"}


def write_run(
    folder: Path,
    result: dict[str, Any],
    chosen: Scenario,
    simulation: Simulation,
    base: Simulation | None,
) -> list[str]:
    """Write the files of a run, each whole or not at all; returns their paths. chosen: the best plan's scenario."""
    deployment = simulation.deployment
    head = {
        "format": "moesim-plan",
        "schema_version": 1,
        "verdict": result["verdict"],
        "gain": result["gain"],
    }
    if deployment.prefill is None:
        written = write_plan(folder, head, chosen, deployment.setup.placement, result["notes"])
    else:
        parts = role_scenarios(chosen, deployment.ground.cluster)
        placements = {"prefill": deployment.prefill.setup.placement, "decode": deployment.setup.placement}
        inside = {name: f"{name}/plan.yaml" for name in parts}
        _write_yaml(folder / "plan.yaml", {**head, "roles": inside}, chosen)
        written = ["plan.yaml"]
        for name, (part, cluster) in parts.items():
            own = part.model_copy(update={"cluster": _cluster_of(part, cluster, folder / name)})
            found = write_plan(folder / name, {**head, "role": name}, own, placements[name], result["notes"], name)
            written += [f"{name}/{path}" for path in found]
    write_step_timeline(folder / "timeline.json.gz", simulation)
    write_json(folder / "result.json", result, indent=1)
    write_json(folder / "simulation.json", {"best": _told(simulation), "baseline": _told(base)}, indent=1)
    write_run_report(folder)
    return [
        str(folder / name) for name in [*written, "timeline.json.gz", "result.json", "simulation.json", "report.html"]
    ]


def _cluster_of(scenario: Scenario, cluster: ClusterSpec, folder: Path) -> ClusterChoice | Path:
    """A role's share of the scenario's cluster, as a scenario chooses one; of a cluster file a file in its folder."""
    if isinstance(scenario.cluster, Path):
        write_text(folder / "cluster.yaml", yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False))
        return folder / "cluster.yaml"
    return scenario.cluster.model_copy(update={"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node})


def _write_yaml(path: Path, head: dict[str, Any], scenario: Scenario) -> None:
    # Files of the scenario under absolute names: the plan lies in another folder.
    plain = resolve_paths(scenario, Path.cwd()).model_dump(mode="json", exclude_none=True)
    write_text(path, yaml.safe_dump({**head, "scenario": plain}, sort_keys=False, allow_unicode=True))


def write_plan(
    folder: Path, head: dict[str, Any], scenario: Scenario, placement: ExpertPlacement, notes: list[str], role: str = ""
) -> list[str]:
    """Write a plan, its placement and what engines load, into a folder; returns the names. notes: are added to."""
    placement.write(folder / "placement.json")
    _write_yaml(folder / "plan.yaml", {**head, "placement": "placement.json"}, scenario)
    written = ["plan.yaml", "placement.json"]
    for engine, name in MAP_NAMES.items():
        told = f"{role}, {engine}" if role else engine
        try:
            paths = export_placement(placement, engine, folder / engine, scenario, role=role)
        except Infeasible as error:
            # The map depends on the experts' layout only; the engine's launch options are what cannot be written.
            notes.append(f"{told}: {error.line()}")
            write_map(placement, engine, folder / engine / name, scenario)
            written.append(f"{engine}/{name}")
            continue
        written += [str(path.relative_to(folder)) for path in paths]
    return written


def _told(simulation: Simulation | None) -> dict[str, Any] | None:
    """A simulation's figures and the series behind its pictures."""
    if simulation is None:
        return None
    figures = {**simulation_json(simulation), "explain": explanation_json(explain(simulation))}
    return {"figures": figures, "series": simulation_series(simulation)}
