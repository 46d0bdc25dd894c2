"""A scenario: whether its parts exist and fit, and what its steps would be priced from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.commands.doctor.findings import Finding
from moesim.errors import BadInput, Infeasible, MissingPart, MoesimError
from moesim.units import human_bytes

if TYPE_CHECKING:
    from moesim.engine.coverage import Coverage
    from moesim.engine.memory import MemoryLedger
    from moesim.spec.cluster import ClusterSpec
    from moesim.spec.model import ModelSpec
    from moesim.spec.parallel import ParallelSpec
    from moesim.spec.scenario import Scenario


@dataclass
class Checked:
    """What held up to the first error, and that error: BadInput (2), Infeasible (1) or MissingPart (3)."""

    findings: list[Finding] = field(default_factory=list)
    coverage: tuple[Coverage, ...] = ()
    error: MoesimError | None = None


def check_scenario(path: Path, overrides: tuple[str, ...] = ()) -> Checked:
    """Check a scenario's files, divisibility, placement, kernels, memory and prices.

    overrides: `a.b=c` each, as for `simulate`. The placement is solved and the steps are priced, but none is run.
    """
    checked = Checked()
    try:
        for finding in _findings(path, overrides, checked):
            checked.findings.append(finding)
    except MoesimError as error:
        checked.error = error
    except ImportError as error:
        checked.error = MissingPart(
            f"a part is not installed ({error})", where=str(path), mend="pip install moesim anew"
        )
    return checked


def _findings(path: Path, overrides: tuple[str, ...], checked: Checked) -> Iterator[Finding]:
    from moesim.commands.doctor import buffers, deepep
    from moesim.commands.doctor.divisibility import divisibility
    from moesim.engine.context_layout import check_decode_cp
    from moesim.engine.deployment import check_parallel, refuse_unsupported
    from moesim.engine.stage_layout import check_stages
    from moesim.spec.hf import load_model
    from moesim.spec.parallel import ParallelSpec
    from moesim.spec.presets import load_cluster
    from moesim.spec.scenario import load_scenario
    from moesim.systems.load import apply_system

    scenario = apply_system(load_scenario(path, overrides))
    if scenario.training is not None:
        from moesim.commands.doctor.training import training_findings

        yield from training_findings(path, scenario)
        return
    refuse_unsupported(scenario)
    yield Finding("scenario", "ok", str(path))
    model = load_model(scenario.model)
    yield Finding("model", "ok", f"{model.id}, {model.parameters() / 1e9:.1f} billion parameters ({model.source})")
    cluster = load_cluster(scenario.cluster)
    yield Finding(
        "cluster", "ok", f"{cluster.name}, {cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu.name}"
    )
    yield from _registered(scenario)
    yield from _loads(scenario, model)
    parallel = scenario.parallel or ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)
    redundant = _redundant(scenario, model, parallel.ep)
    yield from divisibility(model, cluster, parallel, scenario.precision, scenario.policies, redundant)
    slots = model.moe.experts + redundant
    tokens = _dispatch_limit(scenario)
    yield from deepep.limits(scenario, model, cluster, parallel, slots, tokens)
    check_parallel(parallel, model, cluster, scenario.policies)
    check_stages(scenario, parallel, model, cluster)
    check_decode_cp(scenario, parallel, model, cluster)
    instances = cluster.gpus // parallel.gpus
    yield Finding("parallel", "ok", f"{parallel.label()}, {instances} instance{'s' if instances > 1 else ''}")
    each = _slots(scenario, model, parallel.ep)
    yield Finding("placement", "ok", f"{each} slots of each layer on each of {parallel.ep} ranks")
    counted = _ledger(scenario, model, cluster, parallel, each, tokens)
    yield from buffers.buffers(model, parallel, scenario.policies.dispatch, slots, tokens, counted)
    yield _memory(counted)
    yield from _coverage(scenario, checked)


def _redundant(scenario: Scenario, model: ModelSpec, ep: int) -> int:
    """Slots beyond one for each expert: those of the placement file, where there is one."""
    if scenario.placement.file is None:
        return scenario.placement.redundant_experts
    from moesim.spec.maps.frame import MapFrame
    from moesim.spec.placement_file import read_placement

    return read_placement(scenario.placement.file, MapFrame.of(model, ep)).slots - model.moe.experts


def _dispatch_limit(scenario: Scenario) -> int:
    """DeepEP's low-latency dispatch limit per rank, as the engine sets it; the usual one where we do not know."""
    from moesim.engine.memory import LOW_LATENCY_MAX_TOKENS
    from moesim.engine.rules import engine_rules

    try:
        return engine_rules(scenario.engine.name).low_latency_tokens
    except BadInput:
        return LOW_LATENCY_MAX_TOKENS


