"""Admission and preemption by the engines' rules: small cases whose every step can be written down."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.batch_state import Limits, Plan
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM, MemoryRule, memory_rule
from moesim.engine.serving import Load, Served, serve
from moesim.errors import BadInput, Infeasible


def run(load: Load, limits: Limits, seen: list[tuple[int, int]] | None = None) -> Served:
    def step(plan: Plan) -> float:
        if seen is not None:
            seen.append((int(plan.decode_seqs[0]), int(plan.prefill_tokens[0])))
        return 1.0

    return serve(load, limits, ranks=1, instances=1, step_time=step)


def at_once(isl: list[int], osl: list[int]) -> Load:
    return Load(np.asarray(isl), np.asarray(osl), arrival_s=np.zeros(len(isl)))


def test_vllm_takes_blocks_as_they_fill_and_the_last_admitted_gives_way() -> None:
    # Three blocks of 16. Both prompts fill one block each; each of the two needs a second one for its second token
    # (17 tokens of context), and there is only one: the second request gives way, and computes 17 tokens again once the
    # first has ended with its fourth token.
    seen: list[tuple[int, int]] = []
    limits = Limits(64, 8, 48, True, True, VLLM)
    served = run(at_once([16, 16], [4, 4]), limits, seen)
    assert seen == [(0, 32), (1, 0), (1, 0), (1, 0), (0, 17), (1, 0), (1, 0)]
    assert served.finish_s.tolist() == [4.0, 7.0]
    assert served.first_token_s.tolist() == [1.0, 1.0]
    assert (served.preemptions, served.recomputed_tokens) == (1, 16)
    assert sorted(served.gaps_s.tolist()) == [1, 1, 1, 1, 1, 4]
    assert served.peak_kv_tokens == 32


def test_vllm_admits_a_prompt_only_when_all_of_it_fits() -> None:
    # Chunks of 32: the second prompt's first chunk would fit beside the first request, its 40 tokens do not.
    served = run(at_once([30, 40], [2, 2]), Limits(32, 8, 64, True, True, VLLM))
    assert served.preemptions == 0
    assert served.first_token_s[1] > served.finish_s[0]


def test_sglang_expects_a_share_of_the_output() -> None:
    # 100 tokens. The first request holds 30 and may make 50 more, of which 0.7 are expected after its own full 50 in
    # the step that admits it: 30 + 20 asked + 1 page against 100 - 30 - 50 = 20 left: refused; a later try, after the
    # first has ended, succeeds. With 10 outputs instead: 30 + 10 + 1 < 100 - 30 - 10: both in one step.
    limits = Limits(64, 8, 100, True, False, SGLANG)
    apart = run(at_once([30, 30], [50, 20]), limits)
    assert apart.first_token_s.tolist() == [1.0, 51.0]
    together = run(at_once([30, 30], [10, 10]), limits)
    assert together.first_token_s.tolist() == [1.0, 1.0]


def test_sglang_retracts_who_made_least_and_lets_it_wait_last() -> None:
    # A rule that expects nothing of running requests, so that memory does run out. 40 tokens hold two requests of 10
    # and 12 prompt tokens for nine decode steps (19 + 21); the tenth does not fit. Both have made 10: the longer prompt
    # is retracted, asks for 22 + 2 + 1 tokens of 20, and reads its 22 tokens again when the first has ended.
    rule = SGLANG._replace(first_ratio=0.0, last_ratio=0.0)
    seen: list[tuple[int, int]] = []
    load = Load(np.asarray([10, 12]), np.asarray([12, 12]), arrival_s=np.asarray([0.0, 0.5]))
    served = run(load, Limits(64, 8, 40, True, False, rule), seen)
    assert seen == [(0, 10), (0, 12), *[(2, 0)] * 9, (1, 0), (1, 0), (0, 22), (1, 0)]
    assert (served.preemptions, served.recomputed_tokens) == (1, 21)
    assert served.finish_s.tolist() == [13.0, 15.0]


def test_sglang_tries_no_admission_until_somebody_leaves() -> None:
    # Refused once in the step that admits the first (12 + 12 + 1 of 40 - 10 - 12), the second waits for its end, though
    # 25 of 30 would fit right after it.
    rule = SGLANG._replace(first_ratio=0.0, last_ratio=0.0)
    served = run(at_once([10, 12], [12, 12]), Limits(64, 8, 40, True, False, rule))
    assert served.first_token_s.tolist() == [1.0, 13.0]


@pytest.mark.parametrize("rule", [RESERVE, SGLANG, VLLM])
@pytest.mark.parametrize("mixes", [False, True])
def test_ample_memory_makes_all_rules_alike(rule: MemoryRule, mixes: bool) -> None:
    rng = np.random.default_rng(2)
    load = Load(rng.integers(1, 200, 80), rng.integers(1, 30, 80), arrival_s=np.cumsum(rng.exponential(2.0, 80)))
    wide = 10_000_000
    found = run(load, Limits(128, 16, wide, True, mixes, rule))
    reserved = run(load, Limits(128, 16, wide, True, mixes, RESERVE))
    np.testing.assert_array_equal(found.finish_s, reserved.finish_s)
    np.testing.assert_array_equal(found.gaps_s, reserved.gaps_s)
    assert found.preemptions == 0


def test_growing_uses_less_memory_and_waits_less_than_reserving() -> None:
    load = Load(np.full(60, 50), np.full(60, 150), arrival_s=np.arange(60) * 2.0)
    waits = {}
    for name, rule in (("reserve", RESERVE), ("vllm", VLLM)):
        served = run(load, Limits(256, 64, 1200, True, True, rule))
        waits[name] = float((served.first_token_s - served.arrival_s).mean())
    assert waits["vllm"] < 0.8 * waits["reserve"]


def test_requests_that_can_never_run_are_refused() -> None:
    with pytest.raises(Infeasible) as caught:
        run(at_once([50], [14]), Limits(64, 8, 63, True, True, VLLM))  # 64 tokens, but three whole blocks
    assert caught.value.reason == "kv_cache_too_small"
    with pytest.raises(Infeasible) as caught:
        run(at_once([50], [14]), Limits(60, 8, 200, False, False, SGLANG))  # would not be read again after 11 tokens
    assert caught.value.reason == "prompt_too_long"


def test_rules_by_name() -> None:
    assert memory_rule("reserve", "sglang") == RESERVE
    assert memory_rule("engine", "vllm") == VLLM
    assert memory_rule("engine", "sglang") == SGLANG
    with pytest.raises(BadInput, match=r"serving\.memory\.admission"):
        memory_rule("engine", "trtllm")
