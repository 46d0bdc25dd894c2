"""2,000 damaged inputs for each reader: a result whose every figure is finite and above zero, or one line of error.

The readers run on text; a few dozen inputs more go through the whole command, after which the profile that stood at
--out must be the same byte by byte.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from moesim.errors import BadInput, MoesimError
from profiles.capture import read_lines
from profiles.cli import app
from profiles.importers.deepep import Setup, read_deepep_text
from profiles.importers.deepep_rows import exchanges_of
from profiles.importers.measured import tables_of
from profiles.importers.nccl_rows import Given, collectives_of
from profiles.importers.nccl_tests import read_nccl_text
from profiles.importers.published import context_of, published_of
from profiles.importers.topo import read_topology
from profiles.importers.topo_cluster import in_words
from profiles.record import COUNT, FAMILIES, NUMBER
from profiles.store import Profile
from profiles.whose import System
from tests import printed_samples as samples
from tests.damaged import damaged, fingerprint

INPUTS = 2000
WHOLE = 24  # through the command, a kind of input
LOW_LATENCY = Setup(tokens=128, hidden=7168, top_k=8, experts=256, ep=8, nodes=1)
NORMAL = Setup(experts=256, ep=16, nodes=2)


PATH = "some/run.log"
Read = Callable[[bytes], Iterable[float]]


def judged(read: Read, data: bytes, path: str) -> str:
    """What became of an input; an error must name the file, and nothing but it may come."""
    try:
        figures = list(read(data))
    except BadInput as error:
        assert error.exit_code == 2
        assert "\n" not in error.line()
        assert re.fullmatch(rf"{re.escape(path)}(:\d+)?", error.where), error.line()
        return "refused at a line" if error.where != path else "refused"
    assert figures
    assert [one for one in figures if not (isinstance(one, int | float) and 0 < one < math.inf)] == []
    return "read"


def run(read: Read, whole: list[bytes], seed: int, path: str = PATH) -> dict[str, int]:
    """Judge INPUTS damaged inputs; how many were read, refused, and refused at a line."""
    rng = np.random.default_rng(seed)
    found: dict[str, int] = {}
    for number in range(INPUTS):
        verdict = judged(read, damaged(whole[number % len(whole)], rng), path)
        found[verdict] = found.get(verdict, 0) + 1
    assert sum(found.values()) == INPUTS
    return found


def figures_of(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterable[float]:
    """Every figure of the rows; multiprocessors of 0 mean that they do not matter or are not stated."""
    for family, row in rows:
        assert set(row) == set(FAMILIES[family].columns)
        for name, kind in FAMILIES[family].columns.items():
            if kind in (COUNT, NUMBER) and not (name == "sms" and row[name] == 0):
                yield row[name]


def put(path: Path, data: bytes) -> None:
    """Write a file anew; cutting the old one instead would wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def text_of(data: bytes) -> str:
    """As `read_printed` decodes a file."""
    return data.decode("utf-8", errors="replace")


def test_logs_of_nccl_tests() -> None:
    def read(data: bytes) -> Iterable[float]:
        runs = read_nccl_text(text_of(data), PATH)
        return figures_of(collectives_of([(PATH, runs)], System("h100_sxm"), Given()).rows)

    whole = [samples.nccl_log(), samples.nccl_log("all_reduce", ("one",)) + samples.nccl_log("all_gather", ("one",))]
    found = run(read, [one.encode() for one in whole], 1)
    assert found["refused at a line"] > 500
    assert found["read"] > 200


@pytest.mark.parametrize(
    ("text", "setup", "seed"),
    [
        (samples.deepep_internode("rate") + samples.deepep_internode("sum"), NORMAL, 2),
        (samples.deepep_internode("named"), NORMAL, 3),
        (samples.deepep_low_latency(), LOW_LATENCY, 4),
        (samples.deepep_intranode(), Setup(experts=256, ep=8), 5),
    ],
    ids=["internode", "internode, named times", "low latency", "intranode"],
)
def test_logs_of_deepep(text: str, setup: Setup, seed: int) -> None:
    def read(data: bytes) -> Iterable[float]:
        log = read_deepep_text(text_of(data), PATH)
        return figures_of(exchanges_of([(PATH, log)], [setup], system="h800", device="d", version="v").rows)

    found = run(read, [text.encode()], seed)
    assert found["refused at a line"] > 400
    assert found["read"] > 200


