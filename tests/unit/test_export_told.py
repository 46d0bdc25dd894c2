"""What is said beside a map (--model, --gpus, --nodes) is in the launch file; what is not is asked for at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export import sglang
from placement.export.engines import write_map
from tests.scenarios import small

MODEL = "deepseek-ai/DeepSeek-R1"


def plain(ranks: int) -> ExpertPlacement:
    return ExpertPlacement(
        physical_to_logical=np.tile(np.arange(256), (58, 1)), layer_ids=np.arange(3, 61), experts=256, ranks=ranks,
        absolute_layers=61, solver="contiguous",
    )  # fmt: skip


def launched(folder: Path, engine: str, *told: str) -> str:
    write_map(plain(32), "moesim", folder / "map.json")
    given = ["export", str(folder / "map.json"), "--engine", engine, "--out", str(folder / engine), *told]
    assert run(given) == 0
    return (folder / engine / "launch.txt").read_text()


def test_sglang_gets_the_model_and_the_nodes(tmp_path: Path) -> None:
    text = launched(tmp_path, "sglang", "--model", MODEL, "--gpus", "32", "--nodes", "4")
    for wanted in (f"--model-path {MODEL}", "--nnodes 4", "--node-rank $NODE_RANK", "--ep-size 32", "4 nodes"):
        assert wanted in text
    assert "# incomplete: a map does not know batching and memory\n" in text


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [("trtllm", f"trtllm-serve {MODEL} "), ("vllm", f"vllm serve {MODEL} "), ("vllm-ascend", f"vllm serve {MODEL} ")],
)
def test_the_other_engines_get_the_model(tmp_path: Path, engine: str, wanted: str) -> None:
    text = launched(tmp_path, engine, "--model", MODEL)
    assert wanted in text
    assert "# incomplete: a map knows neither the nodes (--nodes) nor batching and memory\n" in text


def test_what_is_not_said_is_named(tmp_path: Path) -> None:
    text = launched(tmp_path, "sglang")
    assert "neither the model (--model) nor the nodes (--nodes) nor batching and memory" in text
    assert "--model-path" not in text
    assert "--nnodes" not in text


def test_nodes_that_are_not_equal_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_map(plain(32), "moesim", tmp_path / "map.json")
    for nodes in ("5", "0"):
        given = ["export", str(tmp_path / "map.json"), "--engine", "sglang", "--out", str(tmp_path / "o")]
        assert run([*given, "--nodes", nodes]) == 2
        assert f"32 ranks are not equal parts on {nodes} nodes" in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("form", "name"), [("sglang", "map.json"), ("trtllm", "map.yaml")])
def test_model_and_ranks_are_asked_for_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str
) -> None:
    write_map(plain(32), form, tmp_path / name)
    assert run(["export", str(tmp_path / name), "--engine", "sglang"]) == 2
    error = capsys.readouterr().err
    assert "does not name its model or say over how many ranks its slots lie" in error
    assert "--model and --gpus" in error


def of(**parallel: int) -> Scenario:
    return Scenario.read(
        small(model=MODEL, cluster={"system": "h200_sxm", "nodes": 1}, parallel=parallel, precision={}),
        where="test",
    )


def test_sglang_translates_ids_only_where_it_gets_a_map() -> None:
    """Without EP it fuses DeepSeek's shared expert as id 256, which the table of 256 experts lacks."""
    alone = " ".join(sglang.launch(plain(1), of(tp=8, attention_dp=1, ep=1, expert_tp=8)))
    assert "--ep-size 1" in alone
    assert "--init-expert-location" not in alone
    assert "--ep-dispatch-algorithm" not in alone
    spread = " ".join(sglang.launch(plain(8), of(attention_dp=8, ep=8)))
    assert "--init-expert-location" in spread
    assert "--ep-dispatch-algorithm static" in spread
    assert "--ep-dispatch-algorithm static" in " ".join(sglang.launch(plain(8), None))
    assert "--ep-dispatch-algorithm" not in " ".join(sglang.launch(plain(1), None))
