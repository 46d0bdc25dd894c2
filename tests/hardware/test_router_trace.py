"""The script that trains a router and traces it, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.routing.readers import read_loads
from profiles import router_trace

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

SMALL = (
    "--layers", "2", "--experts", "8", "--top-k", "2", "--width", "16", "--heads", "2", "--expert-width", "16",
    "--sequence", "16", "--batch", "4", "--steps", "50", "--traced-requests", "6", "--requests-per-step", "2",
)  # fmt: skip


def test_the_same_seed_traces_the_same_picks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(20):
        (text / f"f{index}.py").write_text(f"def function_{index}(argument):\n    return argument + {index}\n" * 9)
    for name in ("a", "b"):
        assert router_trace.main(["--out", str(tmp_path / f"{name}.parquet"), "--text", str(text), *SMALL]) == 0
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    loads = read_loads(tmp_path / "a.parquet", tokens=True)
    assert loads.counts.shape == (3, 2, 8)
    assert loads.counts.sum(axis=(0, 2)).tolist() == [6 * 16 * 2] * 2
    assert loads.tokens is not None and loads.tokens.follows
    assert loads.tokens.request is not None
    assert np.array_equal(np.unique(loads.tokens.request), np.arange(6))
    told = json.loads((tmp_path / "a.json").read_text())
    assert len(told["traced_files"]) == 2
    assert 0.0 < told["train_bits_per_byte"] < 8.0
    assert "bits a byte" in capsys.readouterr().err


def test_a_folder_without_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert router_trace.main(["--out", str(tmp_path / "t.parquet"), "--text", str(tmp_path)]) == 2
    assert "too few" in capsys.readouterr().err
