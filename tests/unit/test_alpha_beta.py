"""Alpha and beta from collectives: known ones found again, by level; a cluster file that says they were measured."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.cost.estimate import Tag
from moesim.errors import BadInput
from moesim.network.exchange import prepare
from moesim.spec.presets import load_cluster
from profiles.alpha_beta import Group, fit_levels, level_of, measured_cluster
from profiles.record import FAMILIES
from profiles.store import empty, write_profile
from tests.costs_cluster import h200

SIZES = np.geomspace(1e3, 2.6e8, 12)
LAUNCH_S, FILL_S = 5e-6, 3e-6


def group(kind: str, gpus: int, nodes: int, alpha: float, beta: float, messages: float, share: float) -> Group:
    """A collective that follows the formula; `messages` and `share` are worked out by hand in the tests."""
    moving = SIZES * share / beta
    seconds = LAUNCH_S + alpha * messages + moving + 2 * np.sqrt(FILL_S * moving)
    return Group(kind, gpus, nodes, "nccl", "2", SIZES, seconds)


def inside() -> list[Group]:
    """One microsecond and 350 GB/s over NVLink."""
    found = []
    for gpus in (2, 4, 8):
        part = (gpus - 1) / gpus
        found += [group(kind, gpus, 1, 1e-6, 350e9, gpus - 1, part) for kind in ("all_gather", "reduce_scatter")]
        found.append(group("all_reduce", gpus, 1, 1e-6, 350e9, 2 * (gpus - 1), 2 * part))
        found.append(group("all_to_all", gpus, 1, 1e-6, 350e9, 1, part))
    return found


def across() -> list[Group]:
    """Eight microseconds and 45 GB/s between nodes of 8: rings leave over 8 NICs, an all-to-all over its own."""
    found = [group("send_recv", 16, 2, 8e-6, 45e9, 1, 1.0)]
    for nodes in (2, 4):
        part = (8 * nodes - 1) / (8 * nodes)
        found.append(group("all_gather", 8 * nodes, nodes, 8e-6, 45e9, nodes - 1, part / 8))
        found.append(group("all_reduce", 8 * nodes, nodes, 8e-6, 45e9, 2 * (nodes - 1), 2 * part / 8))
        found.append(group("all_to_all", 8 * nodes, nodes, 8e-6, 45e9, 1, (nodes - 1) / nodes))
    return found


def test_known_figures_are_found_again_level_by_level() -> None:
    near, far = fit_levels([*inside(), *across()], h200(4))
    assert (near.level, far.level) == ("nvlink", "nic")
    assert (near.latency_s, near.bytes_per_s) == pytest.approx((1e-6, 350e9), rel=1e-3)
    assert (far.latency_s, far.bytes_per_s) == pytest.approx((8e-6, 45e9), rel=1e-3)
    assert (near.launch_s, near.fill_s) == pytest.approx((LAUNCH_S, FILL_S), rel=1e-2)
    assert np.abs(near.residuals).max() < 1e-3 and max(near.sigma) < 1e-2
    assert len(near.left_out) == len(near.residuals) == 12 * len(SIZES)


def test_noise_shows_in_the_error_bar() -> None:
    generator = np.random.default_rng(1)
    noisy = [
        dataclasses.replace(one, seconds=one.seconds * np.exp(generator.normal(0, 0.2, len(SIZES)))) for one in inside()
    ]
    (found,) = fit_levels(noisy, h200(1))
    assert 0.005 < found.sigma[2] < 0.2
    assert abs(np.log(found.bytes_per_s / 350e9)) < 3 * found.sigma[2]
    assert np.median(np.abs(found.left_out)) == pytest.approx(0.13, abs=0.05)  # of a normal of 0.2


def test_levels() -> None:
    rack = load_cluster(Path("moesim/spec/clusters/gb200_nvl72.yaml"))
    one = inside()[0]
    assert level_of(one, h200(1)) == "nvlink"
    assert level_of(one, h200(1).model_copy(update={"nvlink_bytes_per_s": 0.0})) == "pcie"
    two_nodes = across()[0]
    assert level_of(two_nodes, h200(2)) == "nic"
    assert level_of(two_nodes, rack) == "nvlink"  # nodes of one NVLink domain
    assert level_of(Group("all_gather", 2, 1, "gloo", "2", SIZES, SIZES), h200(1)) == "loopback"


def test_one_kind_of_messages_cannot_tell_launch_from_latency() -> None:
    (found,) = fit_levels([one for one in inside() if one.kind == "all_to_all"], h200(1))
    assert not found.apart and found.launch_s == 0.0
    assert found.latency_s == pytest.approx(LAUNCH_S + 1e-6, rel=0.01)


def test_what_was_fitted_is_marked_as_measured() -> None:
    base = h200(2)
    cluster = measured_cluster(base, fit_levels([*inside(), *across()], base), "here")
    assert cluster.nic_bytes_per_s == pytest.approx(45e9, rel=1e-3)
    assert cluster.measured["nic_latency_s"].source == cluster.sources["nic_latency_s"] == "here"
    assert "pcie_bytes_per_s" not in cluster.measured
    pairs = np.zeros((16, 16))
    pairs[0, 8] = 1e6
    assert prepare(cluster, "flat").time(pairs).tag == Tag.FORMULA
    assert prepare(base, "flat").time(pairs).tag == Tag.ASSUMED


def test_a_latency_that_holds_the_launch_is_no_figure_of_the_cluster() -> None:
    """DeepEP launches otherwise than NCCL: its formula on such a latency would be surer and wrong."""
    base = h200(2)
    groups = [one for one in across() if one.kind == "all_to_all"]
    (found,) = fit_levels(groups, base)
    assert not found.apart and found.latency_s > 2 * base.nic_latency_s
    cluster = measured_cluster(base, [found], "here")
    assert cluster.nic_latency_s == base.nic_latency_s
    assert set(cluster.measured) == {"nic_bytes_per_s"}
    pairs = np.zeros((16, 16))
    pairs[0, 8] = 1e6
    assert prepare(cluster, "flat").time(pairs).tag == Tag.ASSUMED


def test_the_command_says_which_latency_it_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = profile_of(tmp_path / "p", [one for one in across() if one.kind == "all_to_all"])
    out = tmp_path / "ours.yaml"
    assert run(["profile", "fit-network", str(folder), "--nodes", "2", "--out", str(out)]) == 0
    assert "is no link's, so nic_latency_s stays 5e-06 s" in capsys.readouterr().err
    assert load_cluster(out).nic_latency_s == 5e-6


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="only 0 points"):
        fit_levels([], h200(1))
    loop = [Group("all_gather", gpus, 1, "gloo", "2", SIZES, SIZES * 1e-9 + 1e-4) for gpus in (2, 4)]
    with pytest.raises(BadInput, match="no link of a cluster"):
        measured_cluster(h200(1), fit_levels(loop, h200(1)), "here")


def profile_of(folder: Path, groups: list[Group]) -> Path:
    import polars as pl

    rows = [
        {
            "kind": one.kind, "path": one.path, "gpus": one.gpus, "nodes": one.nodes, "bytes": size,
            "latency_s": seconds, "system": "ours", "engine": "moesim", "version": "2.27", "kernel": "NCCL",
            "device": "NVIDIA H200", "package": "moesim", "package_version": "0", "tag": "measured",
        }
        for one in groups
        for size, seconds in zip(one.bytes.tolist(), one.seconds.tolist(), strict=True)
    ]  # fmt: skip
    schema = empty(FAMILIES["collective"]).schema
    write_profile(folder, {"collective": pl.DataFrame(rows, schema=schema)}, {"system": "ours", "engine": "moesim"})
    return folder


def test_the_command_writes_a_cluster_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = profile_of(tmp_path / "ours", [*inside(), *across()]), tmp_path / "c.yaml"
    asked = ["profile", "fit-network", str(folder), "--nodes", "4", "--out", str(out)]
    assert run(asked) == 0
    said = capsys.readouterr()
    told = said.out
    assert said.err == ""
    assert "nic: launch 5" in told and "45 GB/s" in told and f"wrote {out}" in told
    cluster = load_cluster(out)
    assert (cluster.nodes, cluster.gpus) == (4, 32)
    assert cluster.measured["nvlink_bytes_per_s"].points == 144
    assert "profile ours (versions 2.27)" in cluster.sources["nvlink_latency_s"]
    again = tmp_path / "again.yaml"  # from the file it wrote
    assert run(["profile", "fit-network", str(folder), "--cluster", str(out), "--out", str(again), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [level["level"] for level in found["levels"]] == ["nvlink", "nic"]
    assert load_cluster(again).nic_bytes_per_s == cluster.nic_bytes_per_s
    assert load_cluster(again).measured.keys() == cluster.measured.keys()
    assert run(["profile", "fit-network", str(folder), "--system", "h100_sxm"]) == 0
    assert "note: measured on NVIDIA H200, and h100_sxm has NVIDIA H100 80GB HBM3" in capsys.readouterr().err
    assert run(["profile", "fit-network", str(folder), "--path", "gloo"]) == 2
    assert "no collectives over gloo" in capsys.readouterr().err


def test_the_shipped_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    """NCCL on 2, 4 and 8 H200: recorded medians are 8.3 % of all points, 9.5 % of groups that were left out."""
    assert run(["profile", "fit-network", "--json"]) == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["level"] == "nvlink" and level["groups"] == 12
    assert level["error"]["median"] < 0.083 * 1.2 and level["left_out_error"]["median"] < 0.095 * 1.2
    # What nccl-tests reach over NVLink with large buffers: 370 GB/s (roofline.NVLINK_FRACTION's source).
    assert level["bytes_per_s"] == pytest.approx(360e9, rel=0.1)


@pytest.mark.data
def test_published_rows_over_several_nodes(shared_data: Path) -> None:
    """An all-to-all of 64 MiB over 4 nodes tells that over 8 within 5 %: the rate of a NIC is what they share."""
    rows = [
        row
        for row in csv.DictReader((shared_data / "published" / "nccl_alltoall.csv").read_text().splitlines())
        if row["src"].startswith("awslabs") and row["size_bytes"] == "67108864"
    ]
    measured, modelled = {}, {}
    for row in rows:
        gpus, nodes, size = int(row["ranks"]), int(row["nodes"]), float(row["size_bytes"])
        measured[nodes] = size * (gpus - 1) / gpus / (float(row["busbw_GBps"]) * 1e9)
        cluster = h200(nodes).model_copy(update={"nic_latency_s": 0.0})
        modelled[nodes] = float(prepare(cluster, "flat").time(np.full((gpus, gpus), size / gpus)).seconds)
    predicted = measured[4] * modelled[8] / modelled[4]
    assert predicted == pytest.approx(measured[8], rel=0.05)
    assert measured[4] != pytest.approx(measured[8], rel=0.1)  # as if their bus bandwidths were one
