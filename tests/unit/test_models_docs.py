"""The tables in the reference documentation say what the code says."""

from __future__ import annotations

from pathlib import Path

from moesim.spec.hf import bundled, bundled_model, load_model
from moesim.spec.presets import load_cluster, presets
from moesim.spec.scenario import ClusterChoice
from moesim.units import GIGA, MIB, TERA


def rows(path: Path, names: list[str]) -> dict[str, list[str]]:
    """The table rows whose first cell is one of `names`: name -> the other cells."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] in names:
            found[cells[0]] = cells[1:]
    return found


def test_the_table_of_models(repo: Path) -> None:
    table = rows(repo / "docs" / "reference" / "models.md", bundled())
    assert sorted(table) == bundled()
    for name, cells in table.items():
        model, published = load_model(name), bundled_model(name).published_parameters
        assert published is not None
        assert cells[0] == f"{model.layers} ({model.moe_layers} MoE)"
        assert cells[1] == str(model.hidden)
        assert cells[3].startswith(f"{model.moe.top_k} of {model.moe.experts}")
        assert cells[4] == str(model.moe.intermediate)
        assert cells[5] == f"{model.parameters() / GIGA:.2f}"
        assert float(cells[6]) == published / GIGA
        assert cells[7] == f"{100 * (model.parameters() / published - 1):+.2f} %"
        assert cells[8] == f"{model.kv_bytes_per_token('bf16'):,.0f}"


def test_the_table_of_clusters(repo: Path) -> None:
    table = rows(repo / "docs" / "reference" / "clusters.md", presets())
    assert sorted(table) == presets()
    for name, cells in table.items():
        cluster = load_cluster(ClusterChoice(system=name))
        gpu = cluster.gpu
        assert cells[0] == gpu.name
        assert [float(cell) for cell in cells[1:]] == [
            cluster.gpus_per_node,
            cluster.domain_gpus,
            gpu.hbm_bytes / MIB,
            gpu.hbm_bytes_per_s / TERA,
            gpu.flops_per_s["bf16"] / TERA,
            gpu.flops_per_s.get("fp8", 0.0) / TERA,
            gpu.flops_per_s.get("fp4", 0.0) / TERA,
            gpu.multiprocessors,
            cluster.nvlink_bytes_per_s / GIGA,
            cluster.nic_bytes_per_s / GIGA,
            cluster.pcie_bytes_per_s / GIGA,
        ]
