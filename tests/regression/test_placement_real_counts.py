"""DeepSeek-R1 counts: the figures of the published algorithm, and what the solvers must reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts
from placement.judge import balance
from placement.problem import request_from_loads, solve

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[RoutingCounts]:
    return [read_loads(path) for path in sorted((shared_data / "routing").glob("deepseek_r1_*.json"))]


def chosen(files: list[RoutingCounts], which: str) -> list[RoutingCounts]:
    return [load for load in files if which in load.name]


# The EPLB table measured with DeepSeek's own code: (fit on, slots, GPUs, nodes, groups, on the mix, each workload).
PUBLISHED = [
    ("prefill", 288, 32, 1, 1, 1.007, 1.089),
    ("decode", 288, 32, 1, 1, 1.008, 1.107),
    ("", 288, 32, 1, 1, 1.007, 1.161),
    ("", 288, 32, 4, 8, 1.210, 1.356),
    ("", 288, 144, 18, 8, 1.157, 1.555),
    ("", 320, 32, 1, 1, 1.007, 1.148),
]


@pytest.mark.parametrize(("which", "slots", "gpus", "nodes", "groups", "mix", "each"), PUBLISHED)
def test_eplb_reproduces_the_published_algorithm(
    files: list[RoutingCounts], which: str, slots: int, gpus: int, nodes: int, groups: int, mix: float, each: float
) -> None:
    loads = chosen(files, which)
    request = request_from_loads(loads, slots=slots, ranks=gpus, nodes=nodes, groups=groups)
    found = balance(solve(request, "eplb").placement, loads)
    assert found.mean == pytest.approx(mix, abs=0.002)
    assert found.each == pytest.approx(each, abs=0.002)


def test_the_default_solver_reaches_its_figures(files: list[RoutingCounts]) -> None:
    solved = solve(request_from_loads(files, slots=288, ranks=32))
    assert solved.placement.solver == "greedy"
    assert balance(solved.placement, files).mean <= 1.001
    assert solved.solve_cpu_s <= 0.3
    assert solved.placement.duplicates_on_one_rank() == 0
