"""Bundles: what goes in comes out, anything else is one line, and a bundle imports like its files of lines."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.errors import BadInput
from profiles.bundle import MANIFEST, TOPOLOGY, read_any, read_bundle, write_bundle
from profiles.cli import app
from profiles.groups import PRETENDED
from profiles.machine import network_cards
from profiles.store import open_profile

MUTATIONS = 2000


def line(family: str, key: dict[str, Any], size: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "format": "moesim-measured", "schema_version": 1, "family": family, "key": key, "size": size,
        "kernel": "gloo", "device": "a box", "latency_s": 2e-4, "p10_s": 1e-4, "p90_s": 3e-4, "repeats": 5,
        "run": {"date": "2026-11-25T00:00:00+00:00", "torch": "2.13.0"}, **changes,
    }  # fmt: skip


HERE = {"path": "gloo", "gpus": 2, "nodes": 1}
UNEVEN = line(
    "uneven_all_to_all",
    {**HERE, "busiest_bytes": 900, "other_way_bytes": 100, "off_node_bytes": 0, "kept_bytes": 0},
    {"bytes": 500.0},
)
OVERLAP = line(
    "overlap", {**HERE, "work": "all_to_all", "beside": "gemm bf16 m=1 n=2 k=3"}, {"bytes": 1024.0},
    values={"slowdown": 1.5, "beside_slowdown": 1.1},
)  # fmt: skip
EVEN = line("collective", {**HERE, "kind": "all_to_all"}, {"bytes": 1024.0})


def text(*lines: dict[str, Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


def bundle(path: Path) -> Path:
    files = {"collectives.jsonl": text(EVEN, UNEVEN, OVERLAP), "kernels.jsonl": text(line("norm", {"h": 1}, {"t": 1}))}
    write_bundle(path, files, {"device": "a box", "complete": True}, topology="GPU0 GPU1\n")
    return path


def test_a_bundle_gives_back_its_lines_and_where_they_come_from(tmp_path: Path) -> None:
    path = bundle(tmp_path / "node.zip")
    lines, manifest = read_bundle(path)
    assert [one.family for one in lines] == ["collective", "uneven_all_to_all", "overlap", "norm"]
    assert lines[2].values == {"slowdown": 1.5, "beside_slowdown": 1.1}
    assert manifest["device"] == "a box"
    assert [file["lines"] for file in manifest["files"]] == [3, 1]
    with zipfile.ZipFile(path) as archive:
        assert archive.read(TOPOLOGY) == b"GPU0 GPU1\n"
    assert bundle(tmp_path / "again.zip").read_bytes() == path.read_bytes()


def test_a_bundle_imports_and_its_tables_hold_every_figure(tmp_path: Path) -> None:
    path, out = bundle(tmp_path / "node.zip"), tmp_path / "profile"
    arguments = ["import", "measured", str(path), "--system", "box", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    opened = open_profile(str(out), "box")
    row = opened.table("uneven_all_to_all").row(0, named=True)
    assert (row["busiest_bytes"], row["other_way_bytes"], row["bytes"], row["latency_s"]) == (900, 100, 500.0, 2e-4)
    row = opened.table("overlap").row(0, named=True)
    assert (row["work"], row["slowdown"], row["beside_slowdown"]) == ("all_to_all", 1.5, 1.1)
    assert opened.table("collective").height == 1  # what ran beside something prices nothing alone
    assert opened.description["bundles"][0]["device"] == "a box"


def test_lines_and_bundles_may_be_mixed_and_pretended_hosts_are_refused(tmp_path: Path) -> None:
    lines = tmp_path / "more.jsonl"
    lines.write_bytes(text({**EVEN, "run": {**EVEN["run"], PRETENDED: 2}}))
    found, manifests = read_any([bundle(tmp_path / "node.zip"), lines])
    assert len(found) == 5 and len(manifests) == 1
    arguments = ["import", "measured", str(lines), "--system", "box", "--out", str(tmp_path / "p")]
    with pytest.raises(BadInput, match="hosts that were pretended; measure again without MOESIM_PRETEND_HOSTS"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "the values of overlap are slowdown, beside_slowdown"),
        ({"slowdown": 1.0}, "the values of overlap"),
        ({"slowdown": 0.0, "beside_slowdown": 1.0}, "values.slowdown is 0.0"),
    ],
)
def test_an_overlap_without_its_figures_is_refused(values: dict[str, float], words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text({**OVERLAP, "values": values}))
    with pytest.raises(BadInput, match=words):
        read_any([path])


def rewritten(path: Path, changes: dict[str, bytes | None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **changes}.items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernels.jsonl": None}, "kernels.jsonl is missing"),
        ({"kernels.jsonl": b""}, "kernels.jsonl is not as it was written"),
        ({MANIFEST: None}, "no manifest.json of a moesim-bundle"),
        ({MANIFEST: b"[]"}, "no manifest.json"),
        ({MANIFEST: b'{"format": "moesim-bundle", "schema_version": 2}'}, "schema version 2"),
        ({MANIFEST: b'{"format": "moesim-bundle", "schema_version": 1, "files": [1]}'}, "does not name its files"),
        ({MANIFEST: b'{"format": "moesim-bundle", "schema_version": 1, "files": []}'}, "no measurement here"),
    ],
)
def test_a_bundle_that_was_changed_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = bundle(tmp_path / "node.zip")
    rewritten(path, changes)
    with pytest.raises(BadInput, match=words) as error:
        read_any([path])
    assert str(path) in error.value.line() and "\n" not in error.value.line()


def test_a_wrong_line_in_a_bundle_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "node.zip"
    write_bundle(path, {"kernels.jsonl": text(EVEN, {**EVEN, "latency_s": -1.0})}, {})
    with pytest.raises(BadInput, match=r"node.zip/kernels.jsonl:2: latency_s is -1.0"):
        read_any([path])


def test_a_bundle_that_claims_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.zip"
    write_bundle(path, {"kernels.jsonl": bytes(2**20)}, {})
    monkeypatch.setattr("profiles.bundle.MOST_BYTES", 2**20)
    with pytest.raises(BadInput, match="more than 1048576 bytes of content"):
        read_any([path])


def test_mutated_bundles_give_their_lines_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    good = bundle(tmp_path / "node.zip").read_bytes()
    path = tmp_path / "bad.zip"
    refused = 0
    for _ in range(MUTATIONS):
        content = bytearray(good)
        at, kind = int(rng.integers(2, len(content))), int(rng.integers(4))
        if kind == 0:
            for where in rng.integers(2, len(content), size=int(rng.integers(1, 6))):
                content[int(where)] = int(rng.integers(256))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + int(rng.integers(1, 60))]
        else:
            content[at:at] = rng.integers(0, 256, size=int(rng.integers(1, 20)), dtype=np.uint8).tobytes()
        path.write_bytes(content)
        try:
            read_any([path])
        except BadInput as error:
            assert str(path) in error.line() and "\n" not in error.line()
            refused += 1
    assert refused > MUTATIONS // 2


def test_network_cards_are_read_from_the_kernel(tmp_path: Path) -> None:
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    for name, real in (("eth0", True), ("lo", False)):
        card = tmp_path / "net" / name
        card.mkdir(parents=True)
        (card / "speed").write_text("100000\n")
        if real:
            (card / "device").mkdir()
    assert network_cards(tmp_path) == [
        {"card": "mlx5_0", "port": "1", "rate": "400 Gb/sec (4X NDR)"}, {"card": "eth0", "rate": "100000 Mb/sec"},
    ]  # fmt: skip
