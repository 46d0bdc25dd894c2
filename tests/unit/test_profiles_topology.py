"""The matrix of nvidia-smi: what it means, what is refused, the cluster file it goes into, and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moesim.errors import BadInput, MissingPart
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from profiles.cli import app
from profiles.importers.topo import GpuTopology, read_topology
from profiles.importers.topo_cluster import as_json, in_words, layout
from tests.printed_samples import topo

run = CliRunner().invoke
FOUR_PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("tabs", [True, False])
def test_a_node_with_nvswitch_and_shared_nics(tabs: bool) -> None:
    found = read_topology(topo(tabs))
    assert found.gpus == tuple(f"GPU{gpu}" for gpu in range(8))
    assert found.nics == ("mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_bond_0")
    assert found.nvlink_domains == (tuple(range(8)),)
    assert found.links_per_pair == {18: 28}
    assert found.gpu_nic == (0, 0, 1, 1, 2, 2, 3, 3)
    assert found.shared_nics == dict(enumerate(FOUR_PAIRS))
    assert found.far_gpus == ()
    assert [gpus for gpus, nics in found.switches if gpus] == FOUR_PAIRS
    assert found.sockets == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert len(found.cross_socket_pairs) == 16
    assert found.cpu_affinity[5] == "48-95"
    assert layout(found) == {
        "gpu_nic": [0, 0, 1, 1, 2, 2, 3, 3], "gpu_switch": [0, 0, 1, 1, 2, 2, 3, 3], "nic_switch": [0, 1, 2, 3],
        "switch_socket": [0, 0, 1, 1],
    }  # fmt: skip


def test_a_nic_of_its_own_for_each_gpu_and_the_rest_renumbered() -> None:
    found = read_topology(topo(each=1))
    assert found.gpu_nic == tuple(range(8))
    assert found.shared_nics == {}
    # Two NICs on a switch with two GPUs: each GPU gets one, though both are as near (a DGX A100's shape).
    two = grid(["PXB PXB SYS SYS", "PXB PXB SYS SYS", "SYS SYS PXB PXB", "SYS SYS PXB PXB"], "NV12")
    assert two.gpu_nic == (0, 1, 2, 3)
    assert [gpus for gpus, _ in two.switches] == [(0, 1), (2, 3)]
    # GPU1 can only have NIC0, so GPU0 takes the other.
    moved = grid(["PIX PIX", "PIX SYS"], "NV12")
    assert moved.gpu_nic == (1, 0)
    # NICs that no GPU uses do not count: the third NIC is number 0 of the layout.
    last = grid(["SYS SYS PIX", "SYS SYS NODE"], "NV12")
    assert (last.gpu_nic, layout(last)["gpu_nic"]) == ((2, 2), [0, 0])


def grid(nic_rows: list[str], link: str, numa: str = "0") -> GpuTopology:
    """GPUs that all reach each other over `link`, with rows of links to NICs."""
    count, nics = len(nic_rows), len(nic_rows[0].split())
    names = [*(f"GPU{gpu}" for gpu in range(count)), *(f"NIC{nic}" for nic in range(nics))]
    lines = ["\t".join(["", *names, "CPU Affinity", "NUMA Affinity"])]
    for gpu, row in enumerate(nic_rows):
        links = ["X" if gpu == other else link for other in range(count)] + row.split()
        lines.append("\t".join([f"GPU{gpu}", *links, "0-7", numa]))
    return read_topology("\n".join(lines) + "\n")


def test_a_box_without_nvlink() -> None:
    found = read_topology(topo(nvlink="", each=4))
    assert found.nvlink_domains == ()
    assert found.links_per_pair == {0: 28}
    assert found.shared_nics == {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}
    assert [gpus for gpus, _ in found.switches if gpus] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert len(found.cross_socket_pairs) == 16
    words = in_words(found)
    assert "no NVLink: the GPUs meet over PCIe" in words
    assert "share mlx5_0: GPU0, GPU1, GPU2, GPU3" in words


def test_old_drivers_name_the_nics_and_know_no_numa() -> None:
    text = (
        "\tGPU0\tGPU1\tmlx5_0\tmlx5_1\tCPU Affinity\n"
        "GPU0\t X \tNV2\tPIX\tSOC\t0-23,48-71\nGPU1\tNV2\t X \tSOC\tPIX\t24-47,72-95\n"
        "mlx5_0\tPIX\tSOC\t X \tSOC\nmlx5_1\tSOC\tPIX\tSOC\t X \n"
    )
    found = read_topology(text)
    assert found.nics == ("mlx5_0", "mlx5_1")
    assert (found.gpu_nic, found.numa_affinity, found.cpu_affinity[0]) == ((0, 1), ("", ""), "0-23,48-71")
    assert found.sockets == ((0,), (1,))  # by their NICs
    assert found.cross_socket_pairs == ((0, 1),)


def test_what_the_matrix_does_not_tell_is_not_made_up() -> None:
    # A Grace node: every NIC is SYS to every GPU.
    grace = grid(["SYS SYS"] * 4, "NV18")
    assert layout(grace) == {}
    assert grace.far_gpus == (0, 1, 2, 3)
    assert any("by number only" in line for line in in_words(grace))
    alone = read_topology("\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \tN/A\t\t\tN/A\n")
    assert (alone.gpu_nic, alone.pairs, layout(alone)) == ((), (), {})
    assert "no NIC in the matrix: nothing to pair" in in_words(alone)
    hidden = read_topology("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n")
    assert (hidden.sockets, hidden.cross_socket_pairs) == ((), ())
    assert "NUMA nodes: not told" in in_words(hidden)


def test_domains_that_do_not_span_the_node() -> None:
    rows = ["X NV4 SYS SYS", "NV4 X SYS SYS", "SYS SYS X NV2", "SYS SYS NV2 X"]
    text = "        GPU0 GPU1 GPU2 GPU3\n" + "".join(f"GPU{gpu} {row}\n" for gpu, row in enumerate(rows))
    found = read_topology(text)
    assert found.nvlink_domains == ((0, 1), (2, 3))
    assert found.links_per_pair == {4: 1, 2: 1, 0: 4}
    assert "NVLink joins GPU2, GPU3: 2 links a pair" in in_words(found)


GOOD = topo()
ROW = next(line for line in GOOD.splitlines() if line.startswith("GPU3"))


@pytest.mark.parametrize(
    ("old", "new", "said", "line"),
    [
        (ROW, ROW.replace("PIX", "PIZ"), "GPU3 to NIC1 is 'PIZ', which is no link", 5),
        (ROW, ROW.replace("PIX", "NV4"), "which is no link", 5),
        (ROW, ROW.replace("\tX\t", "\tNV18\t"), "GPU3 to GPU3 is 'NV18'", 5),
        (ROW, ROW.replace("NV18", "NV0", 1), "which is no link", 5),
        (ROW, ROW.replace("NV18", "NV12", 1), "GPU3 to GPU0 is NV12, but back NV18", 5),
        (ROW, ROW[:30], "the row of GPU3 has", 5),
        (ROW, "", "GPU3 has a column and no row", 1),
        (ROW, ROW + "\n" + ROW, "GPU3 has two rows", 6),
        ("\tGPU7\tNIC0", "\tNIC0", "the row of GPU0 has", None),
        ("GPU0\tGPU1", "CPU0\tCPU1", "no matrix of GPUs here", None),
    ],
)
def test_a_matrix_that_cannot_be_is_named(old: str, new: str, said: str, line: int | None) -> None:
    assert old in GOOD
    with pytest.raises(BadInput) as error:
        read_topology(GOOD.replace(old, new, 1), "topo.txt")
    if line is not None:
        assert said in error.value.line()
        assert error.value.where == f"topo.txt:{line}"
    else:
        assert error.value.where.startswith("topo.txt")


def saved(folder: Path, text: str = GOOD) -> Path:
    path = folder / "topo.txt"
    path.write_text(text)
    return path


def test_the_command_reads_a_saved_matrix(tmp_path: Path) -> None:
    done = run(app, ["topology", "--from", str(saved(tmp_path))], catch_exceptions=False)
    assert done.stdout.splitlines()[:3] == [
        "8 GPUs, 5 NICs",
        "NVLink joins GPU0, GPU1, GPU2, GPU3, GPU4, GPU5, GPU6, GPU7: 18 links a pair",
        "nearest NIC: GPU0 mlx5_0 (PIX), GPU1 mlx5_0 (PIX), GPU2 mlx5_1 (PIX), GPU3 mlx5_1 (PIX), GPU4 mlx5_2 (PIX), "
        "GPU5 mlx5_2 (PIX), GPU6 mlx5_3 (PIX), GPU7 mlx5_3 (PIX)",
    ]
    told = json.loads(run(app, ["topology", "--from", str(tmp_path / "topo.txt"), "--json"]).stdout)
    assert told["gpu_nic"][5] == {"gpu": "GPU5", "nic": "mlx5_2", "link": "PIX"}
    assert told["shared_nics"]["mlx5_3"] == ["GPU6", "GPU7"]
    assert len(told["cross_socket_pairs"]) == 16
    assert told["node"]["switch_socket"] == [0, 0, 1, 1]
    assert {key: told[key] for key in told if key != "out"} == as_json(read_topology(GOOD))


def test_the_layout_goes_into_a_cluster_file(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    command = ["topology", "--from", str(saved(tmp_path)), "--out", str(out)]
    with pytest.raises(BadInput, match="no cluster file here; give --system PRESET"):
        run(app, command, catch_exceptions=False)
    assert not out.exists()
    run(app, [*command, "--system", "h200_sxm"], catch_exceptions=False)
    cluster = load_cluster(out)
    assert cluster.gpu == load_cluster(ClusterChoice(system="h200_sxm")).gpu
    assert (cluster.gpu_nic, cluster.node.switch_socket) == ((0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 1, 1))
    with pytest.raises(BadInput, match="there is a cluster file already"):
        run(app, [*command, "--system", "h200_sxm"], catch_exceptions=False)
    # A second matrix replaces the first; everything else stays, comments and all.
    mended = out.read_text().replace("nic_bytes_per_s: 5.00e+10", "nic_bytes_per_s: 2.5e+10   # two ports, one cable")
    out.write_text(mended + "rails: false\n")
    saved(tmp_path, topo(each=1))
    run(app, command, catch_exceptions=False)
    text = out.read_text()
    assert text.count("\nnode:") == 1
    assert "# two ports, one cable" in text
    assert load_cluster(out).gpu_nic == tuple(range(8))
    assert yaml.safe_load(text)["rails"] is False
    assert "from topo.txt; NICs from 0: mlx5_0, mlx5_1" in text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gpus_per_node: 8", "gpus_per_node: 4", "gpus_per_node: the matrix has 8 GPUs, the node 4"),
        ("nvlink_bytes_per_s: 4.50e+11", "nvlink_bytes_per_s: 0", "nvlink_bytes_per_s: the matrix shows NVLink"),
        ("name: h200_sxm", "name: [h200_sxm", "not valid YAML"),
        ("multiprocessors: 132", "multiprocessors: -1", "gpu.multiprocessors"),
    ],
)
def test_a_cluster_file_that_does_not_fit_stays_as_it_was(tmp_path: Path, old: str, new: str, said: str) -> None:
    out = tmp_path / "mine.yaml"
    command = ["topology", "--from", str(saved(tmp_path)), "--out", str(out)]
    run(app, [*command, "--system", "h200_sxm"], catch_exceptions=False)
    assert old in out.read_text()
    out.write_text(out.read_text().replace(old, new))
    before = out.read_bytes()
    with pytest.raises(BadInput) as error:
        run(app, command, catch_exceptions=False)
    assert said in error.value.line()
    assert out.read_bytes() == before
    saved(tmp_path, "\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n")
    with pytest.raises(BadInput, match="no more of the NICs than their number"):
        run(app, command, catch_exceptions=False)


def script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_without_the_driver_a_part_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingPart, match="nvidia-smi is not on this machine; run `nvidia-smi topo -m"):
            run(app, ["topology"], catch_exceptions=False)
    script(tmp_path, "echo 'NVIDIA-SMI has failed' >&2; exit 9", monkeypatch)
    with pytest.raises(MissingPart, match=r"nvidia-smi topo -m failed \(NVIDIA-SMI has failed\)"):
        run(app, ["topology"], catch_exceptions=False)


def test_the_driver_is_asked_where_no_matrix_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, f'[ "$*" = "topo -m" ] && cat {saved(tmp_path)}', monkeypatch)
    assert run(app, ["topology"], catch_exceptions=False).stdout.startswith("8 GPUs, 5 NICs\n")
