"""Real DeepSeek-R1 counts placed, written for every engine, held to its rules, and taken from one engine to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim import cli
from moesim.spec.hf import load_model
from moesim.spec.maps.frame import MapFrame
from moesim.spec.placement_file import read_placement
from tests import engine_maps
from tests.engine_maps import held_by

pytestmark = pytest.mark.data

MODEL, RANKS, SLOTS = "deepseek-ai/DeepSeek-R1", 32, 288
NAMES = {"moesim": "map.json", "sglang": "map.json", "trtllm": "map.yaml", "vllm-ascend": "map.json"}


def test_a_real_map_goes_through_every_engine(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(MODEL)
    layers, experts = list(model.moe.layer_ids), model.moe.experts
    loads = [
        part for file in sorted((shared_data / "routing").glob("deepseek_r1_*.json")) for part in ("--loads", str(file))
    ]
    asked = ["place", *loads, "--gpus", str(RANKS), "--slots", str(SLOTS), "--holdout", "0", "--json"]
    for form, name in NAMES.items():
        assert cli.run([*asked, "--out", str(tmp_path / form / name), "--format", form]) == 0
    capsys.readouterr()
    own = read_placement(tmp_path / "moesim" / "map.json")
    assert (own.layers, own.absolute_layers, own.redundant) == (58, 61, 32)
    for form, name in NAMES.items():
        found = read_placement(tmp_path / form / name, MapFrame.of(model, RANKS))
        assert held_by(found) == held_by(own)
        for engine in ("sglang", "trtllm", "vllm-ascend"):
            out = tmp_path / f"{form} to {engine}"
            given = [] if form == "moesim" else ["--model", MODEL, "--gpus", str(RANKS)]
            assert cli.run(["export", str(tmp_path / form / name), "--engine", engine, *given, "--out", str(out)]) == 0
            files = [Path(line) for line in capsys.readouterr().out.splitlines()]
            held = engine_maps.loaded(engine, files, ep=RANKS, hidden_layers=61, moe_layers=layers, experts=experts)
            assert held == held_by(own)
    rows = json.loads((tmp_path / "sglang" / "map.json").read_text())["physical_to_logical_map"]
    assert rows[0] == [slot % 256 for slot in range(SLOTS)]  # a dense layer, as SGLang itself lays it out
