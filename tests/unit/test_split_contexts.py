"""Contexts split among the GPUs of a TP group: memory, times by all fidelities, what is refused, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine import des, maxplus
from moesim.engine.batcher import Plan, new_plan
from moesim.engine.context_layout import check_heads
from moesim.engine.critical import critical_path
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.faults import FaultedTable, FaultState
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM, memory_rule
from moesim.engine.serving import Load, serve
from moesim.engine.stepmodel import ExactModel, StepModel, batch_limits, batch_of_plan
from moesim.errors import BadInput, Infeasible
from moesim.graph.task import Link
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import SearchSpec, load_scenario
from placement.layouts import with_split_contexts
from placement.space import enumerate_space
from tests.scenarios import small, write

# Latent attention in few layers, so that graphs are small.
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 6,
    "hidden_size": 1024, "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 32,
    "q_lora_rank": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "intermediate_size": 2048,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "torch_dtype": "bfloat16",
    "moe_layer_freq": 1, "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
TP4, TP2 = {"tp": 4, "ep": 4}, {"tp": 2, "attention_dp": 2, "ep": 4}


def data(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(LATENT))
    found = small(model=str(folder / "config.json"), engine={"name": "vllm", "version": "0.19.1"})
    found["policies"] = {"dispatch": {"backend": "allgather_reducescatter"}}
    found["placement"] = {"solver": "contiguous", "redundant_experts": 0}
    found["parallel"] = TP4
    serving = changes.pop("serving", {})
    found.update(changes)
    found["serving"] = found["serving"] | serving
    return found


def deployment(folder: Path, **changes: Any) -> Deployment:
    return resolve(groundwork(load_scenario(write(folder, data(folder, **changes)))))


def planned(model: StepModel, decode: int, prompts: int = 0, prefix: int = 0) -> Plan:
    ranks = model.deployment.setup.parallel.attention_dp
    plan = new_plan(ranks, model.limits.max_running)
    plan.decode_seqs[:], plan.decode_kv[:] = decode, decode * 256.0
    plan.prefill_seqs[:], plan.prefill_tokens[:] = prompts, prompts * 200
    plan.prefill_prefix[:] = prompts * prefix
    return plan


@pytest.mark.parametrize("parallel", [TP4 | {"decode_cp": 2}, TP4 | {"decode_cp": 4}, TP2 | {"decode_cp": 2}])
@pytest.mark.parametrize(("decode", "prompts", "prefix"), [(32, 0, 0), (8, 2, 0), (0, 2, 300)])
def test_executors_agree_and_ranks_meet_around_attention(
    parallel: dict[str, int], decode: int, prompts: int, prefix: int, tmp_path: Path
) -> None:
    model = StepModel(deployment(tmp_path, parallel=parallel), seed=0)
    exact = ExactModel(model, "maxplus")
    kind = "prefill" if prompts else "decode"
    priced = exact.price(batch_of_plan(model, planned(model, decode, prompts, prefix)), kind)
    graph, _ = exact.graph(priced)
    fast, slow = maxplus.run(graph, timeline=True), des.run(graph, step=0, sharing=True)
    assert slow.step_s == pytest.approx(fast.step_s, rel=1e-9)
    tasks = [task for task in graph.tasks if task.operation == "context_collective"]
    each = sum(bool(part.estimates) for part in (priced[0].context_gather, priced[0].context_merge))
    assert len(tasks) == 6 * each
    parts = parallel["decode_cp"]
    for task in tasks:
        assert task.groups is not None
        assert task.groups.tolist() == [gpu // parts for gpu in range(4)]
    path = critical_path(graph, fast).by_operation_s(graph)
    assert sum(path.values()) == pytest.approx(float(fast.step_s[0]))
    assert path["context_collective"] > 0


@pytest.mark.parametrize(("decode", "prompts", "prefix"), [(32, 0, 0), (0, 2, 0), (0, 2, 600), (16, 1, 300)])
def test_what_splitting_changes_is_the_same_by_table(decode: int, prompts: int, prefix: int, tmp_path: Path) -> None:
    """Under the same routing the step changes by what attention does, in every fidelity alike."""
    plain, split = (StepModel(deployment(tmp_path, parallel=TP4 | {"decode_cp": parts}), seed=0) for parts in (1, 4))
    plan = planned(plain, decode, prompts, prefix)
    exact = [ExactModel(model, "maxplus")(plan) for model in (plain, split)]
    change = split.base(plan) - plain.base(plan)
    assert change == pytest.approx(exact[1] - exact[0], rel=1e-9)  # 256 tokens are a point of the table
    assert (abs(change) > 1e-9) == bool(decode or prefix)


def test_a_plan_in_one_piece_has_none_of_it(tmp_path: Path) -> None:
    found = ExactModel(StepModel(deployment(tmp_path), seed=0), "maxplus")
    graph, priced = found.build(batch_of_plan(found.model, planned(found.model, 16)), "decode")
    assert not priced[0].context_gather.estimates
    assert "context_collective" not in {task.operation for task in graph.tasks}
    assert "decode_cp" not in ParallelSpec(tp=4, ep=4).model_dump()
    assert ParallelSpec(tp=4, ep=4, decode_cp=2).model_dump()["decode_cp"] == 2
    assert ParallelSpec(tp=4, ep=4, decode_cp=2).label() == "TP4 DCP2 EP4"
    assert "decode_cp" not in SearchSpec().model_dump()


@pytest.mark.parametrize("stages", [1, 2])
def test_the_compiled_loop_is_the_processes(stages: int, tmp_path: Path) -> None:
    from moesim.engine.batch_rules import flow_of

    parallel = TP4 | {"decode_cp": 4, "pp": stages}
    one = deployment(tmp_path, parallel=parallel, serving={"memory": {"admission": "engine"}})
    model, rng = StepModel(one, seed=0), np.random.default_rng(3)
    load = Load(rng.integers(1, 600, 60), rng.integers(1, 40, 60), arrival_s=np.cumsum(rng.exponential(2e-3, 60)))
    flow = flow_of(one, model.limits)
    timed = model.under(None)
    assert timed.compilable or timed.flow_compilable
    fast, slow = (
        serve(load, model.limits, ranks=1, instances=1, step_time=timed, compiled=how, flow=flow)
        for how in (True, False)
    )
    np.testing.assert_array_equal(fast.finish_s, slow.finish_s)
    np.testing.assert_array_equal(fast.step_s, slow.step_s)
    np.testing.assert_array_equal(fast.gaps_s, slow.gaps_s)


def test_pages_are_as_wide_as_the_group(tmp_path: Path) -> None:
    assert memory_rule("engine", "vllm", 8) == VLLM._replace(page_tokens=128)
    assert memory_rule("engine", "sglang", 2) == SGLANG._replace(page_tokens=2)
    assert memory_rule("engine", "vllm") == VLLM
    assert memory_rule("reserve", "vllm", 8) == RESERVE
    one = deployment(tmp_path, parallel=TP4 | {"decode_cp": 4}, serving={"memory": {"admission": "engine"}})
    assert batch_limits(one).rule.page_tokens == 64


def test_a_slow_gpu_slows_kernels_and_a_slow_link_what_is_exchanged(tmp_path: Path) -> None:
    """By table as by the executor, whose graph is slowed task by task."""
    model = StepModel(deployment(tmp_path, parallel=TP4 | {"decode_cp": 4}), seed=0)
    plan = planned(model, 48)
    whole = model.base.attention().seconds
    moved = model.decode_exchange().seconds()
    assert (moved < whole).all()
    for state, kernels, links in (
        (FaultState(slow_gpus=((1, 2.0),)), 2.0, 1.0),
        (FaultState(slow_links=((1, Link.NVLINK, 3.0),)), 1.0, 3.0),
    ):
        table = FaultedTable(model, None, state)
        asked = np.asarray([5e-5])
        exchanged = table._exchanged_s(plan)
        assert table.slowed(plan, asked) == pytest.approx((asked - exchanged) * kernels + exchanged * links)
        exact = ExactModel(model, "maxplus")
        graph, _ = exact.graph(exact.price(batch_of_plan(model, plan), "decode"))
        careful = float(maxplus.run(state.slowed(graph)).step_s[0])
        assert table(plan) == pytest.approx(careful, rel=0.03)
    reading = FaultedTable(model, None, FaultState(slow_gpus=((1, 2.0),)))
    assert reading._exchanged_s(planned(model, 0, 2, 300))[0] > 0


QWEN = {"model": "Qwen/Qwen3-30B-A3B", "cost": {"source": "roofline"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"tp": 4, "ep": 4, "decode_cp": 3}}, "tp 4 does not divide by it"),
        ({"engine": {"name": "trtllm"}}, "trtllm splits contexts over GPUs of their own (Helix)"),
        ({"policies": {"schedule": "two_batch"}}, "schedule two_batch with split contexts is not simulated"),
        ({"policies": {"schedule": "shortcut"}}, "schedule shortcut with split contexts is not simulated"),
        ({"model": "zai-org/GLM-5"}, "sparse attention with split contexts is not simulated"),
        (QWEN, "tp 4 keeps each of 4 KV heads 1 times: 4 GPUs hold no copies of one context to split; set it to 1, or"),
        (QWEN | {"parallel": {"tp": 8, "ep": 8, "decode_cp": 4}}, "use a divisor of 2"),
        (QWEN | {"engine": {"name": "sglang"}}, "sglang splits the contexts of latent attention only"),
        (
            {"model": "openai/gpt-oss-120b", "parallel": {"tp": 16, "ep": 16, "decode_cp": 2},
             "cluster": {"system": "h200_sxm", "nodes": 2}},
            "a sliding window with split contexts is not simulated",
        ),
        (
            {"model": "deepseek-ai/DeepSeek-V3", "engine": {"name": "sglang"},
             "parallel": {"tp": 8, "ep": 8, "decode_cp": 8},
             "serving": {"speculative": {"method": "mtp", "draft_tokens": 1, "acceptance": 0.5}}},
            "speculative decoding of sglang with split contexts is not simulated",
        ),
        (
            {"serving": {"roles": {"prefill": {"gpus": 4, "parallel": TP4 | {"decode_cp": 2}}, "decode": {"gpus": 4}}}},
            "serving.roles.prefill.parallel.decode_cp: a prefill pool decodes nothing",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((Infeasible, BadInput)) as told:
        deployment(tmp_path, **({"parallel": TP4 | {"decode_cp": 4}} | changes))
    assert said in told.value.line()


def test_neighbours_split_copies_of_one_kv_head() -> None:
    """Of 24 ranks six keep one of four KV heads: two, three and six neighbours may share it, four would hold two."""
    model = load_model("Qwen/Qwen3-235B-A22B")
    model = model.model_copy(update={"attention": model.attention.model_copy(update={"heads": 96})})
    for parts in (2, 3, 6):
        check_heads(ParallelSpec(tp=24, ep=24, decode_cp=parts), model, "vllm")
    with pytest.raises(Infeasible, match="4 GPUs hold no copies of one context"):
        check_heads(ParallelSpec(tp=24, ep=24, decode_cp=4), model, "vllm")
    odd = model.model_copy(update={"attention": model.attention.model_copy(update={"heads": 72})})
    with pytest.raises(Infeasible, match="18 query heads of a KV head do not divide by 4"):
        check_heads(ParallelSpec(tp=48, ep=48, decode_cp=4), odd, "vllm")


def test_training_keeps_no_cache() -> None:
    from moesim.engine.training import training_model
    from moesim.spec.scenario import Scenario
    from tests.training_scenarios import training

    with pytest.raises(BadInput, match="training keeps no KV cache to split"):
        parallel = {"tp": 2, "attention_dp": 4, "ep": 8, "decode_cp": 2}
        training_model(Scenario.read(training(parallel=parallel), where="t"), seed=0)
    with pytest.raises(BadInput, match=r"search\.decode_cp is of serving"):
        Scenario.read(training(search={"decode_cp": "auto"}), where="t")


def test_a_search_splits_what_tp_repeats_and_only_if_asked() -> None:
    latent, grouped = (load_model(name).attention for name in ("deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B"))
    plain = [(ParallelSpec(tp=8, ep=8), "deepep"), (ParallelSpec(attention_dp=8, ep=8), "deepep")]

    def parts(search: SearchSpec, attention: Any) -> list[int]:
        return [one.decode_cp for one, _ in with_split_contexts(plain, search, attention)]

    assert list(with_split_contexts(plain, SearchSpec(), latent)) == plain
    assert parts(SearchSpec(decode_cp="auto"), latent) == [1, 2, 4, 8, 1]
    assert parts(SearchSpec(decode_cp="auto"), grouped) == [1, 2, 1]
    assert parts(SearchSpec(decode_cp=(4, 4, 3)), grouped) == [1, 4, 1]  # the check says why not


def test_of_roles_the_decode_pool_is_searched_with_split_contexts(tmp_path: Path) -> None:
    searched = {"roles": "auto", "decode_cp": [4], "solvers": ["contiguous"], "redundant_experts": [0]}
    ground = groundwork(load_scenario(write(tmp_path, data(tmp_path, search=searched))))
    pairs = [plan for plan in enumerate_space(ground, ground.scenario).plans if plan.prefill is not None]
    assert {plan.parallel.decode_cp for plan in pairs} == {1, 4}
    assert {plan.prefill.parallel.decode_cp for plan in pairs if plan.prefill is not None} == {1}


def test_a_search_finds_a_split_plan_and_it_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = data(tmp_path, search={"decode_cp": "auto", "solvers": ["contiguous"], "redundant_experts": [0]})
    found["serving"]["workload"] |= {"requests": 40}
    out = tmp_path / "run"
    asked = ["tune", str(write(tmp_path, found)), "--trials", "12", "--out", str(out), "--json", "--workers", "1"]
    assert run(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["parallel"].get("decode_cp", 1) for row in told["trial_list"]} > {1}
    plan = write(tmp_path, data(tmp_path, parallel=TP4 | {"decode_cp": 4}), "split.yaml")
    assert run(["simulate", str(plan), "--json", "--draws", "0", "--explain"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["parallel"]["decode_cp"] == 4
    assert told["step"]["by_operation_s"]["context_collective"] > 0
    assert told["memory"]["ledger"]["split_contexts"] > 0
