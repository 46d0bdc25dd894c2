"""`moesim validate fabric` as a user runs it: predictions first, bytes checked, and nothing left behind, killed or not.

The whole comparison (all fabrics that ship) is for a quiet machine: MOESIM_WHOLE=1.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import MissingPart
from validate.fabric.run import TOOLS, check_parts
from validate.fabric.spec import bundled
from validate.records.store import compact

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
try:
    check_parts()
    MISSING = ""
except MissingPart as missing:
    MISSING = missing.line()
pytestmark = [pytest.mark.hardware, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
LAB = """
name: small
nodes: 2
ranks_per_node: 2
nics_per_node: 2
nic_bits_per_s: 300.0e6
slow_nics: [{node: 1, nic: 1, bits_per_s: 150.0e6}]
delay_s: 0.002
nodes_per_leaf: 1
spine_bits_per_s: 300.0e6
bytes_per_rank: 200_000
repeats: 4
concurrent: [[even, skewed]]
"""
LONG = "name: long\nnodes: 2\nranks_per_node: 1\nnic_bits_per_s: 5.0e6\npatterns: [even]\nbytes_per_rank: 2_000_000\n"
CALIBRATION = {
    "kind": "validate-fabric-calibration",
    "figures": {"message_s": 7e-5, "copy_bytes_per_s": 3e9, "wire": 1.0},
}


def line(*more: str) -> list[str]:
    return [sys.executable, "-m", "moesim.cli", "validate", "fabric", *more]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line(*more), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=180
    )


def prepared(folder: Path, text: str) -> list[str]:
    (folder / "lab.yaml").write_text(text)
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    return ["lab.yaml", "--calibration", "calibration.json"]


def descendants(process: int) -> list[int]:
    """All processes below one, as /proc tells them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, fresh = [], [process]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh]
        found += fresh
    return found


def space(process: int) -> str:
    try:
        return str(Path(f"/proc/{process}/ns/net").readlink())
    except OSError:
        return ""


def wait_for(what: Callable[[], Any], limit_s: float) -> Any:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s} s")


def test_a_lab_is_predicted_then_measured_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(LAB)
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    done = run(tmp_path, "lab.yaml", "--json")
    assert done.returncode in (0, 1), done.stderr  # 1: on a busy machine a winner may come out the other way
    record = json.loads(done.stdout)
    folder = tmp_path / "runs" / "validate-fabric"
    assert record == json.loads((folder / "record.json").read_text())
    text = (folder / "predictions.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == record["predictions"]["sha256"]
    assert record["predictions"]["written"] < record["measured_from"] <= record["labs"][0]["measured_from"]
    (entry,) = record["labs"]
    assert entry["delay"] in ("netem", "relay")
    foretold = [seconds for case in json.loads(text)["labs"][0]["cases"] for seconds in case["seconds"]]
    assert [row["predicted_s"] for row in entry["cases"]] == foretold
    assert len(entry["cases"]) == 4 * 2 + 2
    # The wire cannot be beaten by more than its buckets: the delay and nearly all bytes at the rates of the lab.
    for row in entry["cases"]:
        assert len(row["samples_s"]) == 4 and row["p10_s"] > 0.5 * 0.002
        assert row["median_s"] > 0.5 * row["predicted_s"] - 30 * record["calibration"]["figures"]["message_s"]
    assert entry["counters"]["dropped"] == 0
    assert entry["counters"]["acknowledgements"] > 0
    calibration = json.loads((folder / "calibration.json").read_text())
    assert {fabric["name"] for fabric in calibration["fabrics"]}.isdisjoint({"small"})
    figures = calibration["figures"]
    assert figures == record["calibration"]["figures"] == json.loads(text)["figures"]
    contests = record["comparison"]["schemes"]
    assert contests["contests"] == 4 and record["comparison"]["placements"]["contests"] == 2
    wrong = contests["wrong"] + record["comparison"]["placements"]["wrong"]
    assert done.returncode == int(bool(wrong))
    shown = compact(record).evidence("it")
    assert [one.cases for one in shown] == [6, 2, 4, 2]
    assert [one.claim for one in shown] == ["exchange_time", "placement_gain"] * 2
    assert subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout == spaces


def test_a_dead_link_ends_the_run_with_its_name(tmp_path: Path) -> None:
    quicker = LONG.replace("5.0e6", "50.0e6")
    given = prepared(tmp_path, quicker + "dead_link: {node: 1, after_s: 0.05}\n")
    begun = time.monotonic()
    done = run(tmp_path, *given, "--stall-limit", "3")
    assert done.returncode == 1 and time.monotonic() - begun < 60
    said = done.stderr.strip().splitlines()[-1]
    assert "nic0 of node 1 is down (rank 1)" in said and "while measuring" in said
    assert not (tmp_path / "runs" / "validate-fabric" / "record.json").exists()


@pytest.mark.parametrize("victim", ["command", "rank"])
def test_whoever_is_killed_nothing_is_left(tmp_path: Path, victim: str) -> None:
    given = prepared(tmp_path, LONG)
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(line(*given), cwd=tmp_path, env=ENVIRONMENT, stdout=said, stderr=said)
    try:
        wait_for(lambda: "checking" in (tmp_path / "said").read_text() or process.poll() is not None, 60)
        below = descendants(process.pid)
        spaces = {space(one) for one in below} - {space(process.pid), ""}
        assert len(spaces) == 3  # the lab's own and two nodes'; the switches' holds no process
        ranks = [one for one in below if not descendants(one) and space(one) in spaces]
        assert len(ranks) == 2
        os.kill(process.pid if victim == "command" else ranks[1], signal.SIGKILL)
        code = process.wait(30)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{one}").exists() for one in below), 5)
    assert not spaces & {space(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    assert not Path("/run/netns/node0").exists() and not Path("/run/moesim-lab").exists()
    if victim == "rank":
        assert code == 1
        assert "was killed by SIGKILL while checking even, flat" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_missing_tool_is_named(tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        if name != tool:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(MissingPart, match=f"`{tool}` is not installed") as raised:
        check_parts()
    assert raised.value.exit_code == 3


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingPart, match="needs root"):
        check_parts()


@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="four minutes on a quiet machine: MOESIM_WHOLE=1")
def test_all_fabrics_that_ship(tmp_path: Path) -> None:
    done = subprocess.run(
        line(*bundled(), "--json"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["comparison"]
    assert found["cases"] == 8 * len(bundled()) >= 64
    assert found["error"]["median"] <= 0.10 and found["error"]["p90"] <= 0.25
    for kind in ("schemes", "placements"):
        assert found[kind]["right"] == found[kind]["decided"] > 0
