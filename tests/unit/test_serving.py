"""Continuous batching by hand: small cases whose every step can be written down."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.batcher import Limits, Plan
from moesim.engine.serving import Load, serve
from moesim.errors import BadInput, Infeasible

ONE_S = 1.0


def limits(**changes: int | bool) -> Limits:
    values = {"max_tokens": 100, "max_running": 8, "kv_tokens": 10_000, "chunked": True, "mixes": False}
    values.update(changes)
    return Limits(**values)  # type: ignore[arg-type]


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def unit_step(plan: Plan) -> float:
    return ONE_S


def test_one_request_takes_one_prompt_step_and_one_step_a_token() -> None:
    served = serve(Load(ints(50), ints(4), arrival_s=np.zeros(1)), limits(), ranks=1, instances=1, step_time=unit_step)
    assert served.first_token_s[0] == 1.0
    assert served.finish_s[0] == 4.0
    assert served.steps == 4
    assert np.allclose(served.gaps_s, [1, 1, 1])


def test_a_long_prompt_is_read_in_chunks() -> None:
    served = serve(Load(ints(250), ints(1), arrival_s=np.zeros(1)), limits(), ranks=1, instances=1, step_time=unit_step)
    assert served.first_token_s[0] == 3.0
    assert served.step_prefill_tokens.tolist() == [100, 100, 50]


def test_prefill_first_stalls_the_ranks_own_decoding_but_mixing_does_not() -> None:
    load = Load(ints(10, 10), ints(5, 5), arrival_s=np.asarray([0.0, 1.5]))
    stalled = serve(load, limits(), ranks=1, instances=1, step_time=unit_step)
    mixed = serve(load, limits(mixes=True), ranks=1, instances=1, step_time=unit_step)
    # Arrivals at 1.5 are seen when the step that runs from 1 to 2 ends.
    assert stalled.finish_s.tolist() == [6.0, 7.0]
    assert mixed.finish_s.tolist() == [5.0, 7.0]


def test_one_ranks_prompt_is_one_step_of_the_whole_group() -> None:
    seen: list[tuple[int, int]] = []

    def step(plan: Plan) -> float:
        seen.append((int(plan.decode_seqs.sum()), int(plan.prefill_tokens.sum())))
        return 10.0 if plan.prefill_tokens.any() else 1.0

    arrivals = np.asarray([0.0, 0.0, 11.5])
    served = serve(
        Load(ints(8, 8, 8), ints(6, 6, 2), arrival_s=arrivals), limits(), ranks=2, instances=1, step_time=step
    )
    assert seen[:3] == [(0, 16), (2, 0), (2, 0)]
    # The third request reads on rank 0, which stops decoding; rank 1 decodes on, in a step as long as the prompt's.
    assert (1, 8) in seen
    assert served.gaps_s.max() == 11.0


def test_memory_admits_no_more_contexts_than_fit() -> None:
    load = Load(ints(50, 50, 50), ints(10, 10, 10), arrival_s=np.zeros(3))
    served = serve(load, limits(kv_tokens=120), ranks=1, instances=1, step_time=unit_step)
    assert served.peak_kv_tokens == 120
    assert served.first_token_s[2] > served.finish_s[:2].min()


def test_closed_loop_keeps_the_concurrency() -> None:
    load = Load(np.full(10, 5), np.full(10, 3), concurrency=2)
    served = serve(load, limits(), ranks=1, instances=1, step_time=unit_step)
    assert np.isfinite(served.finish_s).all()
    running = [((served.arrival_s <= t) & (served.finish_s > t)).sum() for t in np.arange(0.5, served.duration_s)]
    assert max(running) == 2


def test_requests_take_turns_over_instances_and_ranks() -> None:
    load = Load(np.full(8, 5), np.full(8, 1), arrival_s=np.zeros(8))
    served = serve(load, limits(max_running=1), ranks=2, instances=2, step_time=unit_step)
    assert served.finish_s.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_every_token_is_accounted_for() -> None:
    rng = np.random.default_rng(0)
    isl, osl = rng.integers(1, 300, 200), rng.integers(1, 40, 200)
    arrivals = np.cumsum(rng.exponential(0.3, 200))
    served = serve(Load(isl, osl, arrival_s=arrivals), limits(), ranks=3, instances=2, step_time=unit_step)
    assert served.step_prefill_tokens.sum() == isl.sum()
    assert served.step_decode_seqs.sum() == (osl - 1).sum() == len(served.gaps_s)
    assert (served.first_token_s >= served.arrival_s).all()
    assert (served.finish_s >= served.first_token_s).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kv_tokens": 40}, "kv_cache_too_small"), ({"chunked": False, "max_tokens": 20}, "prompt_too_long")],
)
def test_requests_that_can_never_run_are_refused(changes: dict[str, int | bool], reason: str) -> None:
    with pytest.raises(Infeasible) as caught:
        serve(
            Load(ints(50), ints(4), arrival_s=np.zeros(1)), limits(**changes), ranks=1, instances=1, step_time=unit_step
        )
    assert caught.value.reason == reason


def test_a_load_is_open_or_closed() -> None:
    with pytest.raises(BadInput):
        Load(ints(1), ints(1))


def test_a_whole_prompt_waits_until_the_running_requests_leave_it_room() -> None:
    """Without chunking, a prompt beside decoding requests still keeps the limit of tokens in a batch."""
    load = Load(ints(10, 100), ints(6, 2), arrival_s=np.asarray([0.0, 0.5]))
    served = serve(load, limits(chunked=False, mixes=True), ranks=1, instances=1, step_time=unit_step)
    assert (served.step_prefill_tokens + served.step_decode_seqs).max() == 100
    assert served.first_token_s.tolist() == [1.0, 7.0]
