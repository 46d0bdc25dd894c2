"""KV memory of a rank, compiled: taking it, giving it back, admission by the engine's rule, and preemption."""

from __future__ import annotations

from moesim.engine.batch_state import NONE, Limits, Ranks, Requests
from moesim.engine.kernel import kernel
from moesim.engine.memory_rules import CONTEXT, ESTIMATE
from moesim.engine.prefix_cache import evict, find, lock, release, store


@kernel
def enqueue(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    """Put a request at the end of a rank's queue."""
    requests.following[request] = NONE
    if ranks.head[rank] == NONE:
        ranks.head[rank] = request
    else:
        requests.following[ranks.tail[rank]] = request
    ranks.tail[rank] = request


@kernel
def arrive(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    """A request comes to a rank and waits there."""
    ranks.requests_in[rank] += 1
    ranks.tokens_in[rank] += requests.isl[request] + requests.generated[request]
    enqueue(requests, ranks, rank, request)


@kernel
def _put_first(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    requests.following[request] = ranks.head[rank]
    if ranks.head[rank] == NONE:
        ranks.tail[rank] = request
    ranks.head[rank] = request


@kernel
def take(requests: Requests, ranks: Ranks, limits: Limits, rank: int, request: int, tokens: int) -> bool:
    """Let a request hold `tokens` of context in all, in whole pages; False, nothing taken, where they do not fit."""
    page = limits.rule.page_tokens
    in_cache = ranks.cache.shared[request] * ranks.cache.tokens if ranks.cache.tokens > 0 else 0
    more = -(-tokens // page) * page - in_cache - requests.held[request]
    if more <= 0:
        return True
    if ranks.kv_tokens[rank] + more > limits.kv_tokens:
        return False
    requests.held[request] += more
    ranks.kv_tokens[rank] += more
    if ranks.cache.tokens > 0:
        evict(ranks.cache, rank, limits.kv_tokens - ranks.kv_tokens[rank])
    return True


@kernel
def give_back(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    """Free all KV memory of a request; its blocks in the cache stay there, unused."""
    ranks.kv_tokens[rank] -= requests.held[request]
    requests.held[request] = 0
    if ranks.cache.tokens > 0:
        ranks.kv_tokens[rank] -= release(ranks.cache, rank, request)
    ranks.full[rank] = False


@kernel
def keep_prompt(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    """Hand a prompt that was read to the prefix cache."""
    handed, woken = store(ranks.cache, rank, request, requests.isl[request])
    requests.held[request] -= handed
    ranks.kv_tokens[rank] += woken - handed


@kernel
def remove_running(ranks: Ranks, rank: int, place: int) -> None:
    """Take a request out of the running ones, the others stay in order."""
    for later in range(place, ranks.running_seqs[rank] - 1):
        ranks.running[rank, later] = ranks.running[rank, later + 1]
    ranks.running_seqs[rank] -= 1


@kernel
def preempt(requests: Requests, ranks: Ranks, rank: int, request: int, first: bool) -> None:
    """Free a request that was taken off its rank; it waits, first or last, and will compute all its tokens again."""
    ranks.preemptions[rank] += 1
    requests.preempted[request] += 1
    generated = requests.generated[request]
    whole = generated > 0 and requests.read[request] >= requests.target[request]  # else it reads, perhaps once again
    ranks.recomputed_tokens[rank] += requests.isl[request] + generated - 1 if whole else requests.read[request]
    give_back(requests, ranks, rank, request)
    requests.read[request] = 0
    requests.target[request] = requests.isl[request] + generated
    if first:
        _put_first(requests, ranks, rank, request)
    else:
        enqueue(requests, ranks, rank, request)


@kernel
def grow_running(requests: Requests, ranks: Ranks, limits: Limits, rank: int) -> bool:
    """vLLM's rule: running requests take a page when they need one; where none is left, the last admitted gives way.

    False when somebody was preempted: then nobody is admitted in this step.
    """
    nobody, place = True, 0
    while place < ranks.running_seqs[rank]:
        request = ranks.running[rank, place]
        context = requests.isl[request] + requests.generated[request] + limits.draft_tokens
        while not take(requests, ranks, limits, rank, request, context):
            nobody = False
            victim = ranks.reading[rank]
            if victim != NONE:
                ranks.reading[rank] = NONE
            else:
                victim = ranks.running[rank, ranks.running_seqs[rank] - 1]
                ranks.running_seqs[rank] -= 1
            preempt(requests, ranks, rank, victim, True)
            if victim == request:
                return nobody
        place += 1
    return nobody


@kernel
def _last_choice(requests: Requests, ranks: Ranks, rank: int) -> int:
    """Place of the running request that SGLang retracts first: fewest tokens generated, then the longest prompt."""
    found = 0
    for place in range(1, ranks.running_seqs[rank]):
        this, best = ranks.running[rank, place], ranks.running[rank, found]
        fewer = requests.generated[this] < requests.generated[best]
        same = requests.generated[this] == requests.generated[best]
        if fewer or (same and requests.isl[this] >= requests.isl[best]):
            found = place
    return found


@kernel
def keep_decoding(requests: Requests, ranks: Ranks, limits: Limits, rank: int) -> None:
    """SGLang's rule: before a decode step that does not fit, retract requests until it does, at least one remaining."""
    rule, count = limits.rule, ranks.running_seqs[rank]
    if count == 0:
        return
    needed = 0
    for place in range(count):
        request = ranks.running[rank, place]
        needed += requests.isl[request] + requests.generated[request] + limits.draft_tokens
        needed -= requests.held[request]
        if ranks.cache.tokens > 0:
            needed -= ranks.cache.shared[request] * ranks.cache.tokens
    if ranks.kv_tokens[rank] + needed > limits.kv_tokens:
        made = allowed = 0
        for place in range(count):
            made += requests.generated[ranks.running[rank, place]]
            allowed += requests.osl[ranks.running[rank, place]]
        ranks.output_share[rank] = min(1.0, (made + rule.retract_steps * count) / (allowed + 1))
        while ranks.running_seqs[rank] > 1 and ranks.kv_tokens[rank] + needed > limits.kv_tokens:
            place = _last_choice(requests, ranks, rank)
            request = ranks.running[rank, place]
            own = requests.isl[request] + requests.generated[request] + limits.draft_tokens - requests.held[request]
            if ranks.cache.tokens > 0:
                own -= ranks.cache.shared[request] * ranks.cache.tokens
            needed -= own
            remove_running(ranks, rank, place)
            preempt(requests, ranks, rank, request, False)
    else:
        step = (rule.first_ratio - rule.last_ratio) / rule.ratio_steps
        ranks.output_share[rank] = max(rule.last_ratio, ranks.output_share[rank] - step)
    for place in range(ranks.running_seqs[rank]):
        request = ranks.running[rank, place]
        take(
            requests,
            ranks,
            limits,
            rank,
            request,
            requests.isl[request] + requests.generated[request] + limits.draft_tokens,
        )


@kernel
def expected_output(requests: Requests, ranks: Ranks, limits: Limits, rank: int) -> float:
    """Tokens that SGLang expects the running requests of a rank still to make."""
    total = 0.0
    for place in range(ranks.running_seqs[rank]):
        request = ranks.running[rank, place]
        left = requests.osl[request] - requests.generated[request]
        total += min(left, limits.rule.most_output) * ranks.output_share[rank]
    return total


@kernel
def computed(requests: Requests, request: int) -> bool:
    """Whether a waiting request's context was computed elsewhere and came with it (decode role)."""
    return bool(requests.generated[request] > 0 and requests.read[request] >= requests.target[request])


@kernel
def admit(
    requests: Requests, ranks: Ranks, limits: Limits, rank: int, request: int, expected: float, alone: bool
) -> bool:
    """Whether a rank takes in a waiting request by the engine's rule; if so, what the prefix cache holds is locked.

    expected: tokens that others will still need (ESTIMATE). alone: nobody else is on the rank, which SGLang's own
    limit on the length of a request stands for.
    """
    target = requests.target[request]
    found, used = find(ranks.cache, rank, request, target)
    block = ranks.cache.tokens
    free = limits.kv_tokens - ranks.kv_tokens[rank]
    left = requests.osl[request] - requests.generated[request]
    if limits.rule.code == CONTEXT:
        if requests.isl[request] + requests.osl[request] + limits.draft_tokens - used * block > free:
            return False
    elif limits.rule.code == ESTIMATE:
        asked = target - found * block + min(left, limits.rule.most_output) + limits.rule.page_tokens
        idle = (found - used) * block  # becomes used, which SGLang sees as memory that is gone
        if asked + idle >= free - expected and not (alone and asked + idle - limits.rule.page_tokens <= free):
            ranks.full[rank] = True
            return False
    elif -(-target // limits.rule.page_tokens) * limits.rule.page_tokens - used * block > free:
        return False
    if block > 0:
        ranks.kv_tokens[rank] += lock(ranks.cache, rank, request, found)
        if requests.preempted[request] == 0:
            ranks.cache.asked_tokens[rank] += requests.isl[request]
            ranks.cache.found_tokens[rank] += found * block
    if not computed(requests, request):
        requests.read[request] = found * block
    if limits.rule.code == CONTEXT:
        context = requests.isl[request] + requests.osl[request] + limits.draft_tokens
        take(requests, ranks, limits, rank, request, context)
    return True