def _registered(scenario: Scenario) -> Iterator[Finding]:
    from moesim import plugins

    plugins.load(plugins.COSTS, scenario.cost.source, where="cost.source")
    yield Finding("cost model", "ok", scenario.cost.source)
    if scenario.placement.solver is not None:
        plugins.load(plugins.SOLVERS, scenario.placement.solver, where="placement.solver")
        yield Finding("solver", "ok", scenario.placement.solver)
    if scenario.records:
        from moesim.output.validation import evidence_of

        own = len(evidence_of(scenario)) - len(evidence_of(None))
        yield Finding("records", "ok", f"{own} claims in {len(scenario.records)} places")


def _loads(scenario: Scenario, model: ModelSpec) -> Iterator[Finding]:
    from moesim.routing.readers import read_loads

    for load in scenario.routing.loads or ():
        counts = read_loads(load.file, phase=load.phase, weight=load.weight, experts=model.moe.experts)
        _, layers, experts = counts.counts.shape
        yield Finding("loads", "ok", f"{load.file}: {layers} layers of {experts} experts")


def _slots(scenario: Scenario, model: ModelSpec, ep: int) -> int:
    if scenario.placement.file is not None:
        from moesim.engine.deployment import check_placement
        from moesim.spec.maps.frame import MapFrame
        from moesim.spec.parallel import ParallelSpec
        from moesim.spec.placement_file import read_placement

        placement = read_placement(scenario.placement.file, MapFrame.of(model, ep))
        check_placement(placement, model, scenario.parallel or ParallelSpec(attention_dp=ep, ep=ep))
        return placement.slots_per_rank
    slots = model.moe.experts + scenario.placement.redundant_experts
    if slots % ep:
        more = -(-slots // ep) * ep - model.moe.experts
        raise Infeasible(
            f"{slots} slots do not divide by ep {ep}",
            where="placement.redundant_experts",
            mend=f"use {more} redundant experts",
            reason="slots_not_divisible",
        )
    return slots // ep


def _ledger(
    scenario: Scenario, model: ModelSpec, cluster: ClusterSpec, parallel: ParallelSpec, slots: int, tokens: int
) -> MemoryLedger:
    from moesim.engine.memory import ledger
    from moesim.engine.stage_layout import split_of
    from moesim.engine.workload import lengths

    serving = scenario.serving
    if serving is None:
        raise MissingPart("the memory of training is not counted yet", where="training", mend="give `serving` instead")
    return ledger(
        model,
        cluster,
        parallel,
        scenario.precision,
        slots,
        serving.batching,
        serving.memory,
        scenario.policies,
        max_context_tokens=lengths(serving.workload).longest_context,
        low_latency_max_tokens=tokens,
        stages=None if parallel.pp == 1 else split_of(scenario, parallel, model),
    )


def _memory(counted: MemoryLedger) -> Finding:
    return Finding(
        "memory",
        "ok",
        f"{human_bytes(counted.fixed_bytes)} of {human_bytes(counted.limit_bytes)} before the KV cache, "
        f"which holds {counted.kv_capacity_tokens:,} tokens of an attention-DP rank",
    )


def _coverage(scenario: Scenario, checked: Checked) -> Iterator[Finding]:
    """Solve the placement and price the steps, as `simulate` would."""
    from moesim.commands.doctor.coverage import summary
    from moesim.engine.coverage import coverage
    from moesim.engine.deployment import groundwork, resolve
    from moesim.engine.rules import engine_rules

    try:
        engine_rules(scenario.engine.name)
    except BadInput as unknown:
        yield Finding("coverage", "absent", f"not looked at: {unknown.what}", unknown.mend)
        return
    checked.coverage = tuple(coverage(resolve(groundwork(scenario))))
    yield summary(checked.coverage)
