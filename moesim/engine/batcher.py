"""Continuous batching of one lockstep group, compiled: which request gets which tokens in the next step.

`plan_step` forms a step, `finish_step` carries it out. Requests of a rank wait in arrival order; who is admitted and
who gives way when memory ends is the engine's rule (see memory_rules.py).
"""

from __future__ import annotations

import numpy as np

from moesim.engine.batch_state import (
    NONE,
    Floats,
    Ints,
    Limits,
    Plan,
    Ranks,
    Requests,
    new_plan,
    new_ranks,
    new_requests,
)
from moesim.engine.kernel import kernel
from moesim.engine.kv_memory import (
    admit,
    arrive,
    computed,
    expected_output,
    give_back,
    grow_running,
    keep_decoding,
    keep_prompt,
    preempt,
    remove_running,
    take,
)
from moesim.engine.memory_rules import CONTEXT, ESTIMATE, GROW

__all__ = [
    "Limits",
    "Plan",
    "Ranks",
    "Requests",
    "arrive",
    "count_gap",
    "finish_step",
    "new_plan",
    "new_ranks",
    "new_requests",
    "plan_step",
]


@kernel
def _read_prompts(requests: Requests, ranks: Ranks, limits: Limits, plan: Plan, rank: int, budget: int) -> None:
    """Give prompt tokens to the request in progress, then to waiting ones, up to the budget."""
    seqs, code = 0, limits.rule.code
    expected = 0.0
    if code == ESTIMATE and ranks.head[rank] != NONE and not ranks.full[rank]:
        expected = expected_output(requests, ranks, limits, rank)
    while budget > 0:
        request = ranks.reading[rank]
        if request == NONE:
            request = ranks.head[rank]
            if request == NONE or ranks.full[rank]:
                break
            inside = ranks.running_seqs[rank] + seqs
            if inside >= limits.of_batch or inside + ranks.elsewhere[rank] >= limits.max_running:
                break
            ready = computed(requests, request)
            if not limits.chunked and requests.target[request] > budget and not ready:
                break
            alone = ranks.running_seqs[rank] + seqs == 0
            following = requests.following[request]
            if not admit(requests, ranks, limits, rank, request, expected, alone):
                break
            ranks.head[rank] = following
            if ready:
                context = requests.isl[request] + requests.generated[request] + limits.draft_tokens
                if code != CONTEXT and not take(requests, ranks, limits, rank, request, context):
                    preempt(requests, ranks, rank, request, code == GROW)
                    break
                ranks.running[rank, ranks.running_seqs[rank]] = request
                ranks.running_seqs[rank] += 1
                budget -= 1 + limits.draft_tokens if limits.mixes else 0
                continue
        left = requests.target[request] - requests.read[request]
        tokens = min(left, budget) if limits.chunked else left
        if code != CONTEXT and not take(requests, ranks, limits, rank, request, requests.read[request] + tokens):
            ranks.reading[rank] = NONE
            preempt(requests, ranks, rank, request, code == GROW)
            break
        plan.picked[rank, seqs] = request
        plan.chunk[rank, seqs] = tokens
        plan.prefill_tokens[rank] += tokens
        plan.prefill_prefix[rank] += requests.read[request]
        expected += min(requests.osl[request] - requests.generated[request], limits.rule.most_output)
        seqs += 1
        budget -= tokens
        ranks.reading[rank] = request if tokens < left else NONE
        if tokens < left:
            break
    plan.prefill_seqs[rank] = seqs


@kernel
def _plan_rank(requests: Requests, ranks: Ranks, limits: Limits, plan: Plan, rank: int) -> None:
    """Who gets tokens of one rank, memory included; `decode_seqs` is left to the caller."""
    code, budget, admits = limits.rule.code, limits.max_tokens, True
    if code == GROW and (limits.mixes or ranks.reading[rank] == NONE):
        admits = grow_running(requests, ranks, limits, rank)
    elif code == ESTIMATE:
        if limits.mixes:
            keep_decoding(requests, ranks, limits, rank)
        if ranks.running_seqs[rank] == 0:
            ranks.full[rank] = False
            if ranks.head[rank] == NONE and ranks.reading[rank] == NONE:
                ranks.output_share[rank] = limits.rule.first_ratio
    if limits.mixes:
        budget -= ranks.running_seqs[rank] * (1 + limits.draft_tokens)
    if admits:
        _read_prompts(requests, ranks, limits, plan, rank, budget)
    if code == ESTIMATE and not limits.mixes and plan.prefill_seqs[rank] == 0:
        keep_decoding(requests, ranks, limits, rank)


