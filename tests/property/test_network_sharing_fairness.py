"""What makes rates max-min fair: nothing over capacity, and every flow has its demand or a bottleneck of its own."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network.sharing import max_min


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 6))
def test_feasible_and_every_flow_is_held_back_by_something_of_its_own(seed, flows, links):
    rng = np.random.default_rng(seed)
    usage = rng.uniform(0.1, 2.0, (flows, links)) * (rng.random((flows, links)) < 0.5)
    usage[np.arange(flows), rng.integers(0, links, flows)] = 1.0
    demand = np.where(rng.random(flows) < 0.5, np.inf, rng.uniform(0.0, 1.0, flows))
    capacity = rng.uniform(0.1, 3.0, links)
    rates = max_min(demand, usage, capacity)

    load = rates @ usage
    assert (load <= capacity * (1 + 1e-9)).all()
    assert (rates <= demand).all() and (rates >= 0).all()
    full = load >= capacity * (1 - 1e-9)
    for flow in range(flows):
        if rates[flow] >= demand[flow] * (1 - 1e-9):
            continue
        # Bertsekas and Gallager: a full link on which no other flow is faster. It also makes the rates Pareto optimal.
        crossed = (usage[flow] > 0) & full
        fastest = np.array([rates[usage[:, link] > 0].max(initial=0.0) for link in range(links)])
        assert (crossed & (fastest <= rates[flow] * (1 + 1e-9))).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_flows_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    usage = (rng.random((8, 4)) < 0.5) * 1.0
    demand, capacity, order = rng.uniform(0, 1, 8), rng.uniform(0.1, 2, 4), rng.permutation(8)
    np.testing.assert_allclose(
        max_min(demand[order], usage[order], capacity), max_min(demand, usage, capacity)[order], rtol=1e-9
    )
