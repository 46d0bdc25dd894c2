"""The fluid of exchanges at once: by hand, and against what no link can be quicker than."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.network.fluid import finish_s
from moesim.network.topology import Topology, build
from moesim.spec.cluster import ClusterSpec, GpuSpec

GPU = GpuSpec(name="a", hbm_bytes=1.0, hbm_bytes_per_s=1.0, flops_per_s={"bf16": 1.0}, multiprocessors=1)


def fabric(nodes: int, each: int = 1, **more: Any) -> Topology:
    """NICs of 100 bytes/s, one for each GPU, all on one switch."""
    given: dict[str, Any] = {"rails": False, "nodes_per_leaf": nodes, "nvlink_bytes_per_s": 1e12} | more
    return build(
        ClusterSpec(
            name="c", gpu=GPU, nodes=nodes, gpus_per_node=each, nic_bytes_per_s=100.0, pcie_bytes_per_s=1e12, **given
        )
    )


def flows(gpus: int, **sizes: float) -> Any:
    """f01=300: 300 bytes from GPU 0 to GPU 1."""
    load = np.zeros((gpus, gpus))
    for name, size in sizes.items():
        load[int(name[1]), int(name[2])] = size
    return load


def test_two_that_share_a_link_share_it_evenly_until_one_is_over() -> None:
    # 50 each until the small one ends after 2 s; then 200 are left at 100.
    assert finish_s(fabric(3), [flows(3, f01=100.0), flows(3, f02=300.0)]) == pytest.approx([2.0, 4.0])
    assert finish_s(fabric(3), [flows(3, f01=100.0, f02=300.0)]) == pytest.approx([4.0])
    assert finish_s(fabric(3), [flows(3, f01=100.0), flows(3, f02=300.0), np.eye(3)])[2] == 0.0


def test_a_flow_that_is_slowed_elsewhere_leaves_its_share_to_others() -> None:
    # Three into GPU 2, a third of its link each; the rest of NIC 0 is for GPU 1: 200 bytes at 66 2/3.
    into = flows(4, f02=100.0, f12=100.0, f32=100.0)
    assert finish_s(fabric(4), [into, flows(4, f01=200.0)]) == pytest.approx([3.0, 3.0])


def test_only_the_flows_on_the_shared_link_are_slowed() -> None:
    # The first exchange has a flow that meets the second, and one that does not.
    first, second = flows(4, f01=100.0, f23=150.0), flows(4, f03=100.0)
    # NIC 0 carries 01 and 03, the link into GPU 3 carries 23 and 03: 50 each. 01 and 03 end after 2 s, 23 has 50 left.
    assert finish_s(fabric(4), [first, second]) == pytest.approx([2.5, 2.0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 2), st.sampled_from([1.0, 2.0]))
def test_never_quicker_than_the_busiest_link_and_an_even_one_is_that(
    seed: int, nodes: int, each: int, over: float
) -> None:
    rng = np.random.default_rng(seed)
    topology = fabric(nodes, each, nodes_per_leaf=1, oversubscription=over)
    gpus = nodes * each
    loads = [rng.integers(0, 5, size=(gpus, gpus)) * 100.0 * (1 - np.eye(gpus)) for _ in range(2)]
    found = finish_s(topology, loads)
    assert found.max() >= float(topology.busiest_s(loads[0] + loads[1])) * (1 - 1e-9)
    for load, seconds in zip(loads, found, strict=True):
        alone = finish_s(topology, [load])[0]
        _, carried = topology.link_loads(load)
        assert float(topology.busiest_s(load)) * (1 - 1e-9) <= alone <= (carried / topology.rates()).sum() + 1e-9
        assert seconds >= float(topology.busiest_s(load)) * (1 - 1e-9)
    even = np.full((gpus, gpus), 700.0) * (1 - np.eye(gpus))
    assert finish_s(topology, [even])[0] == pytest.approx(float(topology.busiest_s(even)))


@pytest.mark.parametrize("load", [np.ones((3, 3)), -np.ones((4, 4)), np.full((4, 4), np.nan)])
def test_what_is_no_exchange_is_refused(load: Any) -> None:
    with pytest.raises(BadInput):
        finish_s(fabric(4), [load])
