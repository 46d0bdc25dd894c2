"""What a schedule or a storage cannot go together with is refused by name before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.engine.deployment import check_plan, groundwork, resolve
from moesim.errors import BadInput, Infeasible
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

CACHE = {"experts_per_layer": 4}
NO_REPLICAS = {"placement": {"solver": "contiguous"}}


def check(folder: Path, policies: dict[str, Any], **changes: Any) -> None:
    ground = groundwork(load_scenario(write(folder, small(policies=policies, **changes))))
    check_plan(ground, ground.scenario)


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ({"overlap": {"chunks": 4}}, "sequential has no chunks"),
        ({"schedule": "pipeline", "overlap": {"chunks": 1}}, "a pipeline of 1 chunks"),
        ({"schedule": "pipeline", "overlap": {"chunks": 17}}, "a pipeline of 17 chunks"),
        ({"storage": "cached"}, "expert_cache and storage cached go together.*how many experts stay"),
        ({"expert_cache": CACHE}, "expert_cache and storage cached go together.*leave it out"),
        ({"schedule": "forward_backward"}, "serving has none"),
        ({"overlap": {"slowdown": {"compute": 0.5}}}, "greater than or equal to 1"),
        ({"schedule": "whole"}, "policies.schedule"),
    ],
)
def test_keys_that_make_no_sense(tmp_path: Path, policies: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check(tmp_path, policies)


ALLREDUCE = {"dispatch": {"backend": "allreduce"}}
TP = {"parallel": {"tp": 8, "ep": 8}}


@pytest.mark.parametrize(
    ("policies", "changes", "reason"),
    [
        ({"schedule": "pipeline", **ALLREDUCE}, TP, "schedule_needs_exchange"),
        ({"schedule": "shortcut", **ALLREDUCE}, TP, "schedule_needs_exchange"),
        ({"schedule": "shared_overlap"}, {}, "no_shared_expert"),
        ({"schedule": "pipeline", "overlap": {"chunks": 4}}, {}, "low_latency_limit"),
        (
            {"overlap": {"slowdown": "multiprocessors"}, "dispatch": {"backend": "alltoall"}},
            {},
            "overlap_not_known",
        ),
        ({"overlap": {"slowdown": "measured"}}, {}, "overlap_not_measured"),
        ({"schedule": "whole_graph"}, {}, "nothing_captured"),
        ({"schedule": "whole_graph", "dispatch": {"mode": "normal"}}, {"engine": {"name": "vllm"}}, "nothing_captured"),
        ({"schedule": "whole_graph", "storage": "pregated"}, {"engine": {"name": "vllm"}}, "nothing_captured"),
        ({"schedule": "two_batch", "storage": "offload"}, {}, "storage_with_two_batch"),
        ({"storage": "pregated"}, {}, "storage_with_replicas"),
        ({"storage": "cached", "expert_cache": CACHE}, {}, "storage_with_replicas"),
    ],
)
def test_combinations_that_cannot_run(
    tmp_path: Path, policies: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Infeasible) as refused:
        check(tmp_path, policies, **changes)
    assert refused.value.reason == reason
    assert "policies." in str(refused.value)


def test_whole_graph_without_captured_sizes(tmp_path: Path) -> None:
    data = small(policies={"schedule": "whole_graph"}, engine={"name": "vllm"})
    data["serving"]["batching"]["cuda_graph_sizes"] = "none"
    with pytest.raises(Infeasible, match="cuda_graph_sizes is none"):
        groundwork_checked = groundwork(load_scenario(write(tmp_path, data)))
        check_plan(groundwork_checked, groundwork_checked.scenario)


@pytest.mark.parametrize(
    ("policies", "changes"),
    [
        ({"schedule": "pipeline", "overlap": {"chunks": 4}, "dispatch": {"mode": "normal"}}, {}),
        ({"schedule": "pipeline", "overlap": {"chunks": 2}}, {}),
        ({"schedule": "whole_graph"}, {"engine": {"name": "vllm"}}),
        ({"schedule": "shortcut", "storage": "pregated"}, NO_REPLICAS),
        ({"schedule": "pipeline", "storage": "cached", "expert_cache": CACHE}, NO_REPLICAS),
        ({"storage": "offload"}, {}),
    ],
)
def test_combinations_that_can(tmp_path: Path, policies: dict[str, Any], changes: dict[str, Any]) -> None:
    check(tmp_path, policies, **changes)


def test_a_gpu_holds_less_under_every_storage_but_resident(tmp_path: Path) -> None:
    def ledger(policies: dict[str, Any]) -> dict[str, float]:
        ground = groundwork(load_scenario(write(tmp_path, small(policies=policies, **NO_REPLICAS))))
        return resolve(ground).memory.items

    resident = ledger({})
    model_layers = 16  # OLMoE's, all of them MoE layers of 8 slots a rank
    whole = resident["weights_experts"]
    for policies, weights, staging in (
        ({"storage": "offload"}, 0.0, 2 / model_layers),
        ({"storage": "pregated"}, 0.0, 2 / model_layers),
        ({"storage": "cached", "expert_cache": CACHE}, 4 / 8, 1 / model_layers),
        ({"storage": "cached", "expert_cache": {"experts_per_layer": 99}}, 1.0, 1 / model_layers),
    ):
        found = ledger(policies)
        assert found.get("weights_experts", 0.0) == pytest.approx(weights * whole)
        assert found["expert_staging"] == pytest.approx(staging * whole)
        others = ("weights_attention", "activations", "runtime")
        assert all(found[name] == resident[name] for name in others)
        freed = found["kv_cache"] - resident["kv_cache"]
        assert freed == pytest.approx((1 - weights - staging) * whole)
