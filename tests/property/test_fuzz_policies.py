"""Mutated schedules and storages: each ends in one line and a contract exit code, never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from moesim.cli import run
from tests.property.test_fuzz_scenarios import ends_well, mutate
from tests.scenarios import small

MUTANTS = 60
POLICIES = (
    {"schedule": "pipeline", "overlap": {"chunks": 2, "slowdown": {"compute": 1.2, "communication": 1.1}}},
    {"storage": "cached", "expert_cache": {"experts_per_layer": 4, "policy": "lfu"}},
    {"schedule": "shortcut", "storage": "pregated", "overlap": {"slowdown": "multiprocessors"}},
)


def test_mutated_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(2)
    codes = set()
    for number in range(MUTANTS):
        data = small(placement={"solver": "contiguous"})
        data["serving"]["workload"]["requests"] = 10
        data["policies"] = mutate(POLICIES[number % len(POLICIES)], rng)
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump(data))
        code = run(["simulate", str(path), "--json", "--draws", "0"])
        ends_well(code, capsys.readouterr(), path.read_text())
        codes.add(code)
    assert codes >= {0, 2}
