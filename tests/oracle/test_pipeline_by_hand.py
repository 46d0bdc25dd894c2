"""Batches in pipeline stages by hand: latency, period, prompts in chunks, and what engines do with a burst."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.batch_times import BatchTimes
from moesim.engine.batcher import Limits, Plan
from moesim.engine.in_flight import Flow, Lane
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM
from moesim.engine.serving import Load, PromptBlocks, Served, serve


@dataclass
class Fixed:
    """Stages that take the same time for every batch; the sequences and prompt tokens of each, as they were formed."""

    stages_s: tuple[float, ...]
    transfers_s: tuple[float, ...] = ()
    host_s: float = 0.0
    formed: list[tuple[int, int]] = field(default_factory=list)
    most: int = 0

    def stages(self, plan: Plan) -> BatchTimes:
        self.most = max(self.most, int((plan.decode_seqs + plan.prefill_seqs).max()))
        self.formed.append((int(plan.decode_seqs.sum()), int(plan.prefill_tokens.sum())))
        sent = self.transfers_s or (0.0,) * (len(self.stages_s) - 1)
        return BatchTimes(self.host_s, self.stages_s, sent)

    def __call__(self, plan: Plan) -> float:
        return self.stages(plan).alone_s


def limits(**changes: object) -> Limits:
    values = {"max_tokens": 100, "max_running": 8, "kv_tokens": 10_000, "chunked": True, "mixes": True}
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def run(
    load: Load, times: Fixed, *, running: int | None = None, batches: int | None = None, **changes: object
) -> Served:
    flow = Flow(len(times.stages_s), batches or len(times.stages_s), running)
    return serve(load, limits(**changes), ranks=1, instances=1, step_time=times, flow=flow)


def test_one_request_takes_all_stages_and_transfers_for_each_token() -> None:
    times = Fixed((1.0, 2.0, 4.0), (0.25, 0.5), host_s=0.125)
    served = run(Load(ints(50), ints(4), arrival_s=np.zeros(1)), times)
    assert served.first_token_s[0] == 7.875
    assert np.allclose(served.gaps_s, 7.875)
    assert served.finish_s[0] == 4 * 7.875
    assert served.stage_busy_s is not None
    assert served.stage_busy_s.tolist() == [[4.0, 8.0, 16.0]]


@pytest.mark.parametrize(
    ("stages_s", "transfer_s", "host_s", "batches", "period_s"),
    [
        ((1.0, 3.0), 0.0, 0.0, 2, 3.0),  # the slowest stage never waits
        ((2.0, 2.0), 0.0, 0.0, 2, 2.0),
        ((2.0, 2.0), 1.0, 0.5, 2, 2.75),  # two batches do not fill the way of 5.5 s
        ((2.0, 2.0), 1.0, 0.5, 3, 2.0),
        ((1.0, 1.0, 4.0, 1.0), 0.0, 0.0, 4, 4.0),
        ((1.0, 1.0), 3.0, 0.0, 8, 3.0),  # the link is the slowest
        ((3.0, 3.0), 0.0, 0.0, 1, 6.0),
    ],
)
def test_many_requests_leave_at_the_pace_of_the_slowest(
    stages_s: tuple[float, ...], transfer_s: float, host_s: float, batches: int, period_s: float
) -> None:
    times = Fixed(stages_s, (transfer_s,) * (len(stages_s) - 1), host_s)
    count, osl = 2 * batches, 400
    load = Load(np.full(count, 10), np.full(count, osl), arrival_s=np.zeros(count))
    served = run(load, times, running=2, batches=batches, max_running=count)
    rate = count * osl / served.duration_s
    assert rate == pytest.approx(2 / period_s, rel=0.02)  # two sequences in each batch
    assert served.gap_s[1:][served.gap_n[1:] > 100] == pytest.approx(batches * period_s)


def test_chunks_of_a_prompt_follow_each_other() -> None:
    """The third chunk is formed when the first has left, at 2 s, and leaves at 4 s; one after the other it were 6 s."""
    load = Load(ints(250), ints(1), arrival_s=np.zeros(1))
    assert run(load, Fixed((1.0, 1.0))).first_token_s[0] == 4.0
    assert run(load, Fixed((1.0, 1.0)), batches=1).first_token_s[0] == 6.0
    assert run(load, Fixed((1.0, 1.0)), batches=3).first_token_s[0] == 4.0


def test_a_burst_may_fill_one_batch_and_leave_the_next_empty() -> None:
    """vLLM's limit is of all batches together (vllm-project/vllm issue 50853); SGLang gives each its share."""
    load = Load(np.full(8, 10), np.full(8, 3), arrival_s=np.zeros(8))
    greedy, shared = Fixed((1.0, 1.0)), Fixed((1.0, 1.0))
    run(load, greedy)
    run(load, shared, running=4)
    assert greedy.formed == [(0, 80), (8, 0), (8, 0)]
    assert shared.formed == [(0, 40), (0, 40), (4, 0), (4, 0), (4, 0), (4, 0)]


def test_the_engine_waits_for_the_oldest_batch_before_it_looks_at_new_requests() -> None:
    times = Fixed((1.0, 1.0))
    load = Load(ints(10, 10), ints(3, 2), arrival_s=np.asarray([0.0, 0.5]))
    served = run(load, times)
    assert times.formed == [(0, 10), (1, 10), (2, 0)]
    assert served.first_token_s.tolist() == [2.0, 4.0]


