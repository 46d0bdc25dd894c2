"""Damaged results of serving benchmarks, and damaged files of overheads: one line and exit 2, or a run that can be."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cli import run
from moesim.errors import BadInput
from moesim.spec.overheads import FORMAT, read_calibration
from tests import bench_writers as written
from tests.mutations import of_bytes, of_text
from tests.scenarios import small
from tests.scenarios import write as write_scenario
from validate.calibrate.bench_files import read_runs

SEED, EACH, MOST_CPU_S = 20261126, 250, 5.0
REQUESTS = 24
FORMS = ("vllm", "sglang", "aiperf")


def client() -> written.Client:
    rng = np.random.default_rng(3)
    osl = rng.integers(2, 9, REQUESTS).tolist()
    itls = [rng.uniform(0.005, 0.02, tokens - 1).tolist() for tokens in osl]
    starts_s = np.cumsum(rng.exponential(0.05, REQUESTS))
    return written.Client(
        rng.integers(8, 400, REQUESTS).tolist(), osl, starts_s, rng.uniform(0.02, 0.2, REQUESTS), itls
    )


def content(form: str) -> bytes:
    one = client()
    if form == "aiperf":
        return "\n".join(json.dumps(line) for line in written.aiperf(one)).encode()
    made = {"vllm": written.vllm, "sglang": written.sglang}[form](one, concurrency=None)
    return json.dumps(made).encode()


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Damage to the file; of JSON lines also to one line's values."""
    lines = whole.split(b"\n")
    if len(lines) > 1 and rng.random() < 0.6:
        at = rng.randrange(len(lines))
        lines[at] = of_text(lines[at], rng)
        return b"\n".join(lines)
    return of_text(whole, rng) if len(lines) == 1 else of_bytes(whole, rng)


def one_line(error: BadInput, path: Path) -> None:
    assert error.exit_code == 2
    assert "\n" not in error.line()
    assert len(error.line()) < 600
    assert path.name in error.line()
    assert error.mend


@pytest.mark.parametrize("form", FORMS)
def test_damaged_results_are_refused_or_can_be(form: str, tmp_path: Path) -> None:
    """Never another error; what is read holds only what a client can have seen."""
    whole, refused = content(form), 0
    path = tmp_path / f"{form}.json"
    path.write_bytes(whole)
    assert read_runs(path)[0].requests == REQUESTS
    for number in range(EACH):
        path.write_bytes(damaged(whole, random.Random(f"{form} {SEED} {number}")))
        begin = time.process_time()
        try:
            runs = read_runs(path)
        except BadInput as error:
            one_line(error, path)
            refused += 1
        else:
            for one in runs:
                assert 16 <= one.requests <= REQUESTS + 2
                assert (one.isl >= 1).all()
                assert (one.osl >= 1).all()
                assert np.isfinite(one.ttft_s).all()
                assert (one.ttft_s >= 0).all()
                assert (one.decode_s >= 0).all()
                assert one.start_s is None or (np.diff(one.start_s) >= 0).all()
                assert one.paired or one.requests_per_s > 0
        assert time.process_time() - begin < MOST_CPU_S, number
    print(f"{form}: {refused} of {EACH} refused")
    assert refused > EACH // 3


