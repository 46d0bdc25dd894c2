"""What CPUs cost a training step: the host's time with a layer, and threads that post an exchange's writes."""

from __future__ import annotations

from typing import Any

import pytest

from moesim.engine.training import simulate_training
from moesim.errors import BadInput
from moesim.network.uniform import visited
from moesim.output.training_metrics import training_json
from tests.training_scenarios import asked

ACROSS = {"tp": 1, "pp": 1, "attention_dp": 16, "ep": 16}
EP_NODES = 2


def step_s(backend: str = "deepep", **host: float) -> float:
    return simulate_training(scenario(backend, **host), draws=0).step.step_s


def scenario(backend: str = "deepep", **host: float) -> Any:
    return asked(
        parallel=ACROSS,
        policies={"dispatch": {"backend": backend}},
        training={"host": host, "router": "balanced", "recompute": "none"},
    )


def test_the_host_adds_its_time_to_every_layer_and_micro_batch() -> None:
    run = simulate_training(scenario(layer_s=3e-3), draws=0)
    layers, micro = run.model.setup.model.layers, run.model.setup.micro_batches
    assert run.step.step_s - step_s() == pytest.approx(3e-3 * layers * micro, rel=1e-9)
    found = training_json(run)
    assert found["step"]["by_operation_s"]["engine_overhead"] == pytest.approx(3e-3 * layers * micro, rel=1e-9)
    assert found["provenance"]["assumed"] > 0


def test_posted_exchanges_take_their_own_time_and_that_of_the_rows_that_leave() -> None:
    run = simulate_training(scenario(), draws=0)
    setup = run.model.setup
    layers, micro = setup.model.moe_layers, setup.micro_batches
    each = step_s(exchange_s=1e-4) - run.step.step_s
    assert each == pytest.approx(4e-4 * layers * micro, rel=1e-9)  # dispatch and combine, forward and backward
    copies = visited(EP_NODES, setup.model.moe.experts, setup.model.moe.top_k) * (EP_NODES - 1) / EP_NODES
    rows = step_s(dispatch_row_s=1e-7, combine_row_s=2e-7) - run.step.step_s
    # The balanced exchange that is as busy: all ranks alike here, so that it is the rank's own tokens.
    assert rows == pytest.approx(2 * 3e-7 * copies * setup.local_rows * layers * micro, rel=1e-2)


def test_nothing_is_posted_inside_a_node_or_by_another_backend() -> None:
    inside = {"tp": 1, "pp": 2, "attention_dp": 8, "ep": 8}
    one, other = (
        simulate_training(asked(parallel=inside, policies={"dispatch": {"backend": "deepep"}}, training=own), draws=0)
        for own in ({}, {"host": {"exchange_s": 1.0}})
    )
    assert one.step.step_s == other.step.step_s
    with pytest.raises(BadInput, match=r"training\.host: CPU threads post the writes of deepep, not of alltoall"):
        step_s("alltoall", exchange_s=1e-4)
