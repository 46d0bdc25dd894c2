"""Pipeline stages of a serving plan: whether it can have them, and where its layers and links lie.

A stage is `tp x attention_dp` GPUs side by side, stages follow each other on the cluster. docs/explanation/serving.md
says how engines run them.
"""

from __future__ import annotations

from moesim.cost.links import at_reached_rates
from moesim.cost.reach import REL_SIGMA
from moesim.engine.speculative import draft_tokens
from moesim.errors import BadInput, Infeasible
from moesim.graph.stages import Hop, Stages, split_layers
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.spec.workload import StagesSpec

WHERE = "parallel.pp"
# vLLM drafts by multi-token prediction on the last stage (vllm-project/vllm pull request 46994, 2026); SGLang refuses
# the two together (server_args.py), and what TensorRT-LLM does is not known here.
DRAFT_IN_STAGES = ("vllm", "moesim")
# Their ranks count over stages before attention DP (vllm/distributed/parallel_state.py: DP x PP x TP); the others' over
# attention DP before stages.
DP_BEFORE_STAGES = ("vllm",)


def of_a_stage(parallel: ParallelSpec) -> ParallelSpec:
    """The parallelism of one stage: all but the stages."""
    return parallel if parallel.pp == 1 else parallel.model_copy(update={"pp": 1})


def refuse_idle_keys(scenario: Scenario) -> None:
    """Keys of a pipeline that no plan of the scenario has. Raises BadInput."""
    serving = scenario.serving
    if serving is None or scenario.search.pp != "off":
        return
    roles = {} if serving.roles is None else {"prefill": serving.roles.prefill, "decode": serving.roles.decode}
    for name, role in roles.items():
        if role.pipeline and _stages(role.parallel) == 1:
            raise BadInput(
                "a role of one stage has no pipeline", where=f"serving.roles.{name}.pipeline", mend="leave it out"
            )
    plans = [role.parallel for role in roles.values()] or [scenario.parallel]
    if serving.pipeline != StagesSpec() and all(_stages(plan) == 1 for plan in plans):
        raise BadInput(
            "one stage has no pipeline", where="serving.pipeline", mend="leave it out, or set parallel.pp above 1"
        )


def _stages(parallel: ParallelSpec | None) -> int:
    return 1 if parallel is None else parallel.pp


def check_stages(scenario: Scenario, parallel: ParallelSpec, model: ModelSpec, cluster: ClusterSpec) -> None:
    """Whether a serving plan can run in stages. Raises Infeasible (its reason is counted) or BadInput."""
    if parallel.pp == 1:
        return
    if parallel.rank_order[-1] != "pp":
        raise BadInput(
            "only stages on GPUs side by side are simulated", where="parallel.rank_order", mend="put pp last"
        )
    if parallel.pp > model.layers:
        raise Infeasible(
            f"{model.layers} layers cannot fill {parallel.pp} stages",
            where=WHERE,
            mend=f"use at most {model.layers}",
            reason="more_stages_than_layers",
        )
    stage, node = of_a_stage(parallel).gpus, cluster.gpus_per_node
    if (node % stage if stage < node else stage % node) != 0:
        raise Infeasible(
            f"a stage of {stage} GPUs neither divides a node of {node} nor fills several",
            where=WHERE,
            mend=f"choose tp x attention_dp that divides {node}, or a multiple of it",
            reason="nodes_not_filled",
        )
    if scenario.engine.name in DP_BEFORE_STAGES and parallel.attention_dp > 1 and parallel.tp < node < parallel.gpus:
        raise Infeasible(
            f"{scenario.engine.name} lays the stages of an attention-DP rank side by side, so that those of tp "
            f"{parallel.tp} spread over parts of nodes: that is not simulated",
            where=WHERE,
            mend=f"use attention_dp 1, tp {node}, or an instance of one node",
            reason="with_stages",
        )
    for asked, what, where in _not_simulated(scenario, cluster):
        if asked:
            raise Infeasible(
                f"{what} with pipeline stages is not simulated", where=where, mend="set pp to 1", reason="with_stages"
            )
    split_of(scenario, parallel, model)


def _not_simulated(scenario: Scenario, cluster: ClusterSpec) -> list[tuple[bool, str, str]]:
    """(Whether asked for, what, where) of all that leaves no room for stages yet."""
    serving, engine = scenario.serving, scenario.engine.name
    drafts = serving is not None and draft_tokens(serving) > 0 and engine not in DRAFT_IN_STAGES
    return [
        (drafts, f"speculative decoding of {engine}", "serving.speculative"),
        (scenario.policies.storage != "resident", f"storage {scenario.policies.storage}", "policies.storage"),
        (bool(scenario.faults), "a fault", "faults"),
        (scenario.placement.rebalance is not None, "re-layout", "placement.rebalance"),
        (bool(cluster.background), "traffic of other jobs", "cluster.background"),
    ]


def split_of(scenario: Scenario, parallel: ParallelSpec, model: ModelSpec) -> tuple[range, ...]:
    """The layers of each stage by the engine's rule, or as the scenario says. Raises BadInput."""
    given = None if scenario.serving is None else scenario.serving.pipeline.layers
    return split_layers(model.layers, parallel.pp, scenario.engine.name, given)


def stages_of(scenario: Scenario, parallel: ParallelSpec, model: ModelSpec, cluster: ClusterSpec) -> Stages | None:
    """The stages of a plan that `check_stages` has let through; None where there is one."""
    if parallel.pp == 1:
        return None
    each, domain = of_a_stage(parallel).gpus, cluster.domain_gpus
    reached = at_reached_rates(cluster)
    hops = []
    for stage in range(parallel.pp - 1):
        senders = range(stage * each, (stage + 1) * each)
        far = any(gpu // domain != (gpu + each) // domain for gpu in senders)
        latency_s = reached.nic_latency_s if far else reached.near_latency_s
        hops.append(Hop(far, latency_s, reached.shared_nic_bytes_per_s if far else reached.near_bytes_per_s))
    return Stages(
        layers=split_of(scenario, parallel, model),
        hops=tuple(hops),
        scattered=scenario.engine.name != "trtllm" and parallel.tp > 1,
        rel_sigma=REL_SIGMA,
    )
