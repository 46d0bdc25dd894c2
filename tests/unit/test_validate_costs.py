"""Curves, expert costs and the traffic of an exchange."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.spec.plan import ExpertPlacement
from profiles.traffic import shared_with, traffic
from validate.hardware.costs import fit_grouped, fit_loop, in_company, rising
from validate.hardware.job import Job, LayerShape, PlacedCase
from validate.hardware.layer import OPERATIONS, replica_routes
from validate.hardware.predict import execute, layer_graph
from validate.hardware.probe import around, with_fewer
from validate.hardware.record import layer_samples
from validate.hardware.sampling import intervals, probe_sizes


def test_a_curve_interpolates_and_says_where_it_does_not() -> None:
    seconds, tags = rising([10, 20, 40], [1.0, 2.0, 3.0]).at(np.array([15.0, 40.0, 60.0]))
    assert seconds.tolist() == [1.5, 3.0, 4.0]
    assert tags.tolist() == [Tag.INTERPOLATED, Tag.INTERPOLATED, Tag.EXTRAPOLATED]


def test_scatter_does_not_make_a_larger_size_quicker() -> None:
    assert rising([1, 2, 3], [1.0, 3.0, 2.0]).seconds.tolist() == [1.0, 2.5, 2.5]


def test_loop_cost_adds_experts_and_skips_idle_ones() -> None:
    cost = fit_loop([np.array([1, 1]), np.array([10, 0])], [0.2, 1.0])
    seconds, tags = cost.at(np.array([[10.0, 1.0], [0.0, 1.0], [0.0, 0.0], [20.0, 0.0]]))
    assert seconds.tolist() == pytest.approx([1.1, 0.1, 0.0, 2.0])
    assert tags.tolist() == [Tag.INTERPOLATED] * 3 + [Tag.EXTRAPOLATED]


def test_loop_cost_tells_what_the_first_expert_takes_longer() -> None:
    """Samples of fewer experts at the same mean rows; start and curve are found as they were put in."""
    wide = [around(size, reach, 16) for size, reach in ((1, 0), (2, 0), (5, 0), (20, 4), (60, 10))]
    shapes = [*wide, *with_fewer(wide)]
    assert len(shapes) == 10
    seconds = [3e-4 + sum(4e-4 + 3e-5 * rows for rows in one.tolist()) for one in shapes]
    cost = fit_loop(shapes, seconds)
    assert cost.start_s == pytest.approx(3e-4)
    assert cost.curve.seconds.tolist() == pytest.approx([4e-4 + 3e-5 * size for size in (1, 2, 5, 20, 60)])
    assert cost.at(np.array([[0.0, 0.0], [2.0, 20.0]]))[0].tolist() == pytest.approx([0.0, 3e-4 + 8e-4 + 22 * 3e-5])


@given(st.integers(1, 500), st.integers(0, 100), st.integers(1, 32))
def test_sizes_around_a_point_have_it_as_their_mean(size: int, reach: int, count: int) -> None:
    found = around(size, min(reach, size - 1), count)
    assert found.sum() == size * count
    assert found.min() >= 1
    assert len(found) == count


def test_a_start_takes_no_longer_than_the_shortest_sample() -> None:
    """Scatter can tell more; the curve of an expert is never below nothing."""
    cost = fit_loop([np.full(16, 1), np.full(2, 1), np.full(1, 40)], [1.0e-3, 1.2e-3, 0.9e-3])
    assert cost.start_s == 0.9e-3
    assert (cost.curve.seconds >= 0.0).all()


def test_few_experts_tell_no_start() -> None:
    assert with_fewer([np.array([4, 4])]) == []
    assert fit_loop([np.array([4, 4])], [0.2]).start_s == 0.0


def test_grouped_cost_finds_the_parts_it_was_made_of() -> None:
    rng = np.random.default_rng(0)
    histograms = [rng.integers(0, 2, size=8) * rng.integers(1, 50, size=8) for _ in range(20)]
    seconds = [1e-3 + 2e-4 * (h > 0).sum() + 3e-6 * h.sum() for h in histograms]
    cost = fit_grouped(histograms, seconds)
    assert (cost.fixed_s, cost.per_expert_s, cost.per_row_s) == pytest.approx((1e-3, 2e-4, 3e-6))
    assert cost.at(np.zeros(8))[0] == 0.0


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_traffic_loses_no_row(ranks: int, per_rank: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 9, size=(ranks, ranks * per_rank))
    found = traffic(counts)
    assert found.sent.sum() == found.received.sum()
    assert (found.sent + found.kept == counts.sum(axis=1)).all()
    assert (found.received + found.kept == counts.sum(axis=0).reshape(ranks, -1).sum(axis=1)).all()
    assert found.busiest(0.0) == max(found.sent.max(), found.received.max())
    assert found.busiest(1.0) == pytest.approx((found.sent + found.received).max() / 2)


def test_an_even_exchange_is_its_own_equal() -> None:
    found = traffic(np.full((2, 4), 3))
    assert [found.busiest(share) for share in (0.0, 0.4, 1.0)] == pytest.approx([6.0] * 3)


def test_one_way_exchanges_tell_whether_directions_take_turns() -> None:
    even = rising([0, 100, 200], [0.0, 1.0, 2.0])
    assert shared_with(even.sizes, even.seconds, [100, 200], [1.0, 2.0]) == 0.0
    assert shared_with(even.sizes, even.seconds, [100, 200], [0.5, 1.0]) == 1.0
    assert shared_with(even.sizes, even.seconds, [], []) == 0.0


def test_probe_sizes_keep_off_the_test_sizes() -> None:
    sizes = probe_sizes(1, 100, 5, {1, 10, 100})
    assert not {1, 10, 100} & set(sizes)
    assert sizes == sorted(set(sizes))


def test_a_collective_is_timed_from_when_the_last_rank_comes() -> None:
    moments = np.array([[[0.0, 1.0, 4.0]], [[0.0, 3.0, 4.5]]])  # [ranks, repeats, marks]
    spent, waited = intervals(moments, (False, True))
    assert spent[:, 0].tolist() == [[1.0, 1.0], [3.0, 1.5]]
    assert waited[:, 0].tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_a_late_start_is_no_part_of_the_layer() -> None:
    # Two ranks, each 1 s of gate and permute, together at the exchange: 1 s; experts 2 s; combine 1 s; unpermute 1 s.
    in_time = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 5.0, 6.0])
    late = np.array([0.7, 1.2, 1.7, 2.7, 4.7, 5.7, 6.7])
    in_time[3:] += 0.7  # the exchange begins when the late rank comes
    moments = np.stack([in_time, late])[:, None, None, :]
    assert layer_samples(moments).tolist() == [[pytest.approx(6.0)]]


def test_the_predicted_layer_is_the_slowest_path() -> None:
    seconds = np.zeros((1, 2, len(OPERATIONS)))
    seconds[0, :, OPERATIONS.index("permute")] = [1.0, 2.0]
    seconds[0, :, OPERATIONS.index("dispatch")] = 1.0
    seconds[0, :, OPERATIONS.index("experts")] = [5.0, 1.0]
    seconds[0, :, OPERATIONS.index("unpermute")] = [0.5, 0.25]
    found = execute(seconds, np.repeat(seconds[:, None], 5, axis=1), np.zeros((1, len(OPERATIONS)), dtype=np.int8))
    assert found.layer_s.tolist() == [[8.5, 8.5, 8.5]] and found.of_medians_s.tolist() == [8.5]
    assert found.wait_s.tolist() == [[1.0, 4.0]]
    assert [task.collective for task in layer_graph(seconds).tasks] == [False, False, True, False, True, False]


def test_who_is_left_alone_goes_on_quicker() -> None:
    # Both at half speed for 2 s; then the second one is alone, and its other 4 s take 2 s.
    assert in_company(np.array([2.0, 6.0]), 0.5).tolist() == [2.0, 4.0]
    assert in_company(np.array([6.0, 2.0]), 1.0).tolist() == [6.0, 2.0]
    assert in_company(np.array([5.0]), 0.5).tolist() == [5.0]
    # Three ranks: 1 s all, 1 s of work at three quarters (one of two others is left), 1 s at half.
    assert in_company(np.array([[3.0, 1.0, 2.0]]), 0.5).tolist() == [[2.25, 1.0, 1.75]]


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), st.floats(0.1, 1.0))
def test_company_never_changes_who_is_last_and_nobody_is_slowed(seconds: list[float], alone: float) -> None:
    found = in_company(np.asarray(seconds), alone)
    assert (found <= np.asarray(seconds) + 1e-12).all() and (found >= alone * np.asarray(seconds) - 1e-12).all()
    assert found.max() == found[int(np.argmax(seconds))]
    assert found.min() == pytest.approx(min(seconds))


def test_the_median_of_the_later_of_two_ranks_is_not_the_later_median() -> None:
    # Experts take 1 or 3 s on either rank, by chance; three times in four one of the two takes 3 s.
    runs = np.zeros((1, 4, 2, len(OPERATIONS)))
    runs[0, :, :, OPERATIONS.index("experts")] = [[1.0, 1.0], [1.0, 3.0], [3.0, 1.0], [3.0, 3.0]]
    found = execute(np.median(runs, axis=1), runs, np.zeros((1, len(OPERATIONS)), dtype=np.int8))
    assert found.of_medians_s.tolist() == [2.0]
    assert found.layer_s[0, 1] == 3.0
    assert found.spread_s[0, 0, OPERATIONS.index("experts")].tolist() == [1.0, 3.0]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_routes_lead_only_to_replicas_of_the_expert(
    ranks: int, per_rank: int, spare: int, seed: int, local: bool
) -> None:
    experts = ranks * per_rank
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, size=spare * ranks)])
    table = rng.permutation(slots).astype(np.int64)
    placement = ExpertPlacement(table[None], np.zeros(1, dtype=np.int64), experts, ranks, 1)
    for rank in range(ranks):
        routes, count = replica_routes(
            table, experts=experts, ranks=ranks, rank=rank, replica="local_first" if local else "equal"
        )
        assert (table[routes] == np.arange(experts)[:, None]).all()
        mine = table.reshape(ranks, -1)[rank]
        for expert in range(experts):
            used = set(routes[expert, : count[expert]].tolist())
            held = int((mine == expert).sum())
            assert len(used) == count[expert]
            assert count[expert] == (held if local and held else placement.replica_counts()[0, expert])


def test_a_job_survives_the_journey_to_a_rank() -> None:
    job = Job(
        backend="gloo",
        ranks=1,
        shape=LayerShape(hidden=8, intermediate=8, experts=2, top_k=1),
        tokens=(1, 3),
        profile=(0.1, 0.9),
        profile_source="here",
        placements=(PlacedCase(name="a", slots=(0, 1), replicas=0), PlacedCase(name="b", slots=(1, 0), replicas=0)),
        out=".",
    )
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert [(case.name, tokens) for case, tokens in job.cases()] == [("a", 1), ("b", 1), ("a", 3), ("b", 3)]