@kernel
def _decode_on(requests: Requests, ranks: Ranks, plan: Plan, rank: int) -> int:
    """Let every running sequence of a rank go on; returns how many."""
    plan.decode_seqs[rank] = ranks.running_seqs[rank]
    if ranks.context[rank] == NONE:
        ranks.context[rank] = 0
        for place in range(ranks.running_seqs[rank]):
            request = ranks.running[rank, place]
            ranks.context[rank] += requests.isl[request] + requests.generated[request]
    plan.decode_kv[rank] = ranks.context[rank]
    return int(plan.decode_seqs[rank])


@kernel
def _held_back(ranks: Ranks, limits: Limits) -> bool:
    """Whether waiting prompts are held back so that all attention-DP ranks read in the same step.

    They wait until every rank has one and room for it, but no more once a rank has nothing to decode or the count of
    steps in which some rank had none reaches `hold_steps`: the count runs also while nobody waits. Then they wait
    `gather_steps` more, for others to come (TensorRT-LLM, PyExecutor._balance_adp_requests: timeout_iters and
    batching_wait_iters).
    """
    decoding = ready = 0
    for rank in range(len(ranks.head)):
        has = ranks.head[rank] != NONE or ranks.reading[rank] != NONE
        decoding += ranks.running_seqs[rank] > 0
        ready += has and ranks.running_seqs[rank] < min(limits.max_running, limits.of_batch)
    every = len(ranks.head)
    if ready == every:
        ranks.held[0] = 0
        if decoding < every:
            return False
        if ranks.held[1] < limits.gather_steps:
            ranks.held[1] += 1
            return True
        ranks.held[1] = 0
        return False
    ranks.held[0] += 1
    if ranks.held[0] >= limits.hold_steps or decoding < every:
        ranks.held[0] = 0
        return False
    return True


@kernel
def _waits(requests: Requests, ranks: Ranks, limits: Limits, rank: int) -> bool:
    """Whether the prompts of the only attention-DP rank wait for a fuller batch.

    They do while the step would hold less than `wait_tokens`, its decoding sequences included, but for no more than
    `wait_steps` steps in a row in which one could be read, and never where nothing decodes (TensorRT-LLM,
    PyExecutor._waiting_requests: batch_wait_timeout_iters and batch_wait_max_tokens_ratio). That memory may let in
    fewer prompts than the batch is left out.
    """
    decoding = ranks.running_seqs[rank]
    request = ranks.head[rank]
    if decoding == 0 or request == NONE or ranks.reading[rank] != NONE:
        return False
    tokens = decoding * (1 + limits.draft_tokens)
    seqs = 0
    most = min(limits.max_running, limits.of_batch)
    while request != NONE and decoding + seqs < most and tokens < limits.max_tokens:
        target = requests.target[request]
        if tokens + target > limits.max_tokens and not limits.chunked:
            break
        tokens = min(tokens + target, limits.max_tokens)
        seqs += 1
        request = requests.following[request]
    if seqs == 0:
        return False
    if ranks.held[0] < limits.wait_steps and tokens < limits.wait_tokens:
        ranks.held[0] += 1
        return True
    ranks.held[0] = 0
    return False


@kernel
def plan_step(requests: Requests, ranks: Ranks, limits: Limits, plan: Plan) -> int:
    """Form the next step of all ranks into `plan`; returns the tokens in it (0: nothing to do)."""
    decodes = prompts = fullest = 0
    held = limits.hold_steps > 0 and _held_back(ranks, limits)
    if limits.wait_steps > 0 and len(ranks.head) == 1:
        held = _waits(requests, ranks, limits, 0)
    for rank in range(len(ranks.head)):
        plan.decode_seqs[rank] = 0
        plan.decode_kv[rank] = 0.0
        plan.prefill_seqs[rank] = 0
        plan.prefill_tokens[rank] = 0
        plan.prefill_prefix[rank] = 0.0
        if ranks.requests_in[rank] == 0:
            continue
        if limits.poll_steps > 1 and ranks.reading[rank] == NONE and ranks.running_seqs[rank] > 0:
            if ranks.unpolled[rank] < limits.poll_steps:
                decodes += _decode_on(requests, ranks, plan, rank)
                fullest = max(fullest, ranks.kv_tokens[rank])
                continue
            ranks.unpolled[rank] = 0
        if held and limits.rule.code == CONTEXT:
            decodes += _decode_on(requests, ranks, plan, rank)
            fullest = max(fullest, ranks.kv_tokens[rank])
            continue
        # Ranks that only decode are spared the call, and the new count of their context.
        if limits.rule.code != CONTEXT or ranks.head[rank] != NONE or ranks.reading[rank] != NONE:
            ranks.context[rank] = NONE
            _plan_rank(requests, ranks, limits, plan, rank)
        if limits.mixes or plan.prefill_seqs[rank] == 0:
            decodes += _decode_on(requests, ranks, plan, rank)
        prompts += plan.prefill_tokens[rank]
        fullest = max(fullest, ranks.kv_tokens[rank])
    plan.totals[:] = decodes, prompts, fullest
    return decodes * (1 + limits.draft_tokens) + prompts