def test_matrices_of_nvidia_smi() -> None:
    def read(data: bytes) -> Iterable[float]:
        found = read_topology(text_of(data), PATH)
        assert in_words(found)
        count = len(found.gpus)
        assert len(found.gpu_links) == len(found.nic_links) == count
        assert found.gpu_nic == () or len(found.gpu_nic) == count
        assert sum(found.links_per_pair.values()) == count * (count - 1) // 2
        assert sorted(gpu for gpus, _ in found.switches for gpu in gpus) == list(range(count))
        yield count
        yield from (links for links in found.links_per_pair if links)

    whole = [samples.topo().encode(), samples.topo(False).encode(), samples.topo(True, "", 4).encode()]
    found = run(read, whole, 6)
    assert found["refused at a line"] > 400
    assert found["read"] > 200


def test_published_figures() -> None:
    context = context_of("h800", 256)

    def read(data: bytes) -> Iterable[float]:
        found = published_of(text_of(data), PATH, context)
        assert len(found.rows) + sum(found.left_out.values()) == found.total
        yield found.total
        yield from figures_of(found.rows)

    found = run(read, [one.encode() for one in samples.PUBLISHED.values()], 7)
    assert found["refused at a line"] > 600
    assert found["read"] > 200


def measured_lines() -> bytes:
    """A few lines as the sweeps write them, of two families."""
    lines = []
    for size in (16.0, 64.0, 256.0):
        common = {
            "format": "moesim-measured", "schema_version": 1, "kernel": "k", "device": "a GPU", "baseline": False,
            "latency_s": size * 1e-6, "p10_s": size * 0.9e-6, "p90_s": size * 1.2e-6, "repeats": 20,
            "run": {"date": "2026-11-22T00:00:00+00:00", "torch": "2.11.0"}, "extra": {},
        }  # fmt: skip
        key = {"kind": "all_to_all", "path": "gloo", "gpus": 2, "nodes": 1}
        lines.append({**common, "family": "gemm", "key": {"dtype": "bf16", "n": 8, "k": 8}, "size": {"m": size}})
        lines.append({**common, "family": "collective", "key": key, "size": {"bytes": 1024 * size}})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_lines_of_our_own_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"

    def read(data: bytes) -> Iterable[float]:
        put(path, data)
        for line in read_lines([path]):
            yield from (line.latency_s, line.p10_s, line.p90_s, *line.size.values())

    found = run(read, [measured_lines()], 8, str(path))
    assert found["refused at a line"] > 800
    assert found["read"] > 100


def test_measured_lines_that_are_read_become_tables_or_one_line(tmp_path: Path) -> None:
    path, rng = tmp_path / "measured.jsonl", np.random.default_rng(9)
    made = 0
    for _ in range(200):
        put(path, damaged(measured_lines(), rng))
        try:
            tables = tables_of(read_lines([path]), System("mybox"))
        except MoesimError as error:
            assert error.exit_code == 2
            assert "\n" not in error.line()
            continue
        made += 1
        assert all((table["latency_s"] > 0).all() and table["latency_s"].is_finite().all() for table in tables.values())
    assert made > 10


def stored(folder: Path) -> Profile:
    """A profile of two families with errors and physics."""
    arguments = ["import", "published", *(str(folder / name) for name in samples.PUBLISHED), "--system", "h800"]
    for name, text in samples.PUBLISHED.items():
        (folder / name).write_text(text)
    out = folder / "profile"
    CliRunner().invoke(app, [*arguments, "--experts", "256", "--out", str(out)], catch_exceptions=False)
    return Profile(out)


