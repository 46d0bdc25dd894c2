"""Balancing requests over ranks: a suite that every policy passes, and what each is for."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.balance import BALANCERS, CENTRAL_QUEUE, RouterView, balancer
from moesim.engine.batch_state import Limits, Plan
from moesim.engine.serving import Load, Served, serve
from moesim.errors import BadInput

NAMES = [*BALANCERS, CENTRAL_QUEUE]


@pytest.mark.parametrize("name", NAMES)
def test_equal_ranks_take_turns(name: str) -> None:
    choose, idle = balancer(name), np.zeros(6, np.int64)
    assert [choose(RouterView(idle, idle, turn)) for turn in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_served_once(name: str) -> None:
    rng = np.random.default_rng(1)
    isl, osl = rng.integers(1, 60, 150), rng.integers(1, 12, 150)
    load = Load(isl, osl, arrival_s=np.cumsum(rng.exponential(0.4, 150)))
    served = run(load, name)
    assert served.step_prefill_tokens.sum() == isl.sum()
    assert served.step_decode_seqs.sum() == (osl - 1).sum()
    assert np.isfinite(served.finish_s).all()


def test_least_of_requests_and_of_tokens() -> None:
    view = RouterView(np.asarray([2, 1, 1]), np.asarray([5, 90, 80]), 0)
    assert balancer("shortest_queue")(view) == 1
    assert balancer("fewest_tokens")(view) == 0


def run(load: Load, balance: str) -> Served:
    def step(plan: Plan) -> float:
        return 0.1 + 0.02 * float((plan.prefill_tokens + plan.decode_seqs).max())

    return serve(load, Limits(64, 4, 1000, True, False), ranks=3, instances=2, step_time=step, balance=balance)


def test_tokens_balance_prompts_that_differ_better_than_turns_do() -> None:
    # Every sixth prompt is long: in turn, all long ones go to the same rank.
    isl = np.where(np.arange(120) % 6 == 0, 60, 2)
    load = Load(isl, np.full(120, 4), arrival_s=np.arange(120) * 0.12)
    waits = {name: float((s.first_token_s - s.arrival_s).mean()) for name in NAMES for s in [run(load, name)]}
    assert waits["fewest_tokens"] < 0.8 * waits["round_robin"]
    assert waits["shortest_queue"] < 0.8 * waits["round_robin"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(BadInput, match="central_queue"):
        balancer("fair")
