"""DeepSeek-R1 decode on its real counts: contiguous against planned in step time, judged on the file not fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim.cli import run

pytestmark = [pytest.mark.data, pytest.mark.slow]
SIZES = ["8", "32", "128", "512"]


def scenario(folder: Path, shared_data: Path, **changes: Any) -> Path:
    files = [shared_data / "routing" / f"deepseek_r1_decode_{name}.json" for name in ("in1000out1000", "in2000out100")]
    data: dict[str, Any] = {
        "model": "deepseek-ai/DeepSeek-R1",
        "cluster": {"system": "h200_sxm", "nodes": 4},
        "routing": {"loads": [{"file": str(file), "phase": "decode"} for file in files]},
        "parallel": {"attention_dp": 32, "ep": 32},
        "placement": {"solver": "greedy", "redundant_experts": 32},
        "cost": {"extrapolate": "allow"},  # contiguous placement leaves the low-latency tables
        "serving": {"workload": {"isl": 2000, "osl": 256, "requests": 10, "arrivals": {"concurrency": 1}}},
    }
    data.update(changes)
    path = folder / "decode.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def placed(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["place", str(path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_size_has_its_interval(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = placed(scenario(tmp_path, shared_data), capsys)
    steps = result["step_time"]
    rows = {str(row["tokens_per_rank"]): row for row in steps["rows"]}
    assert list(rows) == SIZES
    for row in rows.values():
        for name in ("contiguous", "planned"):
            time = row["step_s"][name]
            assert 0 < time["low"] < time["value"] < time["high"]
        assert row["gain"]["low"] <= row["gain"]["value"] <= row["gain"]["high"]
    # 512 requests of a rank are more than the engine takes, and are priced in another dispatch mode.
    assert [size for size in SIZES if rows[size]["runs"]] == SIZES[:3]
    # Contiguous placement of these counts loads its fullest rank 2.7 times the mean: the more tokens, the dearer.
    gains = [rows[size]["gain"]["value"] for size in SIZES[:3]]
    assert gains == sorted(gains)
    assert gains[-1] > 0.2
    assert "replicas" in result["verdict"]["text"]
    assert "not fitted to" in result["verdict"]["text"]


def test_a_placement_without_replicas_to_gain_is_told_so(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half as many slots again cost weight reads on every rank: at few tokens that is all they do."""
    path = scenario(tmp_path, shared_data, placement={"solver": "greedy", "redundant_experts": 128})
    result = placed(path, capsys)
    few = next(row for row in result["step_time"]["rows"] if row["tokens_per_rank"] == 8)
    assert few["gain_from_replicas"]["high"] < 0
    assert "make the step slower at 8" in result["verdict"]["text"]