def test_tables_of_the_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = stored(tmp_path).folder
    path = folder / "exchange.parquet"
    whole = path.read_bytes()
    rows = pl.read_parquet(path)
    for odd in (math.nan, math.inf, -1.0, 0.0, None):
        for name in ("latency_s", "tokens"):
            changed = rows.with_columns(
                pl.when(pl.int_range(pl.len()) == 1).then(odd).otherwise(pl.col(name)).alias(name)
            )
            changed.write_parquet(path, statistics=False)
            with pytest.raises(BadInput, match=f"{name} is .* in row 1"):
                Profile(folder).table("exchange")
    for changed, told in (
        (rows.drop("ep"), "'ep' is missing"),
        (rows.with_columns(pl.lit("many").alias("ep")), "wrong type"),
        (rows.with_columns(pl.lit(-8).alias("ep")), "ep is -8 in row 0"),
        (rows.with_columns(pl.lit(None, dtype=pl.String).alias("dtype")), "dtype is None in row 0"),
        (pl.DataFrame({"a": [1]}), "is missing"),
    ):
        changed.write_parquet(path, statistics=False)
        with pytest.raises(BadInput, match=told) as error:
            Profile(folder).table("exchange")
        assert error.value.where == str(path)

    def read(data: bytes) -> Iterable[float]:
        put(path, data)
        table = Profile(folder).table("exchange")
        yield from figures_of(("exchange", row) for row in table.rows(named=True))

    capfd.readouterr()
    found = run(read, [whole], 11, str(path))
    assert capfd.readouterr().err == ""  # Polars panics on some of these, and its threads print their stacks
    assert found["refused"] > 1000


def test_descriptions_of_the_store(tmp_path: Path) -> None:
    folder = stored(tmp_path).folder
    path = folder / "profile.json"
    content = json.loads(path.read_text())
    content["errors"] = {"gemm": {"median": 0.01, "p68": 0.02, "p90": 0.05, "points": 12.0}}
    content["physics"] = {"fused": {"parameters": {"overhead_s": 1e-5, "blend": 1.5}, "limits": {"8": 4096.0}}}
    whole = json.dumps(content, indent=1).encode()

    def read(data: bytes) -> Iterable[float]:
        put(path, data)
        profile = Profile(folder)
        yield 1.0
        for name in profile.description.get("errors", {}):
            yield from (value for value in profile.errors(name).values() if value)
        for kernel in profile.description.get("physics", {}).values():
            yield from (value for part in ("parameters", "limits") for value in kernel[part].values() if value)

    found = run(read, [whole], 12, str(path))
    assert found["refused"] > 500
    assert found["read"] > 200


COMMANDS: dict[str, tuple[str, list[str], Callable[[], str]]] = {
    "nccl-tests": ("run.log", [], samples.nccl_log),
    "deepep": ("run.log", ["--experts", "256", "--ep", "16", "--nodes", "2"], samples.deepep_internode),
    "published": ("figures.csv", ["--experts", "256"], lambda: samples.EXCHANGES),
    "measured": ("measured.jsonl", [], lambda: measured_lines().decode()),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_store_stays_as_it_was(name: str, tmp_path: Path) -> None:
    file, options, sample = COMMANDS[name]
    path, out = tmp_path / file, tmp_path / "profile"
    system = "h100_sxm" if name == "nccl-tests" else "h800"  # the log names its GPU
    arguments = ["import", name, str(path), "--system", system, "--out", str(out), *options]
    path.write_text(sample())
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    first = fingerprint(out)
    rng, refused = np.random.default_rng(13), 0
    for _ in range(WHOLE):
        put(path, damaged(sample().encode(), rng))
        before = fingerprint(out)
        try:
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        except MoesimError as error:
            assert error.exit_code == 2
            assert fingerprint(out) == before
            refused += 1
        else:
            profile = Profile(out)
            for family in profile.families():
                assert list(figures_of((family, row) for row in profile.table(family).rows(named=True)))
        assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
    assert refused > WHOLE // 4
    path.write_text(sample())
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert fingerprint(out) == first
