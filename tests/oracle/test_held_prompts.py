"""Prompts that wait for the other attention-DP ranks: by hand, and against TensorRT-LLM's rule in plain Python.

The rule is PyExecutor._balance_adp_requests of TensorRT-LLM (attention_dp_config: enable_balance, timeout_iters,
batching_wait_iters). Its first counter runs in every step in which some rank has no prompt, also while nobody waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.batch_state import Limits
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.memory_rules import SGLANG
from moesim.engine.serving import Load, Served, serve
from moesim.engine.stepmodel import batch_limits
from moesim.errors import BadInput
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write


def run(load: Load, *, hold: int, gather: int = 0, ranks: int = 2, running: int = 8, balance: str = "round_robin",
        **limits: Any) -> Served:  # fmt: skip
    """Steps of one second; prompts are read beside decoding, as many at once as there is room for."""
    asked = Limits(10_000, running, 100_000, False, True, hold_steps=hold, gather_steps=gather, **limits)
    return serve(load, asked, ranks=ranks, instances=1, step_time=lambda plan: 1.0, balance=balance)


def arriving(times_s: list[float], osl: list[int]) -> Load:
    """Prompts of 4 tokens, to ranks in turn."""
    return Load(np.full(len(times_s), 4), np.array(osl), arrival_s=np.array(times_s))


def test_a_lone_prompt_waits_until_the_count_is_full() -> None:
    """Both ranks read at 0 s and decode from 1 s on, when the count begins; a third request comes at 5.5 s.

    Of 4 steps: the counts at 1, 2, 3, 4 s are 1, 2, 3, 4 (full: begins anew), at 5 s 1, at 6 s 2, at 7 s 3, and at 8 s
    4: the prompt is read then. Of 6 steps: 6 at 6 s, at once.
    """
    load = arriving([0.0, 0.0, 5.5], [40, 40, 3])
    assert run(load, hold=0).first_token_s.tolist() == [1, 1, 7]
    assert run(load, hold=4).first_token_s.tolist() == [1, 1, 9]
    assert run(load, hold=6).first_token_s.tolist() == [1, 1, 7]
    assert run(load, hold=7).first_token_s.tolist() == [1, 1, 8]


def test_prompts_of_all_ranks_are_read_together_and_after_more_have_gathered() -> None:
    """The third request comes to rank 0 at 5.5 s, the fourth to rank 1 at 7.5 s: both are read at 8 s.

    Two steps more to gather: held at 8 and 9 s, read at 10 s.
    """
    load = arriving([0.0, 0.0, 5.5, 7.5], [40, 40, 3, 3])
    assert run(load, hold=50).first_token_s.tolist() == [1, 1, 9, 9]
    assert run(load, hold=50, gather=2).first_token_s.tolist() == [1, 1, 11, 11]


def test_nobody_is_held_where_a_rank_has_nothing_to_decode() -> None:
    """The second request ends at 4 s: from then on a lone prompt is read at once, and so were both at 0 s."""
    load = arriving([0.0, 0.0, 1.5, 6.5], [40, 4, 3, 3])
    held = run(load, hold=50, gather=9)
    assert held.first_token_s.tolist() == [1, 1, 5, 8]
    assert held.step_prefill_tokens.tolist()[:5] == [8, 0, 0, 0, 4]


def test_a_full_rank_cannot_read_so_nobody_waits_for_it_to_have_a_prompt() -> None:
    """Two places on each rank, both taken on rank 0: its prompt counts for nothing, and rank 1's waits the count out.

    The count is 1 at 1 s; at 2 s (both wait since 1.5 s) 2, at 3 s 3: rank 1 reads then, rank 0 still cannot.
    """
    load = arriving([0.0] * 3 + [1.5, 1.5], [40, 40, 40, 3, 3])
    held = run(load, hold=3, running=2)
    assert held.first_token_s.tolist()[:4] == [1, 1, 1, 4]
    assert held.first_token_s[4] > 40


@dataclass
class Rank:
    """A rank of the plain model: ids that wait, and tokens that running requests have left."""

    waiting: list[int] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)


def by_the_book(
    osl: list[int], *, ranks: int, running: int, concurrency: int, hold: int, gather: int, shortest: bool
) -> tuple[list[int], list[int]]:
    """First tokens and ends of a closed loop, in steps."""
    group = [Rank() for _ in range(ranks)]
    first, finish = [0] * len(osl), [0] * len(osl)
    sent = ended = now = waiting_iters = batching_iters = 0
    while ended < len(osl):
        while sent < min(len(osl), concurrency + ended):
            order = [(sent + k) % ranks for k in range(ranks)]
            inside = [len(rank.waiting) + len(rank.left) for rank in group]
            group[min(order, key=lambda r, inside=inside: inside[r]) if shortest else order[0]].waiting.append(sent)
            sent += 1
        prompts = [bool(rank.waiting) for rank in group]
        decodes = [len(rank.left) for rank in group]
        reads = True
        if all(prompts) and max(decodes) < running:
            waiting_iters = 0
            if all(decodes):
                if batching_iters < gather:
                    batching_iters += 1
                    reads = False
                else:
                    batching_iters = 0
        else:
            waiting_iters += 1
            reads = waiting_iters >= hold or not all(decodes)
            if reads:
                waiting_iters = 0
        now += 1
        for rank in group:
            room = running - len(rank.left)
            for request in list(rank.left):
                rank.left[request] -= 1
            if reads:
                for request in rank.waiting[:room]:
                    first[request] = now
                    rank.left[request] = osl[request] - 1
                rank.waiting = rank.waiting[room:]
            for request in [request for request, left in rank.left.items() if left == 0]:
                del rank.left[request]
                finish[request] = now
                ended += 1
    return first, finish


@settings(max_examples=150, deadline=None)
@given(
    osl=st.lists(st.integers(1, 12), min_size=1, max_size=50),
    ranks=st.integers(1, 4),
    running=st.integers(1, 4),
    concurrency=st.integers(1, 20),
    hold=st.integers(1, 9),
    gather=st.integers(0, 4),
    shortest=st.booleans(),
)
def test_random_loads_by_the_book(
    osl: list[int], ranks: int, running: int, concurrency: int, hold: int, gather: int, shortest: bool
) -> None:
    load = Load(np.full(len(osl), 4), np.array(osl), concurrency=concurrency)
    balance = "shortest_queue" if shortest else "round_robin"
    found = run(load, hold=hold, gather=gather, ranks=ranks, running=running, balance=balance)
    first, finish = by_the_book(
        osl, ranks=ranks, running=running, concurrency=concurrency, hold=hold, gather=gather, shortest=shortest
    )
    assert found.first_token_s.tolist() == first
    assert found.finish_s.tolist() == finish


def test_memory_as_it_is_needed_knows_no_holding() -> None:
    load = arriving([0.0, 0.0, 5.5], [40, 40, 3])
    assert run(load, hold=4, rule=SGLANG).first_token_s.tolist() == [1, 1, 7]


def limits_of(tmp_path: Path, serving: dict[str, Any], **changes: Any) -> Limits:
    data = small(**changes)
    for name, value in serving.items():
        data["serving"].setdefault(name, {}).update(value)
    return batch_limits(resolve(groundwork(load_scenario(write(tmp_path, data)))))


def test_a_scenario_sets_both_where_there_is_attention_dp(tmp_path: Path) -> None:
    asked = {"batching": {"hold_steps": 60, "gather_steps": 10}}
    found = limits_of(tmp_path, asked)
    assert (found.hold_steps, found.gather_steps) == (60, 10)
    alone = {"parallel": {"tp": 8, "ep": 8}, "policies": {"dispatch": {"backend": "allreduce"}}}
    assert limits_of(tmp_path, asked, placement={"solver": "contiguous"}, **alone).hold_steps == 0
    plain = limits_of(tmp_path, {})
    assert (plain.hold_steps, plain.gather_steps) == (0, 0)


@pytest.mark.parametrize(
    ("serving", "told"),
    [
        ({"batching": {"hold_steps": 60}, "memory": {"admission": "engine"}}, "hold_steps"),
        ({"batching": {"gather_steps": 10}}, "gather_steps"),
    ],
)
def test_what_would_do_nothing_is_refused(serving: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told) as error:
        limits_of(tmp_path, serving)
    assert "\n" not in error.value.line()
