"""`moesim validate capacity`: tokens dropped on gloo ranks equal the simulated ones, and a wrong rule shows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim import cli
from moesim.routing.capacity.on_ids import Chance, keep_within
from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.routed import Routed, best, softmax, taken

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")

from validate.capacity import run as capacity  # noqa: E402
from validate.capacity.layer import Policy, capacity_in_floats, capacity_of, place, worked_on  # noqa: E402
from validate.capacity.record import holds, table  # noqa: E402
from validate.hardware.group import Beat  # noqa: E402
from validate.replay.alone import Alone  # noqa: E402

pytestmark = pytest.mark.hardware
WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "moesim.cli", "validate", "capacity", *more]
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize(("ranks", "more"), [(2, ("--quick",))] + ([(2, ()), (3, ("--seed", "7"))] if WHOLE else []))
def test_executed_and_simulated_drops_are_the_same_tokens(ranks: int, more: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, "--ranks", str(ranks), "--json", *more)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "runs" / "validate-capacity" / "record.json").read_text())
    print(table(record))
    assert holds(record)
    assert record["cases_that_differ"] == 0
    for name in ("dropped", "moved", "tokens_without_expert", "rows"):
        assert record[name]["simulated"] == record[name]["executed"] > 0
    assert record["largest_weight_error"] < capacity.TELLING / 1000
    seen = {one["name"].partition(" ")[0] for one in record["outcomes"] if one["dropped"]["executed"]}
    assert seen == set(capacity.RULES)
    # Without backups the counts of all ranks together expect what was dropped, though not which tokens.
    counts = record["counts"]
    assert counts["expected_without_backup"] == pytest.approx(counts["dropped_without_backup"], rel=0.02)


class Loopback(Alone):
    """A group of one rank without a process group: what it sends, it gets."""

    def exchange(self, rows: Any, send: list[int], receive: list[int]) -> Any:
        assert send == receive == [len(rows)]
        return rows.clone()

    def exchange_counts(self, counts: Any) -> Any:
        return counts.clone()


def alone(folder: Path, policy: Policy, top_k: int = 2) -> dict[str, Any]:
    case = capacity.Case(policy, top_k, "contiguous", tuple(range(capacity.SHAPE["experts"])), "local_first")
    record = capacity.session(
        capacity.CapacityJob((case,), (40,), 3, str(folder)),
        Loopback(0, 1, torch.device("cpu"), Beat(None)),
        lambda line: None,
    )
    assert record is not None
    return record


WRONG: list[tuple[Policy, dict[str, Any]]] = [
    (Policy("megatron", 0.5, "probability"), {"drop": "position"}),
    (Policy("megatron", 0.5, "probability"), {"factor": 0.7}),
    (Policy("gshard", 1.0, "choice"), {"by_choice": False}),
    (Policy("gshard", 1.0, "choice"), {"rule": "megatron"}),
    (Policy("survey", 1.0, "token"), {"by_choice": True}),
    (Policy("survey", 2.0, "token", most=3), {"max_capacity": 4}),
    (Policy("deepspeed", 0.1, "random"), {"min_capacity": 3}),
    (Policy("deepspeed", 0.5, "random"), {"drop": "probability"}),
    (Policy("switch", 1.0, "token", "random"), {"backup": None}),
    (Policy("switch", 1.0, "token", "next_best"), {"backup": "random"}),
    (Policy("switch", 1.0, "token", "none", pad=True), {"pad": False}),
]


@pytest.mark.parametrize(("policy", "change"), WRONG, ids=[str(change) for _, change in WRONG])
def test_a_simulator_with_another_rule_is_found_out(
    policy: Policy, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holds(alone(tmp_path, policy))
    right = capacity.simulated_rule
    monkeypatch.setattr(capacity, "simulated_rule", lambda one: dataclasses.replace(right(one), **change))
    record = alone(tmp_path, policy)
    assert record["cases_that_differ"] == 1
    assert not holds(record)
    assert record["differences"][0].startswith(policy.rule)


def test_other_random_numbers_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random drops agree only because both sides are given the same numbers."""
    right = capacity._chance
    monkeypatch.setattr(
        capacity, "_chance", lambda job, number, top_k, rank=None: right(job, number + (rank is None), top_k, rank)
    )
    assert alone(tmp_path, Policy("deepspeed", 0.5, "random"), 1)["cases_that_differ"] == 1
    assert alone(tmp_path, Policy("deepspeed", 0.5, "probability"), 1)["cases_that_differ"] == 0


