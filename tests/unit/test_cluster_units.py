"""A figure of a cluster file in another unit is refused by name, with what may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moesim.cli import run
from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.cluster_units import check_units
from moesim.spec.presets import load_cluster, presets
from tests.scenarios import small, write

CLUSTERS = Path(__file__).resolve().parents[2] / "moesim" / "spec" / "clusters"


def changed(folder: Path, key: str, value: float) -> Path:
    data = yaml.safe_load((CLUSTERS / "h200_sxm.yaml").read_text())
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[last] = value
    return write(folder, data, "cluster.yaml")


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_possible_cluster(name: str) -> None:
    load_cluster(CLUSTERS / f"{name}.yaml")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("nic_bytes_per_s", 50, "50 GB/s is 5.0e+10 and 50 Gbit/s is 6.25e+09"),
        ("nic_bytes_per_s", 400, "400 Gbit/s is 5.0e+10"),
        ("nvlink_bytes_per_s", 450, "450 GB/s is 4.5e+11"),
        ("pcie_bytes_per_s", 64000, "64000 MB/s is 6.4e+10"),
        ("nic_latency_s", 5, "give s: 5 us is 5.0e-06"),
        ("nvlink_latency_s", 2000, "2000 ns is 2.0e-06"),
        ("gpu.hbm_bytes", 141, "141 GB is 1.41e+11"),
        ("gpu.hbm_bytes", 143771, "143771 MiB is 1.50755e+11"),
        ("gpu.hbm_bytes_per_s", 4.8, "4.8 TB/s is 4.8e+12"),
        ("gpu.hbm_bytes_per_s", 4800, "4800 GB/s is 4.8e+12"),
        ("gpu.flops_per_s.bf16", 989.4, "989.4 TFLOP/s is 9.894e+14"),
        ("nic_bytes_per_s", 5e19, "give bytes/s"),
    ],
)
def test_a_figure_in_another_unit_is_refused(tmp_path: Path, key: str, value: float, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_cluster(changed(tmp_path, key, value))
    assert f"cluster.yaml: {key}: {value:g}" in caught.value.line()
    assert said in caught.value.line()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nic_bytes_per_s", 1.25e6),  # 10 Mbit/s
        ("nic_bytes_per_s", 1.6e12),
        ("nvlink_bytes_per_s", 0),
        ("nvlink_bytes_per_s", 1e13),
        ("nic_latency_s", 0),
        ("nic_latency_s", 0.1),  # half around the earth
        ("gpu.hbm_bytes", 2e9),
        ("gpu.hbm_bytes_per_s", 1e10),
        ("gpu.flops_per_s.bf16", 1e9),  # one core
        ("gpu.flops_per_s.bf16", 1e18),
        ("gpu.flops_per_s.fp4", 0),
    ],
)
def test_what_is_slow_or_planned_is_read(tmp_path: Path, key: str, value: float) -> None:
    load_cluster(changed(tmp_path, key, value))


def test_specs_that_code_makes_are_not_held_to_it() -> None:
    slow = load_cluster(CLUSTERS / "h200_sxm.yaml").model_dump() | {"nic_bytes_per_s": 50}
    cluster = ClusterSpec.read(slow, where="made")
    with pytest.raises(BadInput, match="not possible"):
        check_units(cluster, where="made")


@pytest.mark.parametrize("command", ["simulate", "doctor"])
def test_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    data = small(cluster=str(changed(tmp_path, "nic_latency_s", 5)))
    assert run([command, str(write(tmp_path, data))]) == 2
    told = capsys.readouterr()
    assert "nic_latency_s: 5 s is not possible (at most 0.5)" in told.err + told.out
