"""The command line as scripts use it: exit codes, one-line errors, lazy imports, one JSON object."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.cli import run
from tests.scenarios import small, write

BUDGET_HELP_CPU_S = 0.5
BUDGET_IMPORT_CPU_S = 0.3


def cpu_of(*command: str) -> tuple[float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), done.stdout


def test_help_lists_every_command_without_importing_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for line in ("simulate", "place", "tune", "export", "profile", "validate", "report", "systems", "doctor"):
        row = next(row for row in text.splitlines() if row.strip().startswith(line))
        assert len(row.split()) > 2, f"{line} has no help line"


def test_help_is_cheap_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from moesim.cli import run; code = run(['--help']);"
        "heavy = {'torch', 'optuna', 'numba', 'plotly', 'polars', 'numpy', 'simpy'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    best = min(cpu_of("-c", code)[0] for _ in range(3))
    assert best <= BUDGET_HELP_CPU_S


def test_importing_moesim_is_cheap() -> None:
    code = "import sys, moesim; sys.exit(bool({'torch', 'optuna', 'plotly', 'numba'} & set(sys.modules)))"
    assert min(cpu_of("-c", code)[0] for _ in range(3)) <= BUDGET_IMPORT_CPU_S


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["simulate", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["nothing"], 2, "nothing"),
        (["simulate"], 2, "scenario"),
        (["simulate", "x.yaml", "--draws", "-1"], 2, "draws"),
        (["place", "--gpus", "8", "--slots", "64", "--loads", "nowhere.json"], 2, "nowhere.json"),
        (["export", "nowhere.yaml", "--engine", "sglang"], 2, "nowhere.yaml"),
        (["report", "nowhere"], 2, "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    assert told in printed.err.lower()


def changed(tmp_path: Path, **changes: object) -> str:
    return str(write(tmp_path, small(**changes)))


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"model": "nobody/Nothing"}, 2, "nobody/Nothing"),
        ({"colour": "red"}, 2, "colour"),
        ({"cluster": {"system": "h200_sxm", "nodes": 0}}, 2, "cluster"),
        ({"parallel": {"attention_dp": 8, "ep": 4}}, 2, "parallel"),
        ({"placement": {"solver": "greedy", "redundant_experts": 3}}, 1, "redundant_experts"),
        ({"placement": {"solver": "wishful"}}, 2, "wishful"),
        ({"parallel": {"attention_dp": 16, "ep": 16}}, 1, "parallel"),
        ({"cost": {"source": "crystal_ball"}}, 2, "crystal_ball"),
        ({"serving": None}, 2, "serving"),
        ({"routing": {"loads": [{"file": "gone.json"}]}}, 2, "gone.json"),
        ({"policies": {"capacity": {"rule": "switch"}}}, 2, "capacity"),
        ({"cost": {"source": "store"}}, 2, "moesim profile"),
    ],
)
def test_bad_scenarios_are_one_line(
    changes: dict[str, object], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", changed(tmp_path, **changes), "--json", "--draws", "0"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert told in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenario.yaml"]


def test_more_memory_than_the_gpu_has_is_infeasible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big = changed(tmp_path, model="deepseek-ai/DeepSeek-V3", cluster={"system": "h100_sxm", "nodes": 1})
    assert run(["simulate", big, "--draws", "0"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "GB" in line


def test_overrides_set_and_create_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(tmp_path)
    assert run(["simulate", path, "--json", "--draws", "0", "--set", "serving.workload.requests=7"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["requests_completed"] == 7
    assert run(["simulate", path, "--json", "--set", "serving.workload.requests"]) == 2
    assert "key=value" in capsys.readouterr().err
