"""The number that an engine's memory option takes for a plan, whatever the plan's own fraction is a share of."""

from __future__ import annotations

from moesim.engine.memory import MemoryLedger, ledger
from moesim.engine.memory_limits import Of, share
from moesim.engine.stage_layout import split_of
from moesim.engine.workload import lengths
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import Scenario


def memory_share(placement: ExpertPlacement, scenario: Scenario, of: Of) -> float:
    """The plan's memory as a share of what the engine's option means (`serving.memory.fraction_of`), 0 to 1.

    The plan's own figure where it means the same; else what gives the KV cache of the ledger. Raises Infeasible where
    nothing fits.
    """
    assert scenario.serving is not None
    memory = scenario.serving.memory
    if memory.fraction_of == of and not memory.reserved_bytes:
        return memory.fraction
    counted = _counted(placement, scenario)
    return share(counted.items, counted.hbm_bytes, of)


def _counted(placement: ExpertPlacement, scenario: Scenario) -> MemoryLedger:
    assert scenario.serving is not None
    model = load_model(scenario.model)
    parallel = scenario.parallel or ParallelSpec(attention_dp=placement.ranks, ep=placement.ranks)
    return ledger(
        model,
        load_cluster(scenario.cluster),
        parallel,
        scenario.precision,
        slots_per_rank=placement.slots_per_rank,
        batching=scenario.serving.batching,
        memory=scenario.serving.memory,
        policies=scenario.policies,
        max_context_tokens=lengths(scenario.serving.workload).longest_context,
        stages=None if parallel.pp == 1 else split_of(scenario, parallel, model),
    )
