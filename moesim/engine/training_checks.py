"""What training refuses by name before anything runs."""

from __future__ import annotations

from moesim.engine.moving import refuse_changes
from moesim.engine.training_overlap import OVERLAPPED
from moesim.errors import BadInput, Infeasible
from moesim.graph.pipeline import SPLIT, check_pipeline
from moesim.network.rank_groups import RankGrid
from moesim.routing.capacity.rule import capacity_rule
from moesim.routing.gates.choice import gate_spec
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import TRAINING_OBJECTIVES, ObjectiveSpec, Scenario
from moesim.spec.workload import SloSpec, TrainingSpec

BACKENDS = ("deepep", "alltoall", "allgather_reducescatter")
PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "fp8_block")
ACTIVATIONS = ("bf16", "fp16", "fp32")


def _serves(objective: ObjectiveSpec) -> bool:
    return objective.maximize not in (*TRAINING_OBJECTIVES, ObjectiveSpec().maximize)


def refuse_unsupported_training(scenario: Scenario) -> None:
    """Name what a training scenario asks for that is not simulated. Raises BadInput."""
    policies = scenario.policies
    pipeline = "1f1b" if scenario.training is None else scenario.training.pipeline.schedule
    refuse_changes(scenario, "training")
    gate_spec(policies.gate)
    refused = [
        (
            policies.schedule not in ("sequential", OVERLAPPED),
            "policies.schedule",
            f"{policies.schedule} inside a layer is not simulated in training",
            f"write `schedule: sequential` or {OVERLAPPED}; pipeline schedules stand under training.pipeline",
        ),
        (
            policies.schedule == OVERLAPPED and pipeline in SPLIT,
            "policies.schedule",
            f"{OVERLAPPED} pairs whole backward passes, and {pipeline} splits them",
            "use pipeline schedule 1f1b or interleaved",
        ),
        (
            policies.schedule == OVERLAPPED and bool(scenario.faults),
            "faults",
            f"faults under {OVERLAPPED} are not simulated",
            "leave them out, or write `schedule: sequential`",
        ),
        (policies.storage != "resident", "policies.storage", "training keeps its weights resident", "leave it out"),
        (
            policies.dispatch.backend not in BACKENDS,
            "policies.dispatch.backend",
            f"training has no {policies.dispatch.backend} dispatcher",
            f"use one of: {', '.join(BACKENDS)}",
        ),
        (
            policies.dispatch.mode == "low_latency",
            "policies.dispatch.mode",
            "DeepEP's low-latency kernels have no backward pass",
            "use mode auto or normal",
        ),
        (
            scenario.training is not None and scenario.training.host.posts and policies.dispatch.backend != "deepep",
            "training.host",
            f"CPU threads post the writes of deepep, not of {policies.dispatch.backend}",
            "leave exchange_s and the rows out, or use backend deepep",
        ),
        (
            scenario.placement.redundant_experts > 0,
            "placement.redundant_experts",
            "replicas of experts, whose gradients would have to be summed, are not simulated in training",
            "set it to 0",
        ),
        (
            scenario.objective.slo != SloSpec() or _serves(scenario.objective),
            "objective",
            "service levels and output throughput are of serving",
            "leave it out, or use limits, and maximize: tokens_per_s_per_gpu or mfu",
        ),
    ]
    for asked, where, what, mend in refused:
        if asked:
            raise BadInput(what, where=where, mend=mend)
    for name in ("dense", "experts"):
        dtype = getattr(scenario.precision, name)
        if dtype not in PRECISIONS:
            raise BadInput(
                f"training in {dtype} is not simulated",
                where=f"precision.{name}",
                mend=f"use one of: {', '.join(PRECISIONS)}",
            )
    if scenario.precision.activations not in ACTIVATIONS:
        raise BadInput(
            f"activations in {scenario.precision.activations} are not simulated in training",
            where="precision.activations",
            mend=f"use one of: {', '.join(ACTIVATIONS)}",
        )


