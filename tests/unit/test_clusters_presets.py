"""Cluster presets and cluster files."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.presets import load_cluster, presets
from moesim.spec.scenario import ClusterChoice

NAMES = [
    "a100_sxm",
    "b200_sxm",
    "b300_sxm",
    "gb200_nvl72",
    "gb300_nvl72",
    "h100_sxm",
    "h20",
    "h200_sxm",
    "h800",
    "p5_48xlarge",
    "p6_b300_48xlarge",
]
FILE = """
name: mine
gpu: {name: X, hbm_bytes: 1.0e+11, hbm_bytes_per_s: 3.0e+12, flops_per_s: {bf16: 5.0e+14}, multiprocessors: 100}
nodes: 2
gpus_per_node: 4
nvlink_bytes_per_s: 2.0e+11
nic_bytes_per_s: 5.0e+10
pcie_bytes_per_s: 6.0e+10
"""


def test_names() -> None:
    assert presets() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name: str) -> None:
    cluster = load_cluster(ClusterChoice(system=name))
    assert cluster.name == name
    needed = {f"gpu.{field}" for field in ("hbm_bytes", "hbm_bytes_per_s", "flops_per_s", "multiprocessors")}
    needed |= {"gpus_per_node", "nvlink_bytes_per_s", "nic_bytes_per_s", "pcie_bytes_per_s"}
    needed |= {"nvlink_latency_s", "nic_latency_s"}
    assert needed <= set(cluster.sources)
    assert all(text.strip() for text in cluster.sources.values())


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_plausible(name: str) -> None:
    # A slip of a unit (bits for bytes, GB for GiB, a sparse peak) leaves one of these ranges.
    cluster = load_cluster(ClusterChoice(system=name))
    gpu = cluster.gpu
    assert 60e9 < gpu.hbm_bytes < 300e9
    assert 1e12 < gpu.hbm_bytes_per_s < 10e12
    assert 100e12 < gpu.flops_per_s["bf16"] <= 2500e12
    assert gpu.flops_per_s.get("fp8", 2 * gpu.flops_per_s["bf16"]) == pytest.approx(
        2 * gpu.flops_per_s["bf16"], rel=1e-3
    )
    assert cluster.nic_bytes_per_s < cluster.nvlink_bytes_per_s < gpu.hbm_bytes_per_s


def test_a_preset_takes_the_chosen_size() -> None:
    cluster = load_cluster(ClusterChoice(system="H200_SXM", nodes=4))
    assert (cluster.nodes, cluster.gpus, cluster.domain_gpus) == (4, 32, 8)
    assert load_cluster(ClusterChoice(system="h200_sxm", gpus_per_node=2)).gpus == 2


def test_nvl72_is_one_nvlink_domain_of_many_nodes() -> None:
    cluster = load_cluster(ClusterChoice(system="gb200_nvl72", nodes=18))
    assert (cluster.gpus, cluster.gpus_per_node, cluster.domain_gpus) == (72, 4, 72)


def test_unknown_preset_lists_the_names() -> None:
    with pytest.raises(
        BadInput, match=r"unknown cluster preset 'h200'.*did you mean h200_sxm\? use one of a100_sxm.*h800"
    ):
        load_cluster(ClusterChoice(system="h200"))


def test_a_node_holds_no_more_gpus_than_it_has_places() -> None:
    with pytest.raises(BadInput, match="carries 8 GPUs, not 16"):
        load_cluster(ClusterChoice(system="h200_sxm", gpus_per_node=16))


def test_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    cluster = load_cluster(path)
    assert isinstance(cluster, ClusterSpec)
    assert cluster.gpus == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("nic_bytes_per_s: 5.0e+10\n", ""), "nic_bytes_per_s: this key is missing"),
        (FILE + "nick: 1\n", "nick: unknown key"),
        (FILE.replace("bf16", "fp8"), "bf16 peak is missing"),
        (FILE.replace("nodes: 2", "nodes: 0"), "nodes: .*greater than 0"),
        ("- 1\n", "mapping of keys"),
        ("a: [1\n", "not valid YAML"),
        ("&a [*a]\n", "mapping of keys"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        load_cluster(path)
    assert "mine.yaml" in caught.value.line()


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the cluster file"):
        load_cluster(tmp_path / "none.yaml")


LAYOUT = {
    "gpu_nic": [0, 0, 1, 1, 2, 2, 3, 3],
    "gpu_switch": [0, 0, 1, 1, 2, 2, 3, 3],
    "nic_switch": [0, 1, 2, 3],
    "switch_socket": [0, 0, 1, 1],
}


def cluster_with(**changes: object) -> ClusterSpec:
    base = load_cluster(ClusterChoice(system="h200_sxm")).model_dump(mode="json")
    return ClusterSpec.read({**base, **changes}, where="c.yaml")


def test_nics_that_gpus_share() -> None:
    own = cluster_with()
    assert (own.gpu_nic, own.nics_per_node, own.shared_nic_bytes_per_s) == (tuple(range(8)), 8, own.nic_bytes_per_s)
    shared = cluster_with(node=LAYOUT)
    assert (shared.nics_per_node, shared.shared_nic_bytes_per_s) == (4, own.nic_bytes_per_s / 2)


def test_a_node_without_nvlink_meets_over_pcie() -> None:
    box = cluster_with(nvlink_bytes_per_s=0, pcie_latency_s=7e-6)
    assert (box.near_bytes_per_s, box.near_latency_s) == (box.pcie_bytes_per_s, 7e-6)
    assert box.domain_gpus == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"node": {"gpu_nic": [0, 1]}}, "lists 2 GPUs of 8"),
        ({"node": {**LAYOUT, "gpu_nic": [0, 0, 1, 1, 2, 2, 3, 4]}}, "names a NIC that nic_switch, a list of 4, lacks"),
        ({"node": {**LAYOUT, "gpu_nic": []}}, "lists 4 NICs of 8"),
        ({"node": {**LAYOUT, "switch_socket": [0]}}, "names 1 of 4 switches"),
        ({"node": {**LAYOUT, "nic_switch": []}}, "go together"),
        ({"node": {"gpu_nic": [0, 0, 0, 0, 0, 0, 0, -1]}}, "count from 0"),
        ({"nvlink_bytes_per_s": 0, "nvlink_domain_gpus": 8}, "without NVLink"),
        ({"oversubscription": 0.5}, "oversubscription"),
        ({"measured": {"nic_speed": {"rel_sigma": 0.1, "points": 3}}}, "measured"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        cluster_with(**changes)
