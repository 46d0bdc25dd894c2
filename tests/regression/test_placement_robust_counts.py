"""DeepSeek-R1 counts that a fit has not seen: what robust reaches, by equal split and by per-batch balancing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.network.choice import following, prepare
from moesim.routing.dispersion import default_dispersion
from moesim.routing.readers import read_loads
from moesim.routing.sample import sample_counts
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, max_over_mean
from placement.judge import balance
from placement.problem import Solved, request_from_loads, solve
from placement.solvers.two_slots import best_pairs

pytestmark = pytest.mark.data

DECODE = ("deepseek_r1_decode_in1000out1000", "deepseek_r1_decode_in2000out100")


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[RoutingCounts]:
    return [read_loads(path) for path in sorted((shared_data / "routing").glob("deepseek_r1_*.json"))]


def fitted(loads: list[RoutingCounts], solver: str, slots: int = 288, ranks: int = 32) -> Solved:
    return solve(request_from_loads(loads, slots=slots, ranks=ranks), solver)


def by_phase(files: list[RoutingCounts], slots: int, solver: str) -> list[tuple[ExpertPlacement, list[RoutingCounts]]]:
    """Fitted to the files of one phase, to be judged on those of the other; both ways."""
    decode = [load for load in files if load.name in DECODE]
    prefill = [load for load in files if load.name not in DECODE]
    pairs = ((prefill, decode), (decode, prefill))
    return [(fitted(fit, solver, slots).placement, judge) for fit, judge in pairs]


def test_each_file_alone_is_packed_even_by_the_default_solver(files: list[RoutingCounts]) -> None:
    for load in files:
        runs = [fitted([load], "greedy") for _ in range(3)]
        assert balance(runs[0].placement, [load]).mean <= 1.001
        assert min(run.solve_cpu_s for run in runs) <= 0.1


def test_one_workload_left_out(files: list[RoutingCounts]) -> None:
    found: dict[str, dict[str, float]] = {"eplb": {}, "robust": {}}
    for left_out in files:
        fit = [load for load in files if load is not left_out]
        for name, by_load in found.items():
            solved = fitted(fit, name)
            by_load[left_out.name] = balance(solved.placement, [left_out]).mean
            assert solved.solve_cpu_s <= 10.0
    print({name: {load: round(value, 4) for load, value in by_load.items()} for name, by_load in found.items()})
    robust, eplb = found["robust"], found["eplb"]
    assert all(robust[name] < eplb[name] - 0.04 for name in robust)
    # Seeds differ by 0.002 in the mean and 0.012 in a fold: the bounds are the figures plus that.
    assert np.mean(list(robust.values())) <= 1.099
    assert robust[DECODE[1]] <= 1.16
    assert robust[DECODE[0]] <= 1.24


def least_spread(files: list[RoutingCounts], left_out: int, replicas: int, ranks: int) -> float:
    """Standard deviation of a rank's load (mean 1), mean over layers, that no fit to the other files could go below.

    What of the left-out file no mix of the others and the even load can tell, with the mix chosen layer by layer in
    hindsight, is a surprise; its squares, taken as known, get the replica counts that make their sum over ranks least.
    """
    seen = np.stack([load.profile() for index, load in enumerate(files) if index != left_out])
    unseen = files[left_out].profile()
    spreads = []
    for layer, load in enumerate(unseen):
        known = np.concatenate([seen[:, layer], np.full((1, len(load)), 1.0 / len(load))]).T
        surprise = (load - known @ np.linalg.lstsq(known, load, rcond=None)[0]) ** 2
        count = np.ones(len(load))
        for _ in range(replicas):
            count[(surprise / (count * (count + 1.0))).argmax()] += 1.0
        spreads.append(np.sqrt((surprise / count).sum() / ranks) * ranks)
    return float(np.mean(spreads))


def test_why_one_decode_workload_stays_above_1_15(files: list[RoutingCounts]) -> None:
    # The expected largest of 32 independent normal loads, drawn, is 2.07 standard deviations above their mean.
    largest = float(np.random.default_rng(0).normal(size=(100_000, 32)).max(axis=1).mean())
    floor = {
        name: 1.0 + largest * least_spread(files, [load.name for load in files].index(name), 32, 32) for name in DECODE
    }
    print({name: round(value, 3) for name, value in floor.items()})
    assert floor[DECODE[0]] > 1.15
    assert floor[DECODE[1]] < 1.15


def test_the_other_phase(files: list[RoutingCounts]) -> None:
    eplb, robust = by_phase(files, 288, "eplb"), by_phase(files, 288, "robust")
    gains = [
        balance(theirs, judge).each - balance(ours, judge).each
        for (theirs, judge), (ours, _) in zip(eplb, robust, strict=True)
    ]
    print([round(gain, 4) for gain in gains])
    assert min(gains) >= 0.04


@pytest.mark.parametrize(("slots", "most"), [(320, 1.04), (384, 1.01)])
def test_the_other_phase_by_per_batch_balancing(files: list[RoutingCounts], slots: int, most: float) -> None:
    """On aggregate counts, and on drawn steps at 128 tokens a rank: fresh, one step late, and in equal parts."""
    aggregate: list[tuple[int, float]] = []
    steps: dict[str, list[float]] = {"lp": [], "stale": [], "equal": []}
    for plan, judge in by_phase(files, slots, "robust"):
        lp, equal = prepare(plan, policy="lp", nodes=1), prepare(plan, policy="equal", nodes=1)
        for load in judge:
            profile = load.profile()
            aggregate.append((len(judge), float(max_over_mean(lp.average_rank_loads(profile[None])).mean())))
            counts = sample_counts(profile, np.full(5, 128 * 32), 8, np.random.default_rng(0), default_dispersion())
            for name, loads in (
                ("lp", lp.rank_loads(counts)),
                ("stale", following(lp, np.concatenate([counts[:1], counts[:-1]])).rank_loads(counts)),
                ("equal", equal.rank_loads(counts)),
            ):
                steps[name].append(float(max_over_mean(loads)[1:].mean()))
    mean = sum(value / size for size, value in aggregate) / 2.0
    told = {name: round(float(np.mean(values)), 3) for name, values in steps.items()}
    print(f"{slots} slots: {mean:.4f} on aggregates; {told} by step")
    assert mean <= most
    assert told["lp"] < told["stale"] < told["equal"]


def test_two_slots_a_rank_are_packed_best_with_a_proof(files: list[RoutingCounts]) -> None:
    """144 GPUs, 288 slots: four layers, each some CPU seconds; greedy is up to 4 % above the optimum."""
    request = request_from_loads(files, slots=288, ranks=144)
    greedy = solve(request, "greedy").placement
    for layer in (0, 20, 30, 50):
        weight = np.ascontiguousarray(request.mix()[layer])
        table, found, bound = best_pairs(weight, 144, greedy.physical_to_logical[layer], 2e-3)
        assert found <= bound * 1.002 * (1.0 + 1e-9)
        assert found < greedy.rank_loads(request.mix())[layer].max() * 0.995
        assert (table.reshape(-1, 2)[:, 0] != table.reshape(-1, 2)[:, 1]).all()