EXTREME: list[tuple[str, bytes, str]] = [
    ("empty", b"", "empty"),
    ("deep", b'{"ttfts": ' + b"[" * 300_000, "no JSON object"),
    ("nested", b'{"duration": 1, "completed": 1, "input_lens": ' + b"[" * 800 + b"]" * 800
     + b', "output_lens": [], "ttfts": [], "itls": []}', "requests"),
    ("digits", b'{"duration": ' + b"9" * 100_000 + b"}", "no JSON object"),
    ("list", b"[1, 2, 3]", "not an object"),
    ("other", b'{"a": 1}', "not a benchmark's result"),
    ("totals", b'{"duration": 1, "completed": 9, "mean_ttft_ms": 3}', "--save-detailed"),
    ("aggregate", b'{"records": {}, "input_config": {}}', "profile_export.jsonl"),
    ("utf16", content("vllm").decode().encode("utf-16"), "not UTF-8"),
    ("cut", content("sglang")[:900], "no JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "word"), EXTREME, ids=[name for name, _, _ in EXTREME])
def test_extreme_results_through_the_command(name: str, data: bytes, word: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / f"{name}.json"
    path.write_bytes(data)
    refused(path, word, tmp_path, capsys)


def refused(path: Path, word: str, folder: Path, capsys: Any) -> None:
    out = folder / "out.yaml"
    plain = write_scenario(folder, small())
    assert run(["validate", "calibrate", str(plain), "--bench", str(path), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert word in printed.err
    assert not out.exists()


def _changed(form: str, **more: Any) -> Any:
    return {"vllm": written.vllm, "sglang": written.sglang}[form](
        client(), concurrency=more.pop("concurrency", None), **more
    )


def _records(change: Any) -> list[dict[str, Any]]:
    records = written.aiperf(client())
    change(records[5])
    return records


WRONG: list[tuple[str, Any, str]] = [
    ("lengths", _changed("vllm", output_lens=[3] * (REQUESTS - 1)), "output_lens holds 23 requests, ttfts 24"),
    ("mean", _changed("vllm", mean_ttft_ms=5000.0), "mean_ttft_ms"),
    ("total", _changed("sglang", total_output_tokens=7), "total_output_tokens"),
    (
        "failed",
        _changed(
            "vllm", errors=["x"] * 3 + [""] * (REQUESTS - 3), completed=21, total_output_tokens=None, mean_ttft_ms=None
        ),
        "3 of 24 requests failed",
    ),
    ("unit", _changed("vllm", ttfts=[1e9] * REQUESTS, mean_ttft_ms=None), "ttfts holds"),
    ("rate", _changed("sglang", rate=5.0, concurrency=4), "does not tell when requests came"),
    ("trace", _changed("sglang", request_rate="trace"), "does not tell when requests came"),
    ("limit", _changed("vllm", max_concurrency=0), "max_concurrency"),
    ("batch", _changed("vllm", itls=[[] for _ in range(REQUESTS)]), "not streamed"),
    ("turns", _records(lambda one: one["metadata"].update(turn_index=1)), "one conversation"),
    ("seconds", _records(lambda one: one["metrics"]["request_latency"].update(unit="sec")), "inter_token_latency"),
    ("backwards", _records(lambda one: one["metrics"]["request_latency"].update(value=0.001)), "before the first"),
    ("record", _records(lambda one: one.pop("metrics")), "line 6"),
    ("engine", _changed("sglang"), "this run is of SGLang"),
]


@pytest.mark.parametrize(("name", "made", "word"), WRONG, ids=[name for name, _, _ in WRONG])
def test_results_that_contradict_themselves(name: str, made: Any, word: str, tmp_path: Path, capsys: Any) -> None:
    path = written.write(tmp_path / f"{name}.json", made)
    if name != "engine":
        refused(path, word, tmp_path, capsys)
        return
    plain = write_scenario(tmp_path, small(engine={"name": "vllm", "version": "1"}))
    assert run(["validate", "calibrate", str(plain), "--bench", str(path)]) == 2
    assert word in capsys.readouterr().err


def test_damaged_files_of_overheads_are_refused_or_hold(tmp_path: Path) -> None:
    whole = yaml.safe_dump({
        "format": FORMAT, "schema_version": 1, "written": "2026-11-26T04:00:00+00:00", "moesim": "0.1.0",
        "engine": {"name": "vllm", "version": "0.11"}, "model": "m", "system": "H200", "level": 0.9,
        "overheads": {
            "request_s": {"value": 0.03, "low": 0.029, "high": 0.031, "tag": "measured"},
            "step_s": {"value": 0.001, "low": 0.0009, "high": 0.0011, "tag": "measured"},
        },
        "sources": [{"where": "a.json", "sha256": "0" * 64}],
    }, sort_keys=False).encode()  # fmt: skip
    path, refusals = tmp_path / "overheads.yaml", 0
    for number in range(EACH):
        path.write_bytes(of_bytes(whole, random.Random(f"overheads {SEED} {number}")) if number else whole)
        try:
            found = read_calibration(path)
        except BadInput as error:
            one_line(error, path)
            refusals += 1
        else:
            for one in found.overheads.values():
                assert 0 <= one.value <= 60
                assert one.low is None or one.high is None or one.low <= one.value <= one.high
    assert EACH // 2 < refusals < EACH
