"""Measured lines into a profile: what is refused, what is written, and that a scenario prices from it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cost.estimate import Tag
from moesim.cost.ops import Attention, Collective, ExpertGemm, Gemm
from moesim.cost.roofline import Roofline
from moesim.errors import BadInput, MoesimError, OutsideProfile
from profiles.capture import Log, read_lines
from profiles.cli import app
from profiles.costs import StoreCosts
from profiles.store import open_profile
from tests.costs_cluster import h200

MUTATIONS = 60  # through the whole command; 2,000 go through the reader in tests/property


def line(family: str, key: dict[str, Any], size: dict[str, float], seconds: float, **changes: Any) -> dict[str, Any]:
    """A line as the sweeps write it."""
    return {
        "format": "moesim-measured", "schema_version": 1, "family": family, "key": key, "size": size,
        "kernel": "k", "device": "a GPU", "baseline": False, "latency_s": seconds, "p10_s": 0.9 * seconds,
        "p90_s": 1.2 * seconds, "repeats": 20, "halves": 0.01, "error": 0.001, "extra": {},
        "run": {"date": "2026-11-22T00:00:00+00:00", "torch": "2.11.0"}, **changes,
    }  # fmt: skip


EXPERTS = {
    "grouping": "fused", "dtype": "bf16", "hidden": 512, "intermediate": 256, "experts": 64, "top_k": 8,
    "local_experts": 8, "distribution": "uniform",
}  # fmt: skip
GQA = {"dtype": "bf16", "kv_dtype": "bf16", "heads": 8, "kv_heads": 2, "head_dim": 64, "window": 0}


def sample() -> list[dict[str, Any]]:
    """A few points of four families that rise with size, and one of a family without a table."""
    found = [line("gemm", {"dtype": "bf16", "n": 256, "k": 7168}, {"m": float(m)}, 1e-5 * m**0.5) for m in (4, 16, 64)]
    found += [line("experts", EXPERTS, {"routed": float(r)}, 2e-5 + 1e-7 * r) for r in (8, 16, 32, 64, 128, 256, 512)]
    found += [
        line("attention_decode", GQA, {"batch": float(b), "kv_tokens": float(n)}, 1e-6 * b * n**0.5)
        for b in (1, 2)
        for n in (16, 64)
    ]
    gloo = {"kind": "all_to_all", "path": "gloo", "gpus": 2, "nodes": 1}
    found += [line("collective", gloo, {"bytes": float(b)}, 1e-4 + 1e-9 * b) for b in (1024, 4096, 65536)]
    return [*found, line("norm", {"dtype": "bf16", "hidden": 512}, {"tokens": 8.0}, 1e-6)]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def imported(folder: Path, *files: Path, system: str = "h200_sxm") -> Path:
    out = folder / "profile"
    arguments = ["import", "measured", *map(str, files), "--system", system, "--out", str(out), "--json"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    return out


def model(*profiles: str, engine: str = "moesim", allow: bool = False) -> StoreCosts:
    return StoreCosts(tuple(open_profile(name, "h200_sxm") for name in profiles), engine, allow, Roofline(h200(1)))


def test_every_measured_point_is_priced_exactly(tmp_path: Path) -> None:
    lines = sample()
    costs = model(str(imported(tmp_path, write(tmp_path / "a.jsonl", lines))))
    for one in lines[:-1]:
        size = {name: np.array([value]) for name, value in one["size"].items()}
        op: Any
        if one["family"] == "gemm":
            op = Gemm(size["m"], 256, 7168, "bf16")
        elif one["family"] == "experts":
            op = ExpertGemm(np.full((1, 8), one["size"]["routed"] / 8), 512, 256, 64, 8, "bf16", "fused")
        elif one["family"] == "attention_decode":
            op = Attention("decode", size["batch"], np.ones(1), size["kv_tokens"] - 1, 8, 2, 64, "bf16", "bf16")
        else:
            op = Collective("all_to_all", size["bytes"], 2, 1)
        priced = costs.estimate(op)
        assert priced.seconds[0] == pytest.approx(one["latency_s"], rel=1e-9), one
        assert priced.tags[0] == Tag.MEASURED
        assert "moesim 2.11.0 k on a GPU" in priced.source


def test_the_first_profile_answers_for_what_it_holds_and_the_next_for_the_rest(tmp_path: Path) -> None:
    out = str(imported(tmp_path, write(tmp_path / "a.jsonl", sample())))
    ms = np.array([1.0, 16.0, 40.0, 64.0, 128.0])
    op = Gemm(ms, 256, 7168, "bf16")
    default = model("default", engine="sglang").estimate(op).seconds
    first = model(out, "default", engine="sglang").estimate(op)
    own = model(out, engine="sglang").estimate(Gemm(ms[1:4], 256, 7168, "bf16")).seconds
    np.testing.assert_allclose(first.seconds, [default[0], *own, default[4]])
    np.testing.assert_allclose(model("default", out, engine="sglang").estimate(op).seconds, default)
    assert "aiconfigurator" in first.source and "a GPU" in first.source
    # What only the second profile holds is still priced, and so is what only the first one does.
    both = model("default", out, engine="sglang")
    assert both.estimate(ExpertGemm(np.full((1, 8), 4.0), 512, 256, 64, 8, "bf16", "fused")).tags[0] == Tag.MEASURED


def test_other_shapes_of_a_measured_profile_do_not_come_before_the_very_shape(tmp_path: Path) -> None:
    lines = [
        line("gemm", {"dtype": "bf16", "n": n, "k": k}, {"m": m}, 1.0)
        for n in (128, 512) for k in (4096, 8192) for m in (1.0, 64.0)
    ]  # fmt: skip
    out = str(imported(tmp_path, write(tmp_path / "a.jsonl", lines)))
    op = Gemm(np.array([16.0]), 256, 7168, "bf16")
    assert model(out, "default", engine="sglang").estimate(op).seconds[0] < 1e-3
    assert model(out, engine="sglang").estimate(op).seconds[0] == pytest.approx(1.0)


def test_beyond_a_measured_profile_is_refused(tmp_path: Path) -> None:
    costs = model(str(imported(tmp_path, write(tmp_path / "a.jsonl", sample()))))
    with pytest.raises(OutsideProfile, match=r"gemm dtype=bf16 n=256 k=7168 m=1:1000' --out"):
        costs.estimate(Gemm(np.array([1000.0]), 256, 7168, "bf16"))


def test_the_physics_of_a_processor_is_found_as_well_as_that_of_a_gpu() -> None:
    from profiles.grouped import Physics, Shape, balanced_run, fit_physics, predicted

    shape = Shape(512, 256, "bf16", 64, 8, "fused")
    true = Physics(20e-6, 10e-6, 1.5e10, 5e11, 1e10, 1.5)
    blank = [balanced_run(shape, slots, pairs, 1.0) for slots in (4, 16) for pairs in (1.0, 4.0, 16.0, 64.0, 256.0)]
    seconds = predicted(true, shape, blank)
    runs = [dataclasses.replace(run, seconds=float(one)) for run, one in zip(blank, seconds, strict=True)]
    np.testing.assert_allclose(predicted(fit_physics(shape, runs), shape, runs), seconds, rtol=0.02)


def test_a_profile_tells_where_it_comes_from(tmp_path: Path) -> None:
    lines = [*sample(), line("grouped_gemm", {"hidden": 8}, {"routed": 8.0}, 1e-6, baseline=True)]
    out = imported(tmp_path, write(tmp_path / "a.jsonl", lines), system="mybox")
    told = json.loads((out / "profile.json").read_text())
    assert told["system"] == "mybox"
    assert told["rows"] == {"gemm": 3, "experts": 7, "attention_decode": 4, "collective": 3}
    assert told["without_table"] == {"norm": 1, "grouped_gemm (baseline)": 1}
    assert told["measured"] == [{"device": "a GPU", "torch": "2.11.0", "date": "2026-11-22"}]
    row = open_profile(str(out), "mybox").table("gemm").row(0, named=True)
    assert (row["system"], row["engine"], row["version"], row["tag"]) == ("mybox", "moesim", "2.11.0", "measured")


def test_repeated_points_become_their_median_and_two_machines_are_refused(tmp_path: Path) -> None:
    point = {"dtype": "bf16", "n": 8, "k": 8}
    lines = [line("gemm", point, {"m": 1.0}, seconds) for seconds in (1.0, 2.0, 7.0)]
    out = imported(tmp_path, write(tmp_path / "a.jsonl", lines[:2]), write(tmp_path / "b.jsonl", lines[2:]))
    assert open_profile(str(out), "").table("gemm")["latency_s"].to_list() == [2.0]
    other = write(tmp_path / "c.jsonl", [line("gemm", point, {"m": 1.0}, 1.0, device="another")])
    with pytest.raises(BadInput, match="measured on a GPU and on another"):
        imported(tmp_path, tmp_path / "a.jsonl", other)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"latency_s": -1.0}, "latency_s is -1.0"),
    "zero": ({"p10_s": 0.0}, "p10_s is 0.0"),
    "infinite": ({"p90_s": 1e400}, "Infinity"),
    "not a number": ({"latency_s": math.nan}, "NaN"),
    "microseconds among seconds": ({"p90_s": 1e-9}, "do not rise"),
    "another schema": ({"schema_version": 2}, "schema version 2"),
    "true is no version": ({"schema_version": True}, "schema version True"),
    "another format": ({"format": "nccl-tests"}, "not a moesim-measured line"),
    "unknown family": ({"family": "gem"}, "unknown family 'gem'"),
    "key lacks": ({"key": {"dtype": "bf16", "n": 1}}, "lacks 'k'"),
    "key has more": ({"key": {"dtype": "bf16", "n": 1, "k": 1, "z": 1}}, "unknown 'z'"),
    "key of another type": ({"key": {"dtype": 1, "n": 1, "k": 1}}, "key.dtype is 1, not text"),
    "key too large": ({"key": {"dtype": "bf16", "n": 10**30, "k": 1}}, "key.n"),
    "size of another family": ({"size": {"tokens": 1.0}}, "the sizes of gemm are m"),
    "negative size": ({"size": {"m": -4.0}}, "size.m is -4.0"),
    "text for a size": ({"size": {"m": "4"}}, "size.m is '4'"),
    "no repeats": ({"repeats": 0}, "repeats is 0"),
    "no torch": ({"run": {"date": "x"}}, "torch is missing"),
    "no device": ({"device": ""}, "device is missing"),
    "baseline is text": ({"baseline": "yes"}, "baseline"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named_and_the_store_stays(name: str, tmp_path: Path) -> None:
    changes, told = WRONG[name]
    good = write(tmp_path / "good.jsonl", sample())
    before = fingerprint(imported(tmp_path, good))
    bad = write(tmp_path / "bad.jsonl", [sample()[0], {**sample()[0], **changes}])
    with pytest.raises(BadInput) as error:
        imported(tmp_path, good, bad)
    assert f"{bad}:2: " in error.value.line()
    assert told in error.value.line()
    assert fingerprint(tmp_path / "profile") == before


def test_a_line_that_is_cut_off_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sample())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match=rf"a.jsonl:{len(sample())}: the last line is cut off; run the command"):
        imported(tmp_path, path)
    path.write_text("")
    with pytest.raises(BadInput, match="no measurement here"):
        imported(tmp_path, path)
    with pytest.raises(BadInput, match="no line belongs to a table"):
        imported(tmp_path, write(path, sample()[-1:]))


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutated(text: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut, repeated or put in; or a value swapped for one that does not belong."""
    content = bytearray(text)
    kind = int(rng.integers(6))
    at = int(rng.integers(len(content)))
    if kind == 0:
        for where in rng.integers(len(content), size=int(rng.integers(1, 6))):
            content[int(where)] = int(rng.integers(256))
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + int(rng.integers(1, 60))]
    elif kind == 3:
        content[at:at] = content[at : at + int(rng.integers(1, 60))]
    elif kind == 4:
        content[at:at] = bytes(rng.integers(0, 256, size=int(rng.integers(1, 20)), dtype=np.uint8))
    else:
        lines = text.split(b"\n")
        row = json.loads(lines[int(rng.integers(len(lines) - 1))])
        odd: Any = [None, -1, 0, "x", [], {}, 10**400, True, 1e-320, [[]] * 3, "NaN"][int(rng.integers(11))]
        row[list(row)[int(rng.integers(len(row)))]] = odd
        return json.dumps(row).encode() + b"\n" + text
    return bytes(content)


def test_mutated_files_give_a_profile_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    text = write(tmp_path / "good.jsonl", sample()).read_bytes()
    out = imported(tmp_path, tmp_path / "good.jsonl")
    path = tmp_path / "bad.jsonl"
    refused = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(text, rng))
        before = fingerprint(out)
        try:
            imported(tmp_path, path)
        except MoesimError as error:
            assert error.exit_code == 2
            assert "\n" not in error.line()
            assert str(path) in error.line() or "import measured" in error.line()
            assert fingerprint(out) == before
            refused += 1
        else:  # the mutation fell where any value is right: the profile must open
            opened = open_profile(str(out), "h200_sxm")
            assert all((opened.table(name)["latency_s"] > 0).all() for name in opened.families())
        try:
            Log(path)
        except BadInput as error:
            assert str(path) in error.line()
    assert refused > MUTATIONS // 2


def test_a_log_drops_a_torn_line_and_keeps_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sample())
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"format": "moesim-mea')
    assert Log(path).kept == len(sample())
    assert path.read_bytes() == whole
    assert len(read_lines([path])) == len(sample())
