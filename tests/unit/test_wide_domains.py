"""NVLink domains of several nodes (NVL72): what stays inside one of them never pays for a NIC."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cost.ops import Collective, MoeExchange
from moesim.cost.roofline import Roofline
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import price_light_steps
from moesim.engine.training import simulate_training
from moesim.errors import BadInput
from moesim.network.exchange import prepare
from moesim.network.rank_groups import RankGrid
from moesim.spec.cluster import ClusterSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, load_scenario
from tests.costs_cluster import h200
from tests.scenarios import small, write
from tests.training_scenarios import asked

SIZE = np.array([1e6, 1e8])


def rack(nodes: int = 18) -> ClusterSpec:
    """GB200 NVL72: nodes of four GPUs, 18 of them in one domain."""
    return load_cluster(ClusterChoice(system="gb200_nvl72", nodes=nodes))


def without_a_nic(cluster: ClusterSpec) -> ClusterSpec:
    """The same with NICs of a modem: whatever uses one takes for ever."""
    return cluster.model_copy(update={"nic_bytes_per_s": 2e6, "nic_latency_s": 0.5})


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize(("gpus", "nodes"), [(8, 2), (32, 8), (72, 18)])
def test_a_collective_inside_the_rack_uses_no_nic(kind: Any, gpus: int, nodes: int) -> None:
    op = Collective(kind, SIZE, gpus, nodes)
    told, blocked = (Roofline(one).seconds(op) for one in (rack(), without_a_nic(rack())))
    np.testing.assert_array_equal(told, blocked)
    assert (Roofline(without_a_nic(h200(nodes))).seconds(op) > 0.5).all()


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_an_exchange_inside_the_rack_uses_no_nic(mode: Any) -> None:
    op = MoeExchange("dispatch", mode, np.array([64.0, 4096.0]), 7168, 8, 256, 32, 8, "fp8")
    told, blocked = (Roofline(one).seconds(op) for one in (rack(), without_a_nic(rack())))
    np.testing.assert_array_equal(told, blocked)
    across = replace(op, ep=144, nodes=36)
    assert (Roofline(without_a_nic(rack(36))).seconds(across) > 0.5).all()


def test_two_racks_are_two_domains() -> None:
    """Half of what a rank of an all-to-all sends leaves its rack, over its NIC."""
    two = Collective("all_to_all", np.array([1e9]), 144, 36)
    assert Roofline(rack(36)).seconds(two)[0] == pytest.approx(0.5e9 / (0.9 * 50e9), rel=0.01)


def test_ranks_far_apart_are_in_as_many_domains_as_they_say() -> None:
    near, far = (Collective("all_reduce", np.array([1e9]), 2, 2, domains) for domains in (0, 2))
    priced = [Roofline(without_a_nic(rack(36))).seconds(op)[0] for op in (near, far)]
    assert priced[0] < 0.1 and priced[1] > 1.0


@pytest.mark.parametrize(("nodes", "domains"), [(1, 1), (2, 1), (18, 1), (19, 2), (36, 2)])
def test_neighbouring_nodes_share_a_domain(nodes: int, domains: int) -> None:
    assert rack(36).domains_of(nodes) == domains
    assert h200(36).domains_of(nodes) == nodes


def test_groups_of_a_training_plan_span_racks() -> None:
    """144 GPUs, TP 4, 36 ways of data parallelism: experts of one instance in a rack, gradients between the two."""
    plan = ParallelSpec(tp=4, attention_dp=18, ep=72)
    grid = RankGrid(plan, 2, 4, 72)
    assert (grid.nodes("ep"), grid.domains("ep"), grid.domains("dp_cp"), grid.domains("expert_dp")) == (18, 1, 2, 2)
    assert grid.spread("expert_dp") == {"gpus": 2, "nodes": 2, "domains": 2}
    assert RankGrid(plan, 2, 4).spread("ep") == {"gpus": 72, "nodes": 18, "domains": 0}


def test_a_plan_that_does_not_fill_its_racks_is_refused_by_name() -> None:
    """DeepEP's normal mode sends to the sender's own place in each domain: 80 GPUs are one rack and eight more."""
    with pytest.raises(BadInput, match="80 GPUs do not fill NVLink domains of 72"):
        prepare(rack(20), "deepep_normal")
    prepare(rack(36), "deepep_normal")
    prepare(rack(4), "deepep_normal")


def file_of(folder: Path, cluster: ClusterSpec) -> str:
    """A cluster as a file; its name tells how fast its NICs are."""
    path = folder / f"{cluster.nic_bytes_per_s:.0f}.yaml"
    path.write_text(yaml.safe_dump(cluster.model_dump(mode="json")))
    return str(path)


@pytest.mark.parametrize("backend", ["deepep", "allgather_reducescatter", "alltoall"])
def test_a_plan_served_inside_the_rack_uses_no_nic(tmp_path: Path, backend: str) -> None:
    """32 GPUs on 8 nodes; each of its steps takes as long where no byte could pass a NIC, under each exchange."""

    def steps(cluster: ClusterSpec) -> dict[str, float]:
        data = small(
            cluster=file_of(tmp_path, cluster),
            parallel={"attention_dp": 32, "ep": 32},
            placement={"solver": "contiguous"},
            policies={"dispatch": {"backend": backend}},
        )
        deployment = resolve(groundwork(load_scenario(write(tmp_path, data))))
        assert (deployment.setup.nodes, deployment.setup.domains) == (8, 1)
        priced = price_light_steps(deployment)
        return {kind: float(one.dispatch.seconds().sum() + one.combine.seconds().sum()) for kind, one in priced.items()}

    told = steps(rack(8))
    assert min(told.values()) > 0.0
    assert steps(without_a_nic(rack(8))) == told


def test_a_plan_trained_inside_the_rack_uses_no_nic(tmp_path: Path) -> None:
    """Experts, stages and gradients over 4 nodes."""

    def step_s(cluster: ClusterSpec) -> float:
        return simulate_training(asked(cluster=file_of(tmp_path, cluster)), draws=0).step.step_s

    assert step_s(rack(4)) == step_s(without_a_nic(rack(4)))
    far = {"nvlink_domain_gpus": 4}  # the same nodes, each its own domain
    assert step_s(without_a_nic(rack(4).model_copy(update=far))) > 10 * step_s(rack(4))