def test_all_batches_together_keep_to_the_limit_on_requests() -> None:
    times = Fixed((1.0, 1.0))
    load = Load(np.full(9, 40), np.full(9, 50), arrival_s=np.zeros(9))
    served = run(load, times, max_running=5)
    assert np.isfinite(served.finish_s).all()
    assert times.formed[:2] == [(0, 100), (0, 100)]  # five prompts, the third of them in both
    assert [prompts for _, prompts in times.formed[2:40]] == [0] * 38


def test_a_prompt_begun_in_one_batch_may_end_in_a_full_one() -> None:
    """Two batches of one request each: the second prompt begins beside the first request and ends in its batch."""
    times = Fixed((1.0, 1.0))
    served = run(Load(ints(150, 150), ints(5, 5), arrival_s=np.zeros(2)), times, running=1, max_running=2)
    assert times.formed == [(0, 100), (0, 50), (0, 100), (1, 50), (2, 0), (2, 0), (2, 0), (1, 0)]
    assert served.finish_s.tolist() == [11.0, 13.0]


def test_a_lane_is_first_come_first_served() -> None:
    lane = Lane(2)
    slow, fast = BatchTimes(0.0, (1.0, 5.0), (0.5,)), BatchTimes(0.0, (1.0, 1.0), (0.5,))
    assert lane.send(0.0, slow) == 6.5
    assert lane.send(0.0, fast) == 7.5  # through the first stage at 2 s, then it waits
    assert lane.busy_s.tolist() == [2.0, 6.0]


requests = st.lists(st.tuples(st.integers(1, 250), st.integers(1, 6), st.floats(0, 20)), min_size=1, max_size=14)


@settings(max_examples=120, deadline=None)
@given(
    asked=requests,
    stages=st.integers(1, 4),
    batches=st.integers(1, 5),
    running=st.sampled_from([None, 1, 3]),
    rule=st.sampled_from([RESERVE, SGLANG, VLLM]),
    kv_tokens=st.sampled_from([300, 900, 10_000]),
    mixes=st.booleans(),
    ranks=st.integers(1, 3),
    shared=st.booleans(),
)
def test_tokens_are_conserved(
    asked: list[tuple[int, int, float]], stages: int, batches: int, running: int | None, rule: object, kv_tokens: int,
    mixes: bool, ranks: int, shared: bool,
) -> None:  # fmt: skip
    """Every request gets all its tokens, whatever the memory; without preemption each token is computed once.

    shared: every other prompt begins as the others do, and a prefix cache knows.
    """
    isl, osl, arrival_s = (np.asarray(values) for values in zip(*asked, strict=True))
    load = Load(isl.astype(np.int64), osl.astype(np.int64), arrival_s=np.sort(arrival_s))
    if shared:
        blocks = [np.arange(tokens // 16) + 1000 * (index % 2) for index, tokens in enumerate(isl)]
        offsets = np.cumsum([0, *(len(one) for one in blocks)])
        load = replace(load, blocks=PromptBlocks(16, offsets, np.concatenate(blocks)))
    times = Fixed(tuple(1.0 + stage for stage in range(stages)), host_s=0.25)
    served = serve(
        load,
        limits(rule=rule, kv_tokens=kv_tokens, mixes=mixes),
        ranks=ranks,
        instances=2,
        step_time=times,
        flow=Flow(stages, batches, running),
    )
    assert np.isfinite(served.finish_s).all()
    assert served.gap_n.sum() == (osl - 1).sum()
    assert (served.first_token_s - served.arrival_s >= times.host_s + sum(times.stages_s) - 1e-9).all()
    assert (served.finish_s >= served.first_token_s).all()
    assert served.peak_kv_tokens <= kv_tokens
    assert times.most <= 8
    if served.preemptions == 0:
        assert served.step_prefill_tokens.sum() + served.prefix_found_tokens == isl.sum()
        assert served.step_decode_seqs.sum() == (osl - 1).sum()


@settings(max_examples=40, deadline=None)
@given(asked=requests, mixes=st.booleans(), rule=st.sampled_from([RESERVE, SGLANG, VLLM]))
def test_one_stage_with_one_batch_is_the_plain_loop(
    asked: list[tuple[int, int, float]], mixes: bool, rule: object
) -> None:
    isl, osl, arrival_s = (np.asarray(values) for values in zip(*asked, strict=True))
    load = Load(isl.astype(np.int64), osl.astype(np.int64), arrival_s=np.sort(arrival_s))
    found = [
        serve(
            load,
            limits(mixes=mixes, rule=rule, kv_tokens=600),
            ranks=2,
            instances=1,
            step_time=Fixed((1.5,)),
            flow=flow,
        )
        for flow in (None, Flow(1, 1))
    ]
    plain, staged = found
    assert staged.first_token_s.tolist() == plain.first_token_s.tolist()
    assert staged.finish_s.tolist() == plain.finish_s.tolist()
    assert staged.step_start_s.tolist() == plain.step_start_s.tolist()
    assert staged.preemptions == plain.preemptions
