"""Whatever the rules and however short the memory: every token is made once, and memory never overflows."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.engine.balance import BALANCERS, CENTRAL_QUEUE
from moesim.engine.batch_state import Limits, Plan
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM
from moesim.engine.serving import Load, PromptBlocks, serve


@settings(max_examples=150, deadline=None)
@example(81, VLLM, True, True, False, False, 0, 80, "shortest_queue")  # preempted while it reads again, in chunks
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from([RESERVE, SGLANG, SGLANG._replace(first_ratio=0.0, last_ratio=0.0), VLLM]),
    mixes=st.booleans(),
    chunked=st.booleans(),
    cache=st.booleans(),
    closed=st.booleans(),
    draft=st.integers(0, 3),
    spare=st.integers(0, 150),
    balance=st.sampled_from([*BALANCERS, CENTRAL_QUEUE]),
)
def test_tokens_and_memory(
    seed: int,
    rule: object,
    mixes: bool,
    chunked: bool,
    cache: bool,
    closed: bool,
    draft: int,
    spare: int,
    balance: str,
) -> None:
    rng = np.random.default_rng(seed)
    count = 40
    isl, osl = rng.integers(1, 100, count), rng.integers(1, 40, count)
    context = int((isl + osl).max()) + draft
    kv_tokens = -(-context // 16) * 16 + spare
    max_tokens = 48 if chunked else 48 + context
    limits = Limits(max_tokens, 8, kv_tokens, chunked, mixes, rule, draft, 0.6, seed)  # type: ignore[arg-type]
    blocks = None
    if cache:  # every prompt walks down one of a few paths, in blocks of 8 tokens
        lengths = -(-isl // 8)
        paths = rng.integers(0, 3, count)
        hashes = np.concatenate([path * 1000 + np.arange(size) for path, size in zip(paths, lengths, strict=True)])
        blocks = PromptBlocks(8, np.concatenate([[0], np.cumsum(lengths)]), hashes)
    times = None if closed else np.cumsum(rng.exponential(2.0, count))
    load = Load(isl, osl, arrival_s=times, concurrency=10 if closed else None, blocks=blocks)

    def step(plan: Plan) -> float:
        tokens = plan.decode_seqs * (1 + draft) + plan.prefill_tokens
        assert tokens.max() <= (max_tokens if mixes or plan.prefill_tokens.any() else 8 * (1 + draft))
        assert plan.totals[2] <= kv_tokens
        return 1.0

    served = serve(load, limits, ranks=2, instances=2, step_time=step, balance=balance)
    assert np.isfinite(served.finish_s).all()
    assert (served.first_token_s > served.arrival_s).all()
    assert (served.finish_s >= served.first_token_s).all()
    assert served.gap_n.sum() == (osl - 1).sum()
    assert np.isclose(served.gaps_s.sum(), (served.finish_s - served.first_token_s).sum())
    assert served.peak_kv_tokens <= kv_tokens
    again = served.step_prefill_tokens.sum() - isl.sum()
    if not cache and served.preemptions == 0:
        assert again == 0
    if not cache and draft == 0:  # a preempted request also reads the token it made last, instead of decoding it
        resumed = (osl - 1).sum() - served.step_decode_seqs.sum()
        assert again == served.recomputed_tokens + resumed
        assert 0 <= resumed <= served.preemptions
    if rule == RESERVE:
        assert served.preemptions == 0
