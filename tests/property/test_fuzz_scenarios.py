"""Five hundred mutated scenarios and load files: each ends in one line and a contract exit code, never a traceback."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim.cli import run
from tests.scenarios import small

SCENARIOS = 300
LOAD_FILES = 200
JUNK: list[Any] = [
    None, -1, 0, 1, 3, 7, 1.5, 1e30, -0.0, float("inf"), float("nan"), "", "x", "../..", True, [], [1], {}, {"a": 1},
    "deepseek-ai/DeepSeek-V3", 10**12, "1e9", [None, "b"],
]  # fmt: skip

INSERTED = [b"- ", b"{", b"[", b": ", b"\x00", b"&a *a", b"!!python/name:os.system ", b"\t"]


def paths(node: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += paths(value, (*prefix, key))
    return found


def mutate(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        *parents, last = rng.choice(paths(data))
        node: Any = data
        for key in parents:
            node = node[key]
        action = rng.random()
        if action < 0.2:
            del node[last]
        elif action < 0.3 and isinstance(node, dict):
            node[f"{last}_"] = node.pop(last)
        else:
            node[last] = copy.deepcopy(rng.choice(JUNK))
        if not paths(data):
            break
    return data


def scramble(text: str, rng: random.Random) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(raw))
        action = rng.random()
        if action < 0.5:
            raw[place] = rng.randrange(256)
        elif action < 0.75:
            del raw[place : place + rng.randint(1, 40)]
        else:
            raw[place:place] = rng.choice(INSERTED)
        if not raw:
            raw = bytearray(b" ")
    return bytes(raw)


def ends_well(code: int, printed: Any, what: str) -> None:
    assert code in (0, 1, 2, 3), what
    if code:
        assert printed.err.startswith("error: "), what
        assert printed.err.count("\n") == 1, what
        assert "Traceback" not in printed.err, what
        assert printed.out == "", what
    else:
        json.loads(printed.out)


@pytest.mark.slow
def test_mutated_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    plain, staged = small(), small(parallel={"attention_dp": 4, "ep": 4, "pp": 2})
    staged["serving"]["pipeline"] = {"layers": [7, 9], "batches": 3, "running_requests_per_dp_rank": 20}
    split = small(model="deepseek-ai/DeepSeek-V3", parallel={"tp": 8, "ep": 8, "decode_cp": 4})
    codes = set()
    for number in range(SCENARIOS):
        base = staged if number % 5 == 4 else split if number % 10 == 3 else plain
        base["serving"]["workload"]["requests"] = 10
        path = tmp_path / "s.yaml"
        if number % 3:
            path.write_text(yaml.safe_dump(mutate(base, rng)))
        else:
            path.write_bytes(scramble(yaml.safe_dump(base), rng))
        code = run(["simulate", str(path), "--json", "--draws", "0"])
        ends_well(code, capsys.readouterr(), path.read_bytes().decode(errors="replace"))
        codes.add(code)
    assert codes >= {0, 1, 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.slow
def test_mutated_load_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    counts = [[rng.randrange(1, 1000) for _ in range(16)] for _ in range(3)]
    documents = {
        "a.json": json.dumps({"logical_count": counts}),
        "a.csv": "layer_id,expert_id,count\n"
        + "\n".join(f"{layer},{e},{n}" for layer, row in enumerate(counts) for e, n in enumerate(row)),
    }
    codes = set()
    out = tmp_path / "out" / "map.json"
    for number in range(LOAD_FILES):
        name = sorted(documents)[number % 2]
        path = tmp_path / name
        if name.endswith("json") and number % 4 == 1:
            path.write_text(json.dumps(mutate({"logical_count": counts}, rng)))
        else:
            path.write_bytes(scramble(documents[name], rng))
        arguments = ["place", "--loads", str(path), "--gpus", "4", "--slots", "16", "--out", str(out), "--json"]
        code = run(arguments)
        ends_well(code, capsys.readouterr(), path.read_bytes().decode(errors="replace"))
        assert out.exists() == (code == 0)
        out.unlink(missing_ok=True)
        codes.add(code)
        assert not list(tmp_path.rglob("*.tmp"))
    assert codes >= {0, 2}
