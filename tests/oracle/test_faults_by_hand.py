"""Dead ranks and instances that go down, with steps of one second: every loss and every end can be written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.engine.batch_state import NONE, Limits, Plan, new_plan, new_ranks, new_requests
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.losses import drop_rank, empty_queue
from moesim.engine.outages import FaultClock
from moesim.engine.serving import Load, serve
from moesim.spec.faults import FaultSpec
from moesim.spec.parallel import ParallelSpec

NEVER = np.nan


class UnitClock(FaultClock):
    """Faults over steps that take a second each, whatever is wrong."""

    def __init__(self, faults: list[dict[str, Any]], ranks: int, instances: int = 1) -> None:
        self.faults = tuple(FaultSpec.read(fault, where="test") for fault in faults)
        self.parallel = ParallelSpec(attention_dp=ranks, ep=ranks)
        self.instances = instances
        self._struck = set()

    def step_s(self, plan: Plan, instance: int, now_s: float) -> float:
        return 1.0


def served(faults, *, isl, osl, ranks, instances=1, arrival_s=None, concurrency=None, max_running=8):
    load = Load(np.asarray(isl), np.asarray(osl), arrival_s=arrival_s, concurrency=concurrency)
    return serve(
        load,
        Limits(max_tokens=100, max_running=max_running, kv_tokens=1000, chunked=True, mixes=False),
        ranks=ranks,
        instances=instances,
        step_time=lambda plan: 1.0,
        faults=UnitClock(faults, ranks, instances),
    )


def test_without_faults_that_have_begun_nothing_changes():
    found = served([{"kind": "dead_rank", "gpu": 0, "from_s": 99}], isl=[10, 10], osl=[3, 3], ranks=2, concurrency=2)
    assert found.finish_s.tolist() == [3.0, 3.0]


def test_a_dead_rank_loses_what_it_runs_and_the_others_go_on():
    # Ranks 0 and 1 read at 0 to 1 and decode from 1 on; rank 1 dies at 1.5, seen at 2.
    found = served([{"kind": "dead_rank", "gpu": 1, "from_s": 1.5}], isl=[10, 10], osl=[4, 4], ranks=2, concurrency=2)
    np.testing.assert_array_equal(found.finish_s, [4.0, NEVER])
    assert found.first_token_s.tolist() == [1.0, 1.0]
    assert found.step_decode_seqs.tolist() == [0, 2, 1, 1]


def test_requests_that_only_wait_move_to_a_rank_alive():
    # One request at a time on each rank: 0 and 1 run, 2 and 3 wait behind them. Rank 1 dies at once after the first
    # step; 1 is lost, 3 moves behind 2 on rank 0: 0 ends at 2, 2 runs from 2 to 4, 3 from 4 to 6.
    found = served(
        [{"kind": "dead_rank", "gpu": 1, "from_s": 0.5}],
        isl=[10] * 4, osl=[2] * 4, ranks=2, arrival_s=np.zeros(4), max_running=1,
    )  # fmt: skip
    np.testing.assert_array_equal(found.finish_s, [2.0, NEVER, 4.0, 6.0])


def test_later_requests_avoid_the_dead_rank_until_it_is_back():
    # Requests in turn to ranks 0, 1, 0, 1: the one at 2 would go to rank 1, which is dead from 1 to 5, so rank 0 takes
    # it; the one at 6 goes to rank 1 again.
    faults = [{"kind": "dead_rank", "gpu": 1, "from_s": 1, "to_s": 5}]
    found = served(faults, isl=[10] * 4, osl=[1] * 4, ranks=2, arrival_s=np.asarray([0.0, 2.0, 4.0, 6.0]))
    assert found.finish_s.tolist() == [1.0, 3.0, 5.0, 7.0]


def test_an_instance_that_goes_down_loses_all_and_comes_back():
    # Both requests run at 1.5: lost at 2. The third waits from 3 until the instance is back at 1.5 + 4, then reads and
    # decodes: 5.5 to 7.5.
    faults = [{"kind": "dead_rank", "gpu": 0, "from_s": 1.5, "recovery_s": 4}]
    found = served(faults, isl=[10] * 3, osl=[5, 5, 2], ranks=2, arrival_s=np.asarray([0.0, 0.0, 3.0]))
    np.testing.assert_array_equal(found.finish_s, [NEVER, NEVER, 7.5])


def test_another_instance_takes_what_comes_meanwhile():
    # Instances in turn: request 2 would go to instance 0, which is down until 9.5; instance 1 takes it.
    faults = [{"kind": "dead_link", "gpu": 0, "link": "nic", "from_s": 0.5, "recovery_s": 9}]
    found = served(faults, isl=[10] * 3, osl=[3, 3, 2], ranks=1, instances=2, arrival_s=np.asarray([0.0, 0.0, 5.0]))
    np.testing.assert_array_equal(found.finish_s, [NEVER, 3.0, 7.0])


def test_an_idle_instance_loses_nothing():
    faults = [{"kind": "dead_rank", "gpu": 0, "from_s": 2, "recovery_s": 1}]
    found = served(faults, isl=[10, 10], osl=[1, 1], ranks=1, arrival_s=np.asarray([0.0, 5.0]))
    assert found.finish_s.tolist() == [1.0, 6.0]


def test_a_closed_loop_sends_another_request_for_each_that_is_lost():
    # One at a time: request 0 is lost at 2 (dead from 1.5); the instance is back at 3.5, and request 1 takes 3 s.
    faults = [{"kind": "dead_rank", "gpu": 0, "from_s": 1.5, "recovery_s": 2}]
    found = served(faults, isl=[10, 10], osl=[5, 3], ranks=1, concurrency=1)
    np.testing.assert_array_equal(found.finish_s, [NEVER, 6.5])


def test_a_run_that_loses_everything_still_ends():
    faults = [{"kind": "dead_rank", "gpu": 0, "from_s": 0.5, "recovery_s": 1}]
    found = served(faults, isl=[10], osl=[5], ranks=1, concurrency=1)
    np.testing.assert_array_equal(found.finish_s, [NEVER])
    assert found.duration_s == 1.5  # when the instance is back, with nothing to do


@pytest.mark.parametrize("seed", range(40))
def test_every_request_is_completed_or_lost(seed):
    rng = np.random.default_rng([34, seed])
    ranks, instances, count = int(rng.integers(2, 5)), int(rng.integers(1, 4)), 60
    faults = [
        {
            "kind": "dead_rank",
            "gpu": int(rng.integers(ranks)),
            "instance": int(rng.integers(instances)),
            "from_s": float(rng.uniform(0, 20)),
        }
        | ({"recovery_s": float(rng.uniform(0.5, 9))} if rng.random() < 0.5 else {})
        for _ in range(int(rng.integers(1, 4)))
    ]
    # Ranks that die one by one must leave one alive.
    faults = [fault for fault in faults if "recovery_s" in fault or fault["gpu"] > 0]
    closed = rng.random() < 0.5
    found = served(
        faults,
        isl=rng.integers(1, 150, count),
        osl=rng.integers(1, 9, count),
        ranks=ranks,
        instances=instances,
        arrival_s=None if closed else np.sort(rng.uniform(0, 30, count)),
        concurrency=12 if closed else None,
        max_running=3,
    )
    done = np.isfinite(found.finish_s)
    assert np.isfinite(found.arrival_s).all()
    assert (found.finish_s[done] >= found.first_token_s[done]).all()
    running_at_a_death = sum(len(fault) > 0 for fault in faults) * ranks * 4  # running and reading, at most
    assert (~done).sum() <= running_at_a_death
    assert len(found.gaps_s) >= (found.osl[done] - 1).sum()


def test_a_rank_that_lost_all_is_empty_and_free():
    """Running, half read and waiting requests: after them nothing is held, counted or queued."""
    requests, group = new_requests(np.asarray([4, 30, 7]), np.asarray([5, 5, 5])), new_ranks(1, 8)
    limits = Limits(max_tokens=20, max_running=8, kv_tokens=60, chunked=True, mixes=False)
    plan, gaps = new_plan(1, 8), np.zeros(64)
    for request in range(3):
        arrive(requests, group, 0, request)
    assert plan_step(requests, group, limits, plan) == 20  # all of request 0, 16 of request 1
    finish_step(requests, group, limits, plan, 1.0, gaps, np.zeros(64, np.int64), 1, np.zeros(16, np.int64))
    assert (group.running_seqs[0], group.reading[0], group.head[0]) == (1, 1, 2)
    assert (group.kv_tokens[0], group.requests_in[0], group.tokens_in[0]) == (9 + 35, 3, 4 + 1 + 30 + 7)
    assert drop_rank(requests, group, 0) == [0, 1]
    assert (group.kv_tokens[0], group.requests_in[0], group.tokens_in[0]) == (0, 1, 7)
    assert empty_queue(requests, group, 0) == [2]
    assert (group.requests_in[0], group.tokens_in[0], group.head[0]) == (0, 0, NONE)
    arrive(requests, group, 0, 2)
    assert plan_step(requests, group, limits, plan) == 7


def test_a_run_with_faults_is_never_the_compiled_one():
    class Table:
        compilable = True

        def __call__(self, plan):
            return 1.0

    load = Load(np.asarray([10]), np.asarray([3]), arrival_s=np.zeros(1))
    faults = UnitClock([{"kind": "dead_rank", "gpu": 0, "from_s": 0.5, "recovery_s": 1}], 1)
    limits = Limits(max_tokens=100, max_running=8, kv_tokens=1000, chunked=True, mixes=False)
    found = serve(load, limits, ranks=1, instances=1, step_time=Table(), faults=faults)
    np.testing.assert_array_equal(found.finish_s, [NEVER])