@kernel
def accepted_tokens(limits: Limits, request: int, generated: int) -> int:
    """Draft tokens accepted in a row: each with the acceptance rate, drawn from the request and its place alone.

    The uniform is splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) of (seed, request, place), so that two
    plans see the same luck.
    """
    mixed = np.uint64(limits.draft_seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(request) * np.uint64(0xD1B54A32D192ED03)
    mixed += np.uint64(generated + 1) * np.uint64(0x8CB92BA72F3D8DD7)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    uniform = float(mixed >> np.uint64(11)) / 9007199254740992.0
    found, chance = 0, limits.acceptance
    while found < limits.draft_tokens and uniform < chance:
        found += 1
        chance *= limits.acceptance
    return found


@kernel
def count_gap(gaps_s: Floats, gaps_n: Ints, used: int, gap_s: float, count: int) -> int:
    """Count inter-token latencies, runs of equal ones together; place 0 counts tokens of the same step."""
    if gap_s == 0.0:
        gaps_n[0] += count
        return used
    if used > 1 and gaps_s[used - 1] == gap_s:
        gaps_n[used - 1] += count
        return used
    gaps_s[used] = gap_s
    gaps_n[used] = count
    return used + 1


@kernel
def _end(requests: Requests, ranks: Ranks, rank: int, request: int, now_s: float) -> None:
    requests.finish_s[request] = now_s
    ranks.requests_in[rank] -= 1
    ranks.tokens_in[rank] -= requests.isl[request] + requests.generated[request]
    give_back(requests, ranks, rank, request)


@kernel
def finish_step(
    requests: Requests,
    ranks: Ranks,
    limits: Limits,
    plan: Plan,
    now_s: float,
    gaps_s: Floats,
    gaps_n: Ints,
    used: int,
    ended: Ints,
) -> tuple[int, int]:
    """Hand out the tokens of a planned step that ends at `now_s`.

    gaps_s, gaps_n: filled with inter-token latencies and how often, from index `used` on (place 0 is for zeros).
    ended: filled with the ids of finished requests. Returns the new `used` and the number of finished requests.
    """
    done = 0
    for rank in range(len(ranks.head)):
        place, left = 0, plan.decode_seqs[rank]
        # Where nobody leaves or joins, every running context grows by the token that it was given.
        ended_before, grows = done, plan.prefill_seqs[rank] == 0 and limits.draft_tokens == 0
        while left > 0:
            request = ranks.running[rank, place]
            made = 1
            if limits.draft_tokens > 0:
                made += accepted_tokens(limits, request, requests.generated[request])
                made = min(made, requests.osl[request] - requests.generated[request])
            used = count_gap(gaps_s, gaps_n, used, now_s - requests.last_token_s[request], 1)
            gaps_n[0] += made - 1
            requests.last_token_s[request] = now_s
            requests.generated[request] += made
            ranks.tokens_in[rank] += made
            left -= 1
            if requests.generated[request] >= requests.osl[request]:
                ended[done] = request
                done += 1
                _end(requests, ranks, rank, request, now_s)
                # Close the gap in order, so that the sequences still to be served in this step stay in place.
                remove_running(ranks, rank, place)
            else:
                place += 1
        ranks.unpolled[rank] = limits.poll_steps if plan.prefill_seqs[rank] > 0 else ranks.unpolled[rank] + 1
        if ranks.context[rank] != NONE:
            kept = grows and done == ended_before
            ranks.context[rank] = ranks.context[rank] + plan.decode_seqs[rank] if kept else NONE
        for chosen in range(plan.prefill_seqs[rank]):
            request = plan.picked[rank, chosen]
            requests.read[request] += plan.chunk[rank, chosen]
            if requests.read[request] < requests.target[request]:
                continue
            keep_prompt(requests, ranks, rank, request)
            if requests.generated[request] == 0:
                requests.first_token_s[request] = now_s
            else:
                used = count_gap(gaps_s, gaps_n, used, now_s - requests.last_token_s[request], 1)
            requests.last_token_s[request] = now_s
            requests.generated[request] += 1
            ranks.tokens_in[rank] += 1
            if requests.generated[request] >= requests.osl[request]:
                ended[done] = request
                done += 1
                _end(requests, ranks, rank, request, now_s)
            else:
                ranks.running[rank, ranks.running_seqs[rank]] = request
                ranks.running_seqs[rank] += 1
    return used, done
