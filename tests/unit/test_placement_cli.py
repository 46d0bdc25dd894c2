"""`moesim place` and `moesim export` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from moesim import cli
from moesim.spec.maps.frame import MapFrame
from moesim.spec.placement_file import read_placement

CONTRACT = {
    "max_over_mean",
    "holdout",
    "baseline",
    "gain",
    "verdict",
    "solver",
    "solve_cpu_s",
    "slots_per_gpu",
    "duplicates_on_one_gpu",
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Four SGLang JSON files: one dense layer, three MoE layers, 16 experts."""
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0.0, 1.0, (3, 16))
    arguments = []
    for name in ("a", "b", "c", "d"):
        counts = np.zeros((4, 16))
        counts[1:] = 1e5 * shared * rng.lognormal(0.0, 0.3, (3, 16))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"logical_count": counts.round().tolist()}))
        arguments += ["--loads", str(path)]
    return arguments


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_json_holds_the_contract_and_nothing_else_is_on_stdout(files: list[str], capsys, tmp_path: Path) -> None:
    out = tmp_path / "new" / "map.json"
    code, said, _ = call(
        capsys, "place", *files, "--gpus", "4", "--slots", "20", "--out", str(out), "--json", "--seed", "3"
    )
    assert code == 0
    report = json.loads(said)
    assert set(report) >= CONTRACT
    assert report["solver"] == "greedy"
    assert report["slots_per_gpu"] == 5
    assert report["duplicates_on_one_gpu"] == 0
    assert report["baseline"]["solver"] == "contiguous"
    assert report["baseline"]["slots"] == 16
    assert set(report["gain"]) >= {"value", "low", "high"}
    assert report["verdict"]["code"] == "gain"
    placement = read_placement(out)
    assert placement.layer_ids.tolist() == [1, 2, 3]
    assert placement.absolute_layers == 4


def test_the_figure_is_of_the_written_map_on_the_mix_of_all_loads(files: list[str], capsys, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    _, said, _ = call(capsys, "place", *files, "--gpus", "4", "--slots", "20", "--out", str(out), "--json")
    report = json.loads(said)
    mix = np.zeros((3, 16))
    for path in files[1::2]:
        counts = np.asarray(json.loads(Path(path).read_text())["logical_count"])[1:]
        mix += counts / counts.sum(axis=1, keepdims=True) / 4
    written = json.loads(out.read_text())["physical_to_logical"]
    by_layer = []
    for layer, row in enumerate(written):
        ranks = [sum(mix[layer, e] / row.count(e) for e in row[first : first + 5]) for first in (0, 5, 10, 15)]
        by_layer.append(max(ranks) * 4)
    assert report["max_over_mean"]["mean"] == pytest.approx(np.mean(by_layer))
    assert report["max_over_mean"]["worst_layer"] == pytest.approx(max(by_layer))


def test_the_same_seed_says_the_same(files: list[str], capsys) -> None:
    reports = []
    for _ in range(2):
        _, said, _ = call(capsys, "place", *files, "--gpus", "4", "--slots", "20", "--solver", "robust", "--json")
        reports.append(json.loads(said))
        reports[-1].pop("solve_cpu_s")
    assert reports[0] == reports[1]


def test_a_person_reads_a_table_and_a_verdict(files: list[str], capsys) -> None:
    code, said, _ = call(capsys, "place", *files, "--gpus", "4", "--slots", "20")
    assert code == 0
    assert "contiguous" in said
    assert "held out" in said
    assert "Balance is not time" in said


def test_one_snapshot_withholds_the_verdict_and_exits_0(files: list[str], capsys) -> None:
    code, said, _ = call(capsys, "place", *files[:2], "--gpus", "4", "--slots", "16", "--json")
    report = json.loads(said)
    assert code == 0
    assert report["verdict"]["code"] == "withheld"
    assert report["holdout"] is None
    assert report["gain"] == {"value": None, "low": None, "high": None}
    code, said, _ = call(capsys, "place", *files, "--gpus", "4", "--slots", "16", "--holdout", "0", "--json")
    assert json.loads(said)["verdict"]["code"] == "withheld"


def test_steps_of_one_file_are_split(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 50, (10, 2, 8))
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"logical_count": counts.tolist()}))
    code, said, _ = call(capsys, "place", "--loads", str(path), "--gpus", "2", "--slots", "10", "--json")
    assert code == 0
    assert json.loads(said)["holdout"]["by"] == "step"


def test_eplb_reports_its_duplicates(tmp_path: Path, capsys) -> None:
    counts = np.ones((1, 8))
    counts[0, 0] = 100.0
    path = tmp_path / "hot.json"
    path.write_text(json.dumps({"logical_count": counts.tolist()}))
    arguments = ["place", "--loads", str(path), "--gpus", "2", "--slots", "12", "--solver", "eplb"]
    _, said, _ = call(capsys, *arguments, "--json")
    assert json.loads(said)["duplicates_on_one_gpu"] == 3
    _, said, _ = call(capsys, *arguments)
    assert "duplicates_on_one_gpu" in said
    out = tmp_path / "map.json"
    code, _, error = call(capsys, *arguments, "--out", str(out), "--format", "vllm-ascend")
    assert code == 1
    assert "twice on device" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--gpus", "4"], 2, "--slots"),
        (["--slots", "20"], 2, "--gpus"),
        (["--gpus", "0", "--slots", "20"], 2, "above 0"),
        (["--gpus", "3", "--slots", "20"], 1, "use 21 slots"),
        (["--gpus", "4", "--slots", "8"], 1, "at least 16"),
        (["--gpus", "4", "--slots", "20", "--solver", "magic"], 2, "use one of"),
        (["--gpus", "4", "--slots", "20", "--format", "word"], 2, "use one of"),
        (["--gpus", "4", "--slots", "20", "--format", "vllm"], 2, "34297"),
        (["--gpus", "4", "--slots", "20", "--holdout", "1.5"], 2, "below 1"),
        (["--gpus", "4", "--slots", "20", "--loads", "nowhere.json"], 2, "nowhere.json"),
        (["--gpus", "4", "--slots", "20", "--out", "/dev/null/x/map.json"], 2, "cannot write"),
        (["--gpus", "4", "--slots", "20", "--groups", "3", "--nodes", "2"], 1, "do not divide"),
    ],
)
def test_bad_input_is_one_line_that_names_the_mend(
    files: list[str], capsys, arguments: list[str], code: int, text: str
) -> None:
    found, said, error = call(capsys, "place", *files, *arguments, "--json")
    assert found == code
    assert said == ""
    assert error.count("\n") == 1
    assert text in error


