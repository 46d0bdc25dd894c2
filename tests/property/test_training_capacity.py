"""Capacity and gates in training: picks are conserved, drops make steps no slower, and rules are what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.training import TrainingModel, simulate_training, training_model
from moesim.errors import MoesimError
from moesim.output.training_metrics import routing_figures, training_json
from moesim.routing.gates.registry import GATES
from tests.training_scenarios import asked

RULES = ("gshard", "switch", "deepspeed", "megatron", "survey")


def modelled(capacity: dict[str, Any], **changes: Any) -> TrainingModel:
    policies = {"capacity": capacity, "dispatch": {"backend": changes.pop("backend", "alltoall")}}
    return training_model(asked(policies=policies, **changes), seed=0)


def step_s(capacity: dict[str, Any], **changes: Any) -> float:
    policies = {"capacity": capacity, "dispatch": {"backend": changes.pop("backend", "alltoall")}}
    return simulate_training(asked(policies=policies, **changes), draws=0).step.step_s


@settings(max_examples=30, deadline=None)
@given(
    rule=st.sampled_from(RULES), hundredths=st.integers(30, 1200), balanced=st.booleans(),
    backup=st.sampled_from([None, "random", "next_best"]),
)  # fmt: skip
def test_routed_is_processed_and_dropped(rule: str, hundredths: int, backup: str | None, balanced: bool) -> None:
    router = {"router": "balanced" if balanced else "trace"}
    pool = modelled({"rule": rule, "factor": hundredths / 100, "backup": backup}, training=router).pool
    flow = pool.flow
    np.testing.assert_allclose(
        (flow.processed + flow.dropped).sum(axis=2), pool.wanted.sum(axis=2), rtol=1e-9, err_msg="routed"
    )
    for part in (flow.processed, flow.dropped, flow.rerouted, flow.padded):
        assert (part >= -1e-9).all()
    np.testing.assert_allclose(pool.counts, flow.processed + flow.padded)


@pytest.mark.parametrize("backend", ["alltoall", "deepep", "allgather_reducescatter"])
def test_dropping_never_slows_a_step(backend: str) -> None:
    dropless = step_s({"rule": "dropless"}, backend=backend)
    times = [step_s({"rule": "megatron", "factor": factor}, backend=backend) for factor in (0.5, 1.0, 2.0, 1e6)]
    assert all(one <= other * (1 + 1e-12) for one, other in zip(times, [*times[1:], dropless], strict=True))
    assert times[0] < dropless
    assert times[-1] == pytest.approx(dropless, rel=1e-12)


def test_padding_costs_and_evens_the_ranks() -> None:
    dropping = {"rule": "megatron", "factor": 1.0}
    assert step_s({**dropping, "pad": True}) > step_s(dropping)
    model = modelled({**dropping, "pad": True})
    loads = model.setup.placement.rank_loads(model.pool.counts)
    assert np.ptp(loads) <= 1e-9 * loads.max()


def test_a_balanced_router_drops_nothing_at_factor_one() -> None:
    pool = modelled({"rule": "megatron", "factor": 1.0}, training={"router": "balanced"}).pool
    assert pool.flow.dropped.sum() == 0


@pytest.mark.parametrize("gate", ["expert_choice", "base"])
def test_a_gate_that_is_even_by_rule_drops_nothing_at_factor_one(gate: str) -> None:
    """Its tokens are even from every rank; only the parts of a token that do not divide are left over."""
    policies = {"gate": gate, "capacity": {"rule": "megatron", "factor": 1.0}, "dispatch": {"backend": "alltoall"}}
    pool = training_model(asked(policies=policies), seed=0).pool
    assert pool.flow.dropped.sum() <= 1e-3 * pool.wanted.sum()


def test_megatrons_capacity_by_hand() -> None:
    """ceil(T k / E f) of each rank's own tokens; on one rank what is over is dropped, whole."""
    alone = {"parallel": {"tp": 1, "pp": 1, "attention_dp": 1, "ep": 1}}
    pool = modelled({"rule": "megatron", "factor": 1.25}, **alone).pool
    tokens, top_k, experts = 1024, 8, 64
    places = math.ceil(tokens * top_k / experts * 1.25)
    np.testing.assert_allclose(pool.counts, np.minimum(pool.wanted, places))


def test_capacity_bounds_the_hottest_ranks_memory() -> None:
    def activations(capacity: dict[str, Any]) -> float:
        return max(stage["activations_experts"] for stage in modelled(capacity).memory.stages)

    assert activations({"rule": "megatron", "factor": 1.0}) < activations({"rule": "dropless"})


@pytest.mark.parametrize("gate", sorted(GATES))
def test_every_gate_trains_or_is_refused_by_name(gate: str) -> None:
    policies = {"gate": gate, "dispatch": {"backend": "alltoall"}}
    if gate in ("soft", "sample", "topology", "group_limited", "device_limited", "two_level"):
        with pytest.raises(MoesimError, match=r"policies\.gate"):
            training_model(asked(policies=policies), seed=0)
        return
    run = simulate_training(asked(policies=policies), draws=0)
    figures = routing_figures(run)
    assert figures["gate"] == gate
    if gate in ("expert_choice", "base", "dense"):
        assert figures["per_step_max_over_mean"] == pytest.approx(1.0, abs=1e-3)
    told = training_json(run)["routing"]
    assert told["dropped_fraction"] == 0
    assert sum(told["utilisation"]["share"]) == pytest.approx(1.0)