@settings(max_examples=120 if not WHOLE else 3000, deadline=None)
@given(
    seed=st.integers(0, 10_000), tokens=st.integers(1, 40), experts=st.integers(2, 14), top_k=st.integers(1, 5),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.7, 4.0]), rule=st.sampled_from(capacity.RULES),
    keep=st.sampled_from(capacity.KEEPS), backup=st.sampled_from(capacity.BACKUPS), least=st.integers(0, 6),
    most=st.integers(0, 9), fewer=st.sampled_from([0.0, 0.0, 0.3, 0.8]),
)  # fmt: skip
def test_places_on_one_rank_are_the_simulators(
    seed: int, tokens: int, experts: int, top_k: int, factor: float, rule: str, keep: str, backup: str, least: int,
    most: int, fewer: float,
) -> None:  # fmt: skip
    """Of any size: also no places at all, more places than tokens, more choices than there is room for, and tokens that
    ask for fewer experts than others."""
    top_k = min(top_k, experts)
    rng = np.random.default_rng(seed)
    scores = softmax(rng.normal(size=(tokens, experts)) + 2 * rng.normal(size=experts))
    ids = best(scores, top_k)
    ids[rng.random(ids.shape) < fewer] = -1
    weights = taken(scores, ids)
    policy = Policy(rule, factor, keep, backup, False, least, most)
    chance = Chance.draw((tokens, top_k), experts, rng)
    arrays = (ids, weights, scores, chance.turn, chance.second)
    placed = place(policy, *(torch.from_numpy(one) for one in arrays))
    kept = keep_within(
        Routed(ids, weights, experts), capacity.simulated_rule(policy), chance, top_k=top_k, scores=scores
    )
    np.testing.assert_array_equal(placed.expert.numpy(), kept.routed.ids)
    assert placed.capacity == kept.capacity[0]
    rows = placed.place.numpy()
    for expert in range(experts):  # each in a row of its own, from the first on
        mine = np.sort(rows[placed.expert.numpy() == expert])
        assert mine.tolist() == list(range(len(mine)))
        assert len(mine) <= placed.capacity


def test_outputs_tell_who_worked() -> None:
    rng = np.random.default_rng(0)
    contributions = torch.from_numpy(rng.normal(size=(5, 4, 9)))
    weights = torch.from_numpy(np.where(rng.random((5, 4)) < 0.5, rng.random((5, 4)), 0.0))
    y = (weights[:, :, None] * contributions).sum(dim=1)
    np.testing.assert_allclose(worked_on(y, contributions).numpy(), weights.numpy(), atol=1e-12)


def test_capacities_by_hand_and_in_doubles() -> None:
    """Doubles can miss by one where the product is a whole number; the simulator takes the factor as it is written."""
    assert capacity_of(Policy("gshard", 2.0, "choice"), 4096, 64, 2) == 128
    assert capacity_of(Policy("gshard", 100.0, "choice"), 8, 2, 2) == 8
    assert capacity_of(Policy("switch", 1.25, "token"), 512, 4, 1) == 160
    assert capacity_of(Policy("deepspeed", 1.0, "random"), 100, 64, 1) == 4
    assert capacity_of(Policy("megatron", 1.1, "probability"), 4096, 256, 8) == 141
    assert capacity_of(Policy("survey", 1.5, "token", most=500), 4096, 8, 2) == 500
    for rule, factor, tokens, experts, right, doubles in (
        ("megatron", 1.05, 80, 12, 7, 8), ("deepspeed", 1.05, 80, 12, 7, 8), ("gshard", 1.15, 200, 10, 23, 22),
    ):  # fmt: skip
        policy = Policy(rule, factor, "token")
        assert capacity_of(policy, tokens, experts, 1) == right
        assert capacity_in_floats(policy, tokens, experts, 1) == doubles
        assert CapacityRule(rule, factor).capacity(tokens, experts, 1) == right


def test_ranks_that_do_not_divide_the_experts_are_refused(capsys: Any) -> None:
    assert cli.run(["validate", "capacity", "--ranks", "5"]) == 2
    assert "do not divide by 5 ranks" in capsys.readouterr().err