def test_no_loads_at_all(capsys) -> None:
    code, _, error = call(capsys, "place", "--gpus", "4", "--slots", "20")
    assert code == 2
    assert "--loads" in error


@pytest.mark.parametrize("form", ["moesim", "sglang", "trtllm", "vllm-ascend"])
def test_every_format_is_written_and_told_by_its_content(files: list[str], capsys, tmp_path: Path, form: str) -> None:
    out = tmp_path / "map.json"  # some engines go by the name, moesim by the content
    code, *_ = call(capsys, "place", *files, "--gpus", "4", "--slots", "20", "--out", str(out), "--format", form)
    assert code == 0
    out = out.rename(tmp_path / "map" if form != "trtllm" else tmp_path / "map.yaml")
    frame = MapFrame(experts=16, layer_ids=(1, 2, 3), absolute_layers=4, ranks=4)
    own = tmp_path / "own.json"
    call(capsys, "place", *files, "--gpus", "4", "--slots", "20", "--out", str(own))
    assert (read_placement(out, frame).physical_to_logical == read_placement(own).physical_to_logical).all()


def test_as_a_process(files: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moesim.cli", "place", *files, "--gpus", "4", "--slots", "20", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["verdict"]["code"] == "gain"


SCENARIO = {
    "model": "deepseek-ai/DeepSeek-V3",
    "cluster": {"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
    "engine": {"name": "sglang", "version": "0.5.14"},
    "routing": {"synthetic": {"kind": "deepseek_like"}},
    "parallel": {"attention_dp": 32, "ep": 32},
    "placement": {"solver": "greedy", "redundant_experts": 32},
    "serving": {
        "workload": {"isl": 2000, "osl": 256, "requests": 10, "arrivals": {"concurrency": 4}},
        "batching": {"max_batch_tokens_per_dp_rank": 512, "max_running_requests_per_dp_rank": 64},
    },
}


@pytest.fixture
def plan(files: list[str], capsys, tmp_path: Path) -> Path:
    call(capsys, "place", *files, "--gpus", "4", "--slots", "20", "--out", str(tmp_path / "placement.json"))
    scenario = {**SCENARIO, "parallel": {"attention_dp": 4, "ep": 4}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"scenario": scenario, "placement": "placement.json", "verdict": "any"}))
    return path


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ("sglang", {"expert_location.json", "launch.txt"}),
        ("trtllm", {"moe_load_balancer.yaml", "extra_llm_api_options.yaml", "launch.txt"}),
        ("vllm", {"launch.txt"}),
        ("vllm-ascend", {"expert_map.json", "launch.txt"}),
    ],
)
def test_export_writes_what_the_engine_loads(plan: Path, capsys, engine: str, names: set[str]) -> None:
    code, said, error = call(capsys, "export", str(plan), "--engine", engine)
    assert code == 0
    assert {Path(line).name for line in said.split()} == names
    assert {path.name for path in (plan.parent / engine).iterdir()} == names
    assert ("34297" in error) == (engine == "vllm")


def test_export_takes_a_bare_map_and_a_folder(plan: Path, capsys, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    code, _, _ = call(capsys, "export", str(plan.parent / "placement.json"), "--engine", "sglang", "--out", str(target))
    assert code == 0
    assert (target / "expert_location.json").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [", "not valid YAML"),
        ("just text", "placement: FILE"),
        ("placement: 3", "placement: FILE"),
        ("placement: missing.json", "missing.json"),
        ("{placement: placement.json, scenario: {model: x}}", "scenario"),
    ],
)
def test_export_names_what_is_wrong_with_a_plan(plan: Path, capsys, text: str, named: str) -> None:
    plan.write_text(text)
    code, said, error = call(capsys, "export", str(plan), "--engine", "sglang")
    assert (code, said) == (2, "")
    assert named in error
    assert not (plan.parent / "sglang").exists()


def test_export_to_megatron_needs_experts_in_order(plan: Path, files: list[str], capsys, tmp_path: Path) -> None:
    code, _, error = call(capsys, "export", str(plan), "--engine", "megatron")
    assert code == 1
    assert "without replicas" in error
    out = str(tmp_path / "plain.json")
    call(capsys, "place", *files, "--gpus", "4", "--slots", "16", "--solver", "contiguous", "--out", out)
    code, _, _ = call(capsys, "export", out, "--engine", "megatron", "--out", str(tmp_path / "megatron"))
    assert code == 0
    assert "--expert-model-parallel-size 4" in (tmp_path / "megatron" / "launch.txt").read_text()


def test_an_unknown_engine_is_named(plan: Path, capsys) -> None:
    code, _, error = call(capsys, "export", str(plan), "--engine", "magic")
    assert code == 2
    assert "sglang, vllm, trtllm, megatron" in error


def test_the_commands_import_nothing_heavy() -> None:
    code = "import sys, placement.cli; print([m for m in ('numpy', 'numba', 'optuna', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