def check_training(
    parallel: ParallelSpec, model: ModelSpec, cluster: ClusterSpec, scenario: Scenario, training: TrainingSpec
) -> RankGrid:
    """Whether a plan can train the model on the cluster; its ranks. Raises Infeasible (reason counted) or BadInput."""
    if cluster.gpus % parallel.gpus:
        raise Infeasible(
            f"{parallel.gpus} GPUs of a plan do not divide the cluster's {cluster.gpus}",
            where="parallel",
            mend=f"choose tp x cp x pp x attention_dp that divides {cluster.gpus}",
            reason="gpus_not_divisible",
        )
    for name in ("dense", "experts"):
        if getattr(scenario.precision, name) == "fp32" and "fp32" not in cluster.gpu.flops_per_s:
            raise BadInput(
                f"the fp32 peak of {cluster.gpu.name} is not known",
                where=f"precision.{name}",
                mend="add fp32 to gpu.flops_per_s of a cluster file, or train in bf16",
            )
    if parallel.decode_cp > 1:
        raise BadInput("training keeps no KV cache to split", where="parallel.decode_cp", mend="leave it out")
    wide = cluster.domain_gpus if cluster.domain_gpus > cluster.gpus_per_node else 0
    grid = RankGrid(parallel, cluster.gpus // parallel.gpus, cluster.gpus_per_node, wide)
    capacity_rule(scenario.policies, model.moe.top_k)
    if training.memory.fraction_of != "all":
        raise BadInput(
            f"memory.fraction_of: {training.memory.fraction_of} is about a KV cache, and training has none",
            where="training.memory.fraction_of",
            mend="leave it at all",
        )
    _check_divisions(parallel, model, training)
    _check_batch(parallel, grid, training)
    backend = scenario.policies.dispatch.backend
    if backend == "deepep" and parallel.expert_tp > 1:
        raise Infeasible(
            "deepep needs whole experts, not expert_tp above 1",
            where="policies.dispatch.backend",
            mend="use expert_tp 1, or backend alltoall",
            reason="backend_needs_ep",
        )
    if parallel.ep > 1 and not grid.even("ep"):
        raise Infeasible(
            f"EP groups of {parallel.ep} ranks lie unevenly on nodes of {cluster.gpus_per_node}",
            where="parallel.rank_order",
            mend="choose an ep that fills nodes, or another rank order",
            reason="nodes_not_filled",
        )
    return grid


def _check_divisions(parallel: ParallelSpec, model: ModelSpec, training: TrainingSpec) -> None:
    spec, moe = model.attention, model.moe
    kv_split = spec.kind == "gqa" and spec.kv_heads % parallel.tp and parallel.tp % spec.kv_heads
    pieces = 2 * parallel.cp if parallel.cp > 1 else 1
    rules = [
        (spec.heads % parallel.tp or kv_split, "tp", f"{spec.heads} heads on {spec.kv_heads} do not divide by tp "
         f"{parallel.tp}", "choose a tp that divides the heads", "heads_not_divisible"),
        (model.dense_layers and model.dense_intermediate % parallel.tp, "tp", f"the dense width "
         f"{model.dense_intermediate} does not divide by tp {parallel.tp}", "choose a tp that divides it",
         "heads_not_divisible"),
        (moe.shared_intermediate % parallel.tp, "tp", f"the shared experts' width {moe.shared_intermediate} does not "
         f"divide by tp {parallel.tp}", "choose a tp that divides it", "heads_not_divisible"),
        (moe.experts % parallel.ep, "ep", f"{moe.experts} experts do not divide by ep {parallel.ep}",
         "choose an ep that divides them", "slots_not_divisible"),
        (moe.intermediate % parallel.expert_tp, "expert_tp", f"an expert's width {moe.intermediate} does not divide by "
         f"expert_tp {parallel.expert_tp}", "choose an expert_tp that divides it", "expert_not_divisible"),
        (training.sequence_length % (pieces * parallel.tp), "cp", f"{training.sequence_length} tokens do not divide "
         f"over cp {parallel.cp} (two pieces each) and tp {parallel.tp}", "choose another sequence_length",
         "sequence_not_divisible"),
    ]  # fmt: skip
    for wrong, key, what, mend, reason in rules:
        if wrong:
            raise Infeasible(what, where=f"parallel.{key}", mend=mend, reason=reason)


def _check_batch(parallel: ParallelSpec, grid: RankGrid, training: TrainingSpec) -> None:
    ranks = parallel.attention_dp * grid.instances
    whole = training.micro_batch * ranks
    if training.global_batch % whole:
        raise Infeasible(
            f"a global batch of {training.global_batch} does not divide into micro-batches of {training.micro_batch} "
            f"on {ranks} data-parallel ranks",
            where="training.global_batch",
            mend=f"use a multiple of {whole}",
            reason="batch_not_divisible",
        )
    pipeline = training.pipeline
    check_pipeline(pipeline.schedule, parallel.pp, training.global_batch // whole, pipeline.virtual_stages)
