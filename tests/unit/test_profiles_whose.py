"""A profile prices the GPU that it was measured on, and no other without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.presets import load_cluster, presets
from moesim.spec.scenario import ClusterChoice
from profiles.cli import app
from profiles.store import DATA, DESCRIPTION, Profile, open_profile, write_profile
from profiles.whose import asked_system, chip, contradict, gpu_of_system, notes_on, open_for, preset_with, shipped_for

LOG = """\
# nThread 1 nGpus 2 minBytes 65536 maxBytes 1048576 step: 16(factor) warmup iters: 1 iters: 20 agg iters: 1
#  Rank  0 Group  0 Pid   4000 on     node-a device  0 [0000:10:00] NVIDIA H200
#  Rank  1 Group  0 Pid   4000 on     node-a device  1 [0000:11:00] NVIDIA H200
       65536         16384     float    none      -1    28.12    2.33    1.17       0    28.68    2.28    1.14     N/A
     1048576        262144     float    none      -1    74.93   13.99    7.00       0    76.43   13.72    6.86     N/A
"""


def cluster(system: str, **changed: object) -> ClusterSpec:
    return load_cluster(ClusterChoice(system=system)).model_copy(update=changed)


def profile(tmp_path: Path, device: str, system: str) -> str:
    """The shipped collectives, as if measured on another device."""
    import polars as pl

    table = Profile(DATA / "h200_sxm").table("collective").head(40).with_columns(pl.lit(device).alias("device"))
    write_profile(tmp_path / "p", {"collective": table}, {"system": system}, level=1)
    return str(tmp_path / "p")


@pytest.mark.parametrize(
    ("device", "word"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GB200", "GB200"), ("NVIDIA GH200 480GB", "GH200"), ("Tesla V100-SXM2-16GB", "V100"),
        ("AMD Instinct MI300X", "MI300X"), ("H800", "H800"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GEFORCE RTX 4090"), ("Intel(R) Xeon(R) Platinum 8480C", ""),
        ("AMD EPYC 7B13", ""), ("unknown", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_chip_of_a_device(device: str, word: str) -> None:
    assert chip(device) == word


def test_what_contradicts() -> None:
    assert contradict("NVIDIA H100 80GB HBM3", "NVIDIA H200") and contradict("NVIDIA GeForce RTX 4090", "NVIDIA H200")
    assert not contradict("NVIDIA H100", "NVIDIA H100 80GB HBM3")
    assert not contradict("NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 6000")
    assert not contradict("Intel(R) Xeon(R)", "NVIDIA H200") and not contradict("", "NVIDIA H200")


def test_every_preset_is_found_by_its_gpu() -> None:
    for name in presets():
        assert chip(gpu_of_system(preset_with(gpu_of_system(name)))) == chip(gpu_of_system(name))
    assert preset_with("NVIDIA H100 80GB HBM3") == "h100_sxm"
    assert preset_with("NVIDIA GeForce RTX 4090") == ""


def test_the_profile_of_another_gpu_is_refused(tmp_path: Path) -> None:
    folder = profile(tmp_path, "NVIDIA H100 80GB HBM3", "h100_sxm")
    for system in ("b200_sxm", "h200_sxm"):
        with pytest.raises(BadInput, match="measured on NVIDIA H100 80GB HBM3, but the cluster has NVIDIA"):
            open_for(folder, cluster(system))
    assert open_for(folder, cluster("p5_48xlarge")).folder == Path(folder)  # another system of the same GPU


def test_a_wrong_system_of_the_right_gpu_is_refused_too(tmp_path: Path) -> None:
    folder = profile(tmp_path, "NVIDIA H200", "h100_sxm")
    for system in ("h100_sxm", "h200_sxm"):
        with pytest.raises(BadInput, match="but the cluster has NVIDIA H"):
            open_for(folder, cluster(system))


def test_rows_that_tell_no_gpu_go_on_with_a_note(tmp_path: Path) -> None:
    folder = profile(tmp_path, "unknown", "ours")
    opened = open_for(folder, cluster("b200_sxm"))
    assert "does not tell which GPU" in notes_on(opened, "ours", cluster("b200_sxm"))[0]
    folder = profile(tmp_path, "Intel(R) Xeon(R)", "b200_sxm")
    opened = open_for(folder, cluster("b200_sxm"))
    assert "was measured on Intel(R) Xeon(R)" in notes_on(opened, "ours", cluster("b200_sxm"))[0]


def test_the_system_speaks_for_rows_that_tell_no_gpu(tmp_path: Path) -> None:
    folder = profile(tmp_path, "unknown", "h800")
    assert notes_on(open_for(folder, cluster("h800")), "p", cluster("h800")) == []
    with pytest.raises(BadInput, match="of h800, which has NVIDIA H800, but the cluster has NVIDIA H200"):
        open_for(folder, cluster("h200_sxm"))


def test_default_goes_by_the_gpu_and_not_by_the_clusters_name() -> None:
    assert open_for("default", cluster("h200_sxm", name="our-cluster")).folder == DATA / "h200_sxm"
    with pytest.raises(BadInput, match="no profile ships for NVIDIA B200") as refused:
        open_for("default", cluster("b200_sxm", name="h200_sxm"))
    assert "--system b200_sxm" in refused.value.line() and ".[silicon]" in refused.value.line()
    assert shipped_for("H200") == "h200_sxm" and shipped_for("NVIDIA B200") == shipped_for("") == ""


def test_other_links_are_told(tmp_path: Path) -> None:
    shipped = open_profile("default", "h200_sxm")
    assert notes_on(shipped, "default", cluster("h200_sxm", nodes=4)) == []
    without = cluster("h200_sxm", nvlink_bytes_per_s=0.0)
    assert "NVLink 450 GB/s, the cluster's 0 GB/s" in notes_on(shipped, "default", without)[0]


def test_the_systems_that_imports_take(tmp_path: Path) -> None:
    assert asked_system(" h100_sxm ").gpu == "NVIDIA H100 80GB HBM3"
    assert asked_system("mi300x").told() == {"system": "mi300x"}
    for slip, meant in (
        ("h100", "h100_sxm"),
        ("h200-sxm", "h200_sxm"),
        ("H100_SXM", "h100_sxm"),
        ("gb200", "gb200_nvl72"),
    ):
        with pytest.raises(BadInput, match=f"did you mean {meant}"):
            asked_system(slip)
    ours = cluster("h200_sxm", name="ours").model_dump(mode="json")
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(ours))
    assert asked_system(str(tmp_path / "ours.yaml")).told() == {"system": "ours", "gpu": "NVIDIA H200"}
    with pytest.raises(BadInput, match="no name"):
        asked_system(" ")


def test_a_log_of_another_gpu_is_refused(tmp_path: Path) -> None:
    log, out = tmp_path / "a.log", tmp_path / "out"
    log.write_text(LOG)
    asked = ["import", "nccl-tests", str(log), "--kind", "all_to_all", "--out", str(out), "--system"]
    refused = CliRunner().invoke(app, [*asked, "h100_sxm"])
    assert isinstance(refused.exception, BadInput) and not out.exists()
    assert refused.exception.line().endswith("but h100_sxm has NVIDIA H100 80GB HBM3; give --system h200_sxm")
    assert CliRunner().invoke(app, [*asked, "h200_sxm"]).exit_code == 0
    told = json.loads((out / DESCRIPTION).read_text())
    assert (told["system"], told["gpu"]) == ("h200_sxm", "NVIDIA H200")


def test_deepeps_device_is_held_against_the_system(tmp_path: Path) -> None:
    asked = ["import", "deepep", str(tmp_path / "no.log"), "--system", "h800", "--device", "NVIDIA H200", "--out", "x"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, BadInput) and "measured on NVIDIA H200, but h800" in refused.exception.line()
