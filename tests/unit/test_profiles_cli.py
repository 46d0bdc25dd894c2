"""`moesim profile`: the commands, in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesim.errors import BadInput
from profiles.cli import app

run = CliRunner().invoke


def test_list_and_show_as_json() -> None:
    listed = json.loads(run(app, ["list", "--json"], catch_exceptions=False).stdout)
    assert [one["system"] for one in listed["profiles"]] == ["h200_sxm"]
    shown = json.loads(run(app, ["show", "--json"], catch_exceptions=False).stdout)
    exchange = next(one for one in shown["families"] if one["family"] == "exchange")
    assert exchange["rows"] > 0
    assert exchange["ranges"]["tokens"][0] >= 1


def test_show_for_people_and_one_family_as_csv() -> None:
    assert "mla_decode: 2896 rows" in run(app, ["show"], catch_exceptions=False).stdout
    lines = run(app, ["show", "--family", "mla_absorb"], catch_exceptions=False).stdout.splitlines()
    assert lines[0].startswith("side,dtype,heads")
    assert len(lines) == 849
    with pytest.raises(BadInput, match="unknown family"):
        run(app, ["show", "--family", "nothing"], catch_exceptions=False)


def test_check_prints_the_stored_errors() -> None:
    errors = json.loads(run(app, ["check", "--stored", "--json"], catch_exceptions=False).stdout)["errors"]
    assert 0 < errors["mla_decode"]["median"] < errors["mla_decode"]["p90"]
    assert "exchange_low_latency" in run(app, ["check", "--stored"], catch_exceptions=False).stdout


def synthetic_package(root: Path) -> Path:
    """A small package of tables in which experts cost what a known machine would take."""
    import polars as pl

    common = {"framework": "SGLang", "version": "1.0", "device": "NVIDIA H200", "kernel_source": "k"}
    folder = root / "systems" / "data" / "h200_sxm"
    rows = []
    for ranks in (2, 4, 8):
        for tokens in (8, 16, 32, 64, 128, 256, 512, 1024):
            for skew in ("uniform", "power_law_1.2"):
                experts = min(64 // ranks, tokens * 8 // ranks)
                seconds = 20e-6 + experts * 3 * 1024 * 512 / 3e12 + tokens * 8 / ranks * 6 * 1024 * 512 / 5e14
                rows.append(
                    {
                        **common,
                        "moe_dtype": "fp8_block",
                        "num_tokens": tokens,
                        "hidden_size": 1024,
                        "inter_size": 512,
                        "topk": 8,
                        "num_experts": 64,
                        "moe_tp_size": 1,
                        "moe_ep_size": ranks,
                        "distribution": skew,
                        "latency": seconds * 1e3,
                    }
                )
    gemm = [
        {**common, "gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": 0.01 * (m * n * k) ** 0.5 / 1e3}
        for m in (1, 2, 4, 8, 16) for n in (64, 128, 256) for k in (64, 128, 256)
    ]  # fmt: skip
    for path, table in (("moe/sglang/1.0/wideep_generation_moe_perf", rows), ("gemm/sglang/1.0/gemm_perf", gemm)):
        target = folder / f"{path}.parquet"
        target.parent.mkdir(parents=True)
        pl.DataFrame(table).write_parquet(target)
    return root


def test_import_writes_a_profile_with_its_errors_and_physics(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    source = synthetic_package(tmp_path / "package")
    arguments = ["import", "aiconfigurator", "--source", str(source), "--out", str(out), "--json"]
    done = json.loads(run(app, arguments, catch_exceptions=False).stdout)
    assert done["rows"] == {"gemm": 45, "experts": 48}
    assert done["errors"]["gemm_shape"]["median"] < 1e-6  # the synthetic law is a power law: exact between points
    description = json.loads((out / "profile.json").read_text())
    (physics,) = description["physics"].values()
    assert physics["parameters"]["overhead_s"] + physics["parameters"]["floor_s"] == pytest.approx(20e-6, rel=0.5)
    checked = json.loads(run(app, ["check", str(out), "--json"], catch_exceptions=False).stdout)
    assert checked["errors"] == done["errors"]


def test_import_of_nothing_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no tables here"):
        run(
            app,
            ["import", "aiconfigurator", "--source", str(tmp_path / "empty"), "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()
