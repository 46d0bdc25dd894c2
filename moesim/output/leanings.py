"""What the figures of a plan lean on that only hardware can show, as a scenario and its cluster tell it."""

from __future__ import annotations

from collections.abc import Iterable

from moesim.engine.role_specs import role_scenarios
from moesim.engine.stage_layout import of_a_stage
from moesim.routing.capacity.rule import capacity_rule
from moesim.spec.cluster import ClusterSpec
from moesim.spec.evidence import Leaning, Trait, device_trait, layer_trait, layout_trait, training_layout_trait
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.units import BYTES_PER_ELEMENT

PLAIN = (None, "contiguous")
# What carries the tokens of a dispatcher on GPUs; all but DeepEP are built of NCCL's collectives.
LIBRARIES = {"deepep": "DeepEP"}
SCHEMES = {"deepep": ""}


def leanings(
    scenario: Scenario,
    cluster: ClusterSpec,
    model: ModelSpec,
    *,
    label: str = "",
    tokens: tuple[int, int] | None = None,
) -> list[Leaning]:
    """Everything that a plan's figures lean on: its whole time first, then what decides between placements.

    label: of the plan, for a person. tokens: least and most of a rank that are judged; else all that its batches allow.
    """
    if scenario.serving is not None and scenario.serving.roles is not None:
        parts = role_scenarios(scenario, cluster)
        layouts = "; ".join(f"{name} {_layout(part, own)}" for name, (part, own) in parts.items())
        found = [_whole(scenario, cluster, layouts, label or layouts)]
        for part, own in parts.values():
            found += _inside(part, own, model, tokens)
        return found
    layout = _layout(scenario, cluster)
    return [_whole(scenario, cluster, layout, label or layout), *_inside(scenario, cluster, model, tokens)]


def of_plans(plans: Iterable[tuple[str, Scenario]], cluster: ClusterSpec, model: ModelSpec) -> list[Leaning]:
    """What a comparison of plans leans on: labels and scenarios."""
    return [one for label, scenario in plans for one in leanings(scenario, cluster, model, label=label)]


def of_placement(
    scenario: Scenario, cluster: ClusterSpec, model: ModelSpec, *, tokens: tuple[int, int] | None
) -> list[Leaning]:
    """What a verdict on a placement leans on: the layer alone, under any placement but the plain one."""
    return _inside(scenario, cluster, model, tokens, placed=True)


def _placed(scenario: Scenario) -> bool:
    return scenario.placement.solver not in PLAIN or scenario.placement.file is not None


def _parallel(scenario: Scenario, cluster: ClusterSpec) -> ParallelSpec:
    return scenario.parallel or ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)


def _layout(scenario: Scenario, cluster: ClusterSpec) -> str:
    policies = scenario.policies
    return layout_trait(_parallel(scenario, cluster), policies.dispatch.backend, policies.schedule)


def _whole(scenario: Scenario, cluster: ClusterSpec, layout: str, label: str) -> Leaning:
    """The whole time of serving or of a training step."""
    traits: dict[str, Trait] = {"gpu": device_trait(cluster.gpu.name), "model": scenario.model, "layout": layout}
    if scenario.training is not None:
        parallel = _parallel(scenario, cluster)
        policies, pipeline = scenario.policies, scenario.training.pipeline
        traits |= {"exchange": _exchange(scenario), **_nodes(cluster.gpus, cluster), "ranks": cluster.gpus}
        traits["layout"] = training_layout_trait(
            parallel, policies.dispatch.backend, policies.schedule, pipeline.schedule, pipeline.virtual_stages
        )
        return Leaning("training_step", f"training step of {label or parallel.label()}", traits)
    assert scenario.serving is not None
    work, drafts = scenario.serving.workload, scenario.serving.speculative
    traits |= {
        "engine": scenario.engine.name,
        "experts_dtype": scenario.precision.experts,
        "drafts": 0 if drafts is None else drafts.draft_tokens,
        "isl": work.isl or "a trace's",
        "osl": work.osl or "a trace's",
        "concurrency": "an open loop",
    }
    if work.arrivals is not None and work.arrivals.concurrency is not None:
        instances = max(cluster.gpus // _parallel(scenario, cluster).gpus, 1)
        traits["concurrency"] = -(-work.arrivals.concurrency // instances)
    aside = ", placement aside" if _parallel(scenario, cluster).ep > 1 and _placed(scenario) else ""
    return Leaning("serving_time", f"serving time of {label}{aside}", traits)


def _nodes(gpus: int, cluster: ClusterSpec) -> dict[str, Trait]:
    nodes = -(-gpus // cluster.gpus_per_node)
    return {"nodes": nodes, "cluster": cluster.name} if nodes > 1 else {"nodes": nodes}


def _exchange(scenario: Scenario) -> str:
    backend = scenario.policies.dispatch.backend
    return f"{LIBRARIES.get(backend, 'nccl')} {SCHEMES.get(backend, backend)}".strip()


def _inside(
    scenario: Scenario, cluster: ClusterSpec, model: ModelSpec, tokens: tuple[int, int] | None, *, placed: bool = False
) -> list[Leaning]:
    """What ranks exchange and compute, what placing experts gains, and what a capacity drops."""
    # Experts lie on the GPUs of one pipeline stage, and tokens travel among those.
    parallel, device = of_a_stage(_parallel(scenario, cluster)), device_trait(cluster.gpu.name)
    nodes, moe = -(-parallel.gpus // cluster.gpus_per_node), model.moe
    least, most = tokens or (1, _most_tokens(scenario))
    layer = layer_trait(moe.experts, model.hidden, moe.intermediate, moe.top_k)
    shape: dict[str, Trait] = {
        "gpu": device, "layer": layer, "experts_dtype": scenario.precision.experts, "tokens_per_rank": (least, most),
    }  # fmt: skip
    over: dict[str, Trait] = {
        "gpu": device, "exchange": _exchange(scenario), **_nodes(parallel.gpus, cluster), "ranks": parallel.gpus,
    }  # fmt: skip
    spot = f"{parallel.gpus} GPUs" + (f" of {nodes} nodes" if nodes > 1 else "")
    found = []
    if parallel.ep > 1 and (placed or _placed(scenario)):
        found.append(Leaning("placement_gain", f"placement gain on {spot}", {**over, **shape}))
    if parallel.gpus > 1:
        precision = scenario.precision
        low = least * model.hidden * BYTES_PER_ELEMENT[precision.dispatch]
        high = most * moe.top_k * model.hidden * BYTES_PER_ELEMENT[precision.combine]
        words = f"exchanges by {_exchange(scenario)} on {spot}"
        found.append(Leaning("exchange_time", words, {**over, "rank_bytes": (low, high)}))
    found.append(Leaning("expert_time", f"what a {device} computes", shape))
    rule = capacity_rule(scenario.policies, moe.top_k)
    if not rule.dropless:
        by_position = "choice" if rule.by_choice else "token"
        traits: dict[str, Trait] = {
            "rule": rule.rule, "drop": by_position if rule.drop == "position" else rule.drop,
            "backup": rule.backup or "none", "pad": str(rule.pad).lower(),
        }  # fmt: skip
        found.append(Leaning("capacity_drops", f"which tokens {rule.rule} drops", traits))
    return found


def _most_tokens(scenario: Scenario) -> int:
    if scenario.training is not None:
        return scenario.training.sequence_length * scenario.training.micro_batch
    assert scenario.serving is not None
    return scenario.serving.batching.max_batch_tokens_per_dp_rank
