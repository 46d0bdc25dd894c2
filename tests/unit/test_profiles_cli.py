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


def test_kernels_measure_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "kernels.jsonl"
    arguments = ["kernels", "--quick", "--hidden", "32", "--intermediate", "16", "--slots", "2", "--out", str(out)]
    assert "measured 3 points, kept 0" in run(app, arguments, catch_exceptions=False).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["key"]["tokens_per_expert"] for row in rows] == [1, 8, 64]
    assert all(0 < row["p10_s"] <= row["latency_s"] <= row["p90_s"] for row in rows)
    # A crash in the middle of a line: that point is measured again, the others are kept.
    out.write_text("\n".join(out.read_text().splitlines()[:2]) + '\n{"key": {"fam')
    assert "measured 1 points, kept 2" in run(app, arguments, catch_exceptions=False).stdout
    assert len(out.read_text().splitlines()) == 3


def test_kernels_refuse_a_file_of_something_else(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "kernels.jsonl"
    out.write_text("a line\n")
    with pytest.raises(BadInput, match="no measurement"):
        run(app, ["kernels", "--quick", "--out", str(out)], catch_exceptions=False)
    with pytest.raises(BadInput, match="unknown device"):
        run(app, ["kernels", "--quick", "--device", "abacus", "--out", str(out)], catch_exceptions=False)
    assert out.read_text() == "a line\n"
