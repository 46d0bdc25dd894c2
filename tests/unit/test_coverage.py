"""Which prices of a scenario's steps are measured: what is recorded is what `simulate` asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim import plugins
from moesim.commands.doctor.coverage import percent, summary, table
from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.ops import Attention, ExpertGemm, Gemm, MemoryBound, Operation
from moesim.cost.roofline import Roofline
from moesim.engine.batcher import Limits
from moesim.engine.coverage import REFUSED, Coverage, coverage, prompts, shape_of, sizes_of
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.simulate import simulate
from moesim.errors import OutsideProfile
from moesim.spec.scenario import Scenario
from tests.scenarios import small


def deployment(**changes: Any) -> Deployment:
    return resolve(groundwork(Scenario.model_validate(small(**changes))))


class Watched:
    """A cost model that counts what it is asked for."""

    def __init__(self, costs: Any) -> None:
        self.costs = costs
        self.seen: set[tuple[str, str]] = set()

    def estimate(self, operation: Operation) -> Estimate:
        told: Estimate = self.costs.estimate(operation)
        if told.seconds.any():
            self.seen.add((type(operation).__name__, str(shape_of(operation))))
        return told


@pytest.mark.parametrize("changes", [{}, {"engine": {"name": "vllm"}}, {"policies": {"schedule": "two_batch"}}])
def test_what_is_recorded_is_what_simulate_asks_for(changes: dict[str, Any]) -> None:
    plan = deployment(**changes)
    watched = Watched(plan.ground.costs)
    ground = dataclasses.replace(plan.ground, costs=watched)
    simulate(dataclasses.replace(plan, ground=ground), draws=0)
    assert {(row.kernel, str(row.shape)) for row in coverage(plan)} == watched.seen
    assert watched.seen


def test_the_sizes_reach_over_the_batches_that_may_come() -> None:
    rows = coverage(deployment())
    decode = [row for row in rows if row.phase == "decode" and row.kernel == "Gemm"]
    prefill = [row for row in rows if row.phase == "prefill" and row.kernel == "Gemm"]
    assert max(row.ranges["formula"]["m"][1] for row in decode) == 64.0
    assert max(row.ranges["formula"]["m"][1] for row in prefill) == 2048.0
    attention = [row for row in rows if row.phase == "prefill" and row.kernel == "Attention"]
    assert [row.ranges["formula"]["batch"] for row in attention] == [(1.0, 8.0)]
    assert all(sum(row.shares.values()) == pytest.approx(1.0) for row in rows)


def limits(most: int, *, chunked: bool = True) -> Limits:
    return Limits(max_tokens=most, max_running=64, kv_tokens=10**9, chunked=chunked, mixes=False)


def test_prompts_come_as_the_batcher_plans_them() -> None:
    whole = set(prompts(limits(1000), 500))
    assert whole == {(1, 500.0, 0.0), (2, 500.0, 0.0)}
    cut = set(prompts(limits(1000), 300))
    assert (4, 250.0, 0.0) in cut  # three whole prompts and a third of the fourth
    long = set(prompts(limits(1000), 2500))
    assert {(1, 1000.0, 0.0), (1, 1000.0, 1000.0)} <= long
    assert {seqs for seqs, _, _ in prompts(limits(1000, chunked=False), 700)} == {1}
    assert list(prompts(limits(1000, chunked=False), 1200)) == []  # such a prompt is never read


class Table:
    """A cost model that knows products up to 100 tokens, and no attention."""

    def __init__(self, roofline: Roofline, allow: bool) -> None:
        self.roofline, self.allow = roofline, allow

    def estimate(self, operation: Operation) -> Estimate:
        told = self.roofline.estimate(operation)
        if isinstance(operation, Attention) and not self.allow:
            raise OutsideProfile("attention is not measured", mend="measure attention")
        if isinstance(operation, Gemm):
            beyond = np.broadcast_to(operation.m > 100, told.seconds.shape)
            if beyond.any() and not self.allow:
                raise OutsideProfile("too many tokens", mend=f"measure n={operation.n}")
            tags = np.where(beyond, int(Tag.EXTRAPOLATED), int(Tag.INTERPOLATED)).astype(np.int8)
            return estimate(told.seconds, tags, told.family, told.rel_sigma, "table")
        return told


def with_table(monkeypatch: pytest.MonkeyPatch, extrapolate: str) -> list[Coverage]:
    load = plugins.load

    def found(group: str, name: str, *, where: str = "") -> Callable[..., Any]:
        if group != plugins.COSTS:
            return load(group, name, where=where)
        return lambda scenario, model, cluster: Table(Roofline(cluster), scenario.cost.extrapolate == "allow")

    monkeypatch.setattr(plugins, "load", found)
    return coverage(deployment(cost={"source": "roofline", "extrapolate": extrapolate}))


def test_refused_prices_are_told_apart_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_table(monkeypatch, "refuse")
    attention = [row for row in rows if row.kernel == "Attention"]
    assert [(row.refused, row.mend) for row in attention] == [(1.0, "measure attention")] * 2
    prefill = [row for row in rows if row.kernel == "Gemm" and row.phase == "prefill" and row.refused]
    assert prefill
    for row in prefill:
        assert row.ranges["interpolated"]["m"][1] <= 100.0 < row.ranges[REFUSED]["m"][0]
        assert row.mend == f"measure n={row.shape['n']}"
    decode = [row for row in rows if row.kernel == "Gemm" and row.phase == "decode"]
    assert {tuple(row.shares) for row in decode} == {("interpolated",)}
    found = summary(rows)
    assert (found.state, found.mend) == ("fault", "measure attention")
    assert "nothing prices decode Attention" in found.detail
    shown = "\n".join(table(rows))
    assert "refused; measure attention:" in shown
    assert ": 45.2 %, at m 110..2048" in shown


def test_extrapolated_prices_come_with_the_command_that_measures_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_table(monkeypatch, "allow")
    assert not any(row.refused for row in rows)
    beyond = [row for row in rows if "extrapolated" in row.shares]
    assert {row.kernel for row in beyond} == {"Gemm"}
    assert all(row.mend == f"measure n={row.shape['n']}" for row in beyond)
    assert {row.mend for row in rows if row not in beyond} == {""}
    found = summary(rows)
    assert found.state == "warn"
    assert "beyond the tables: prefill Gemm" in found.detail


def test_a_cost_model_that_never_extrapolates_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(table: Table, roofline: Roofline, allow: bool) -> None:
        table.roofline, table.allow = roofline, False

    monkeypatch.setattr(Table, "__init__", strict)
    rows = with_table(monkeypatch, "allow")
    assert {row.refused for row in rows if row.kernel == "Attention"} == {1.0}


def test_what_is_fixed_and_what_is_a_size() -> None:
    tokens = np.ones((3, 2, 5))
    op = ExpertGemm(tokens, 8, 4, 16, 2, "bf16", "fused")
    assert shape_of(op) == {
        "hidden": 8, "intermediate": 4, "experts": 16, "top_k": 2, "dtype": "bf16", "grouping": "fused",
        "local_experts": 5,
    }  # fmt: skip
    assert sizes_of(op, (3, 2))["tokens"].tolist() == [[5.0, 5.0]] * 3
    assert shape_of(MemoryBound(np.ones(3), "norm")) == {"name": "norm"}


def row(kernel: str, shares: dict[str, float], shape: dict[str, Any] | None = None, phase: str = "decode") -> Coverage:
    return Coverage(phase, kernel, shape or {}, 100, shares, {label: {"m": (1.0, 8.0)} for label in shares}, (), "")


def test_the_table_folds_what_is_formula_throughout() -> None:
    rows = [
        row("Gemm", {"measured": 0.5, "interpolated": 0.5}, {"n": 1}),
        row("MemoryBound", {"formula": 1.0}, {"name": "norm"}),
        row("MemoryBound", {"formula": 1.0}, {"name": "rope"}),
        row("MemoryBound", {"formula": 1.0}, {"name": "norm"}, phase="prefill"),
    ]
    lines = table(rows)
    assert [line.split()[:3] for line in lines[2:]] == [
        ["decode", "Gemm", "n=1"], ["decode", "MemoryBound", "of=norm,"], ["prefill", "MemoryBound", "name=norm"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:]}) == 1
    found = summary(rows)
    assert (found.state, found.detail) == (
        "ok",
        "3 kernels and shapes, 400 prices over all batch sizes: 12.5 % measured, 12.5 % interpolated, 75 % formula",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.0001, "under 0.1 %"), (0.9999, "99.9 %"), (1.0, "100 %"), (0.123, "12.3 %")]
)
def test_shares_never_round_to_nothing_or_all(share: float, text: str) -> None:
    assert percent(share) == text
