"""Prompts that wait beside decoding for a fuller batch: by hand, and against TensorRT-LLM's rule in plain Python.

The rule is PyExecutor._waiting_requests of TensorRT-LLM (batch_wait_timeout_iters, batch_wait_max_tokens_ratio): asked
only where a prompt could be read and something decodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.batch_state import Limits
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.serving import Load, Served, serve
from moesim.engine.stepmodel import batch_limits
from moesim.errors import BadInput
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

TOKENS = 10


def run(load: Load, *, wait: int, tokens: float, running: int = 8, ranks: int = 1) -> Served:
    """Steps of one second and ten tokens; whole prompts beside decoding."""
    asked = Limits(TOKENS, running, 100_000, False, True, wait_steps=wait, wait_tokens=tokens)
    return serve(load, asked, ranks=ranks, instances=1, step_time=lambda plan: 1.0, balance="round_robin")


def arriving(times_s: list[float], osl: list[int]) -> Load:
    """Prompts of 3 tokens."""
    return Load(np.full(len(times_s), 3), np.array(osl), arrival_s=np.array(times_s))


def test_a_prompt_waits_for_others_or_until_the_count_is_full() -> None:
    """The first decodes from 1 s on; the second comes at 1.5 s and could be read at 2 s: 1 + 3 tokens of 7.

    Alone it waits 3 steps (at 2, 3 and 4 s) and is read at 5 s. A third one at 2.5 s makes 1 + 3 + 3 = 7 at 3 s.
    """
    alone = arriving([0.0, 1.5], [40, 3])
    assert run(alone, wait=0, tokens=0.0).first_token_s.tolist() == [1, 3]
    assert run(alone, wait=3, tokens=7.0).first_token_s.tolist() == [1, 6]
    pair = arriving([0.0, 1.5, 2.5], [40, 3, 3])
    assert run(pair, wait=30, tokens=7.0).first_token_s.tolist() == [1, 4, 4]
    assert run(pair, wait=30, tokens=7.5).first_token_s[1] == 33  # half a token short: until the count is full


def test_the_count_begins_anew_after_prompts_were_read_and_rests_while_none_waits() -> None:
    """Waits of 2 steps: the second prompt at 2, 3 s (read at 4), the third, which comes at 20.5 s, at 21, 22 s."""
    load = arriving([0.0, 1.5, 20.5], [60, 40, 3])
    assert run(load, wait=2, tokens=9.0).first_token_s.tolist() == [1, 5, 24]


def test_nobody_waits_where_nothing_decodes_or_no_place_is_free() -> None:
    assert run(arriving([0.0, 0.0], [3, 3]), wait=9, tokens=10.0).first_token_s.tolist() == [1, 1]
    # One place: the second is read when the first has ended at 5 s, at once, as nothing decodes then.
    assert run(arriving([0.0, 1.5], [5, 3]), wait=9, tokens=10.0, running=1).first_token_s.tolist() == [1, 6]


def test_several_attention_ranks_have_another_rule() -> None:
    load = arriving([0.0, 0.0, 1.5], [40, 40, 3])
    assert run(load, wait=9, tokens=10.0, ranks=2).first_token_s.tolist() == [1, 1, 3]


def by_the_book(
    isl: list[int], osl: list[int], *, running: int, concurrency: int, wait: int, tokens: float
) -> tuple[list[int], list[int]]:
    """First tokens and ends of a closed loop, in steps."""
    waiting: list[int] = []
    left: dict[int, int] = {}
    first, finish = [0] * len(osl), [0] * len(osl)
    sent = ended = now = count = 0
    while ended < len(osl):
        while sent < min(len(osl), concurrency + ended):
            waiting.append(sent)
            sent += 1
        now += 1
        fitting: list[int] = []
        used = len(left)
        for request in waiting:
            if len(left) + len(fitting) >= running or used + isl[request] > TOKENS:
                break
            fitting.append(request)
            used += isl[request]
        if fitting and left:
            if count < wait and used < tokens:
                count += 1
                fitting = []
            else:
                count = 0
        for request in list(left):
            left[request] -= 1
        for request in fitting:
            waiting.remove(request)
            first[request] = now
            left[request] = osl[request] - 1
        for request in [request for request, rest in left.items() if rest == 0]:
            del left[request]
            finish[request] = now
            ended += 1
    return first, finish


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=40),
    running=st.integers(1, 5),
    concurrency=st.integers(1, 12),
    wait=st.integers(1, 9),
    tokens=st.sampled_from([2.0, 5.0, 8.0, 10.0]),
)
def test_random_loads_by_the_book(
    lengths: list[tuple[int, int]], running: int, concurrency: int, wait: int, tokens: float
) -> None:
    isl, osl = (list(column) for column in zip(*lengths, strict=True))
    load = Load(np.array(isl), np.array(osl), concurrency=concurrency)
    found = run(load, wait=wait, tokens=tokens, running=running)
    first, finish = by_the_book(isl, osl, running=running, concurrency=concurrency, wait=wait, tokens=tokens)
    assert found.first_token_s.tolist() == first
    assert found.finish_s.tolist() == finish


def limits_of(tmp_path: Path, serving: dict[str, Any], **changes: Any) -> Limits:
    data = small(**changes)
    for name, value in serving.items():
        data["serving"].setdefault(name, {}).update(value)
    return batch_limits(resolve(groundwork(load_scenario(write(tmp_path, data)))))


def test_a_scenario_sets_both_where_there_is_no_attention_dp(tmp_path: Path) -> None:
    asked = {"batching": {"wait_steps": 40, "wait_share": 0.8, "max_batch_tokens_per_dp_rank": 1000}}
    alone = {"parallel": {"tp": 8, "ep": 8}, "policies": {"dispatch": {"backend": "allreduce"}}}
    found = limits_of(tmp_path, asked, placement={"solver": "contiguous"}, **alone)
    assert (found.wait_steps, found.wait_tokens) == (40, 800.0)
    assert limits_of(tmp_path, asked).wait_steps == 0  # eight attention-DP ranks


@pytest.mark.parametrize(
    ("serving", "told"),
    [
        ({"batching": {"wait_steps": 40, "wait_share": 0.8}, "memory": {"admission": "engine"}}, "wait_steps"),
        ({"batching": {"wait_steps": 40}}, "wait_share"),
        ({"batching": {"wait_share": 0.8}}, "wait_steps"),
    ],
)
def test_what_would_do_nothing_is_refused(serving: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told) as error:
        limits_of(tmp_path, serving)
    assert "\n" not in error.value.line()
