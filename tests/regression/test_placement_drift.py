"""Recorded drift: the adaptive policy against never and every n, at moves from free to prohibitive."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from moesim.routing.readers import read_loads
from moesim.spec.plan import PlacementRequest
from placement.dynamics.adaptive import Adaptive
from placement.dynamics.hindsight import best_in_hindsight
from placement.dynamics.policies import EVERY, Every, Never
from placement.dynamics.series import Floats, Prices, Run, run
from placement.migrate import fitter
from placement.problem import solve

pytestmark = pytest.mark.data

WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
whole = pytest.mark.skipif(not WHOLE, reason="ten minutes in all: set MOESIM_WHOLE=1")
"""The grid of docs/explanation/placement.md takes long; every run of the tests takes its corners."""

MOST_WORSE = 0.02
"""The adaptive policy may take this much longer than the better of never and the best every-n in hindsight."""

FULL_STEPS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) if WHOLE else (0.1, 1000.0)
"""Time to fill a rank with other experts in all layers, in steps that are even."""


def cells(counts: Floats, ranks: int, slots: int, full_steps: float, bases: list[Run]) -> dict[str, float]:
    """How much longer than the best fixed policy the adaptive one takes, with the length known and unknown."""
    steps, layers, experts = counts.shape
    request = PlacementRequest(
        np.full((1, layers, experts), 1.0 / experts), np.ones(1), np.arange(layers), layers, slots, ranks
    )
    start = solve(request, "contiguous").placement.physical_to_logical
    fit = fitter(request, ranks)
    unit = Prices(1.0, 1.0, 1.0, np.zeros(ranks, dtype=np.int64))
    if not bases:
        bases += [run(policy, counts, start, unit) for policy in (Never(), *(Every(n, fit) for n in EVERY))]
    move_s = full_steps * counts.sum(axis=-1).mean() / slots
    best = min(float(one.step_s.sum() + move_s * one.move_s.sum()) for one in bases)
    prices = Prices(1.0, move_s, move_s, unit.domain)
    found = {}
    for known in (True, False):
        mine = run(Adaptive(prices, fit, ranks, steps if known else None), counts, start, prices)
        found["known" if known else "unknown"] = mine.total_s / best - 1.0
    tables = [table for _, table in mine.tables]
    if len(tables) < 100:
        assert best_in_hindsight(counts, tables, prices) <= mine.total_s * (1.0 + 1e-9)
    return found


@pytest.fixture(scope="module")
def smartmoe(shared_data: Path) -> Floats:
    return read_loads(shared_data / "routing" / "smartmoe_ae_counts_first300.npz").counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "slots"), [*(pytest.param(*one, marks=whole) for one in ((4, 32), (4, 36), (16, 32), (16, 48))), (8, 40)]
)
def test_on_training_iterations_it_never_loses_to_the_better_of_never_and_every_n(
    smartmoe: Floats, ranks: int, slots: int
) -> None:
    bases: list[Run] = []
    for full_steps in FULL_STEPS:
        found = cells(smartmoe, ranks, slots, full_steps, bases)
        print(f"{ranks} ranks, {slots} slots, {full_steps} steps: {found}")
        assert max(found.values()) <= MOST_WORSE
    gained = cells(smartmoe, ranks, slots, 10.0, bases)
    assert max(gained.values()) < 0.0


def test_three_hundred_iterations_take_seconds(smartmoe: Floats) -> None:
    cells(smartmoe[:3], 8, 40, 1.0, [])  # compiled
    request = PlacementRequest(np.full((1, 24, 32), 1 / 32), np.ones(1), np.arange(24), 24, 40, 8)
    start = solve(request, "contiguous").placement.physical_to_logical
    prices = Prices(1.0, 1e5, 1e5, np.zeros(8, dtype=np.int64))
    begun = time.process_time()
    run(Adaptive(prices, fitter(request, 8), 8), smartmoe, start, prices)
    cpu_s = time.process_time() - begun
    print(f"adaptive policy, 300 x 24 layers, 40 slots on 8 ranks: {cpu_s:.2f} CPU s, budget 5 s")
    assert cpu_s <= 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("period", "files"),
    [
        *(pytest.param(period, files, marks=whole) for period in (1, 25, 75) for files in (2, 6)),
        *((pytest.param(0, 6, marks=whole)), pytest.param(5, 6, marks=whole)),
        (0, 2),
        (5, 2),
    ],
)
def test_on_workloads_in_turn_and_on_noise_it_does_not_lose_either(shared_data: Path, period: int, files: int) -> None:
    found = sorted((shared_data / "routing").glob("deepseek_r1_*.json"))
    profiles = [read_loads(path).profile()[::29] for path in (found if files == 6 else (found[0], found[-1]))]
    if period == 0 and files == 2:
        profiles = profiles[:1]
    elif period == 0:
        profiles = [sum(profiles) / 6.0]
    rng = np.random.default_rng(0)
    steps = 150
    which = [0 if period == 0 else step // period % files for step in range(steps)]
    counts = np.stack([[rng.multinomial(32_768, row) for row in profiles[one]] for one in which]).astype(float)
    bases: list[Run] = []
    for full_steps in (0.0, 0.1, 10.0, 1000.0) if WHOLE else (0.1, 1000.0):
        worse = cells(counts, 32, 288, full_steps, bases)
        print(f"{files} workloads, period {period}, {full_steps} steps: {worse}")
        assert max(worse.values()) <= MOST_WORSE
