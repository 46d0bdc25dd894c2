"""The compiled prefix cache against a plain one, and hit rates that can be written down."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

from moesim.engine.batch_state import Limits, Plan
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM
from moesim.engine.prefix_cache import evict, find, lock, new_prefix_cache, release, store
from moesim.engine.request_traces import read_request_trace
from moesim.engine.serving import Load, PromptBlocks, Served, serve

BLOCK = 4


class PlainCache:
    """Uses of held blocks, and the unused ones in the order they are to be evicted."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    def find(self, chain: list[int], target: int) -> int:
        found = 0
        while found < min(len(chain), (target - 1) // BLOCK) and chain[found] in self.uses:
            found += 1
        return found

    def use(self, block: int) -> None:
        self.uses[block] = self.uses.get(block, 0) + 1
        self.idle.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.idle[block] = None

    def evict(self, most: int) -> None:
        while len(self.idle) * BLOCK > max(most, 0):
            block, _ = self.idle.popitem(last=False)
            del self.uses[block]


def test_as_a_plain_cache_does_it() -> None:
    rng = np.random.default_rng(0)
    # Prompts walk down a tree: a block's name tells the whole way to it.
    chains = []
    for _ in range(400):
        name, chain = 0, []
        for _ in range(int(rng.integers(0, 6))):
            name = name * 3 + int(rng.integers(1, 4))
            chain.append(name)
        chains.append(chain)
    offsets = np.concatenate([[0], np.cumsum([len(chain) for chain in chains])])
    cache = new_prefix_cache(len(chains), 1, BLOCK, offsets, np.asarray([x for chain in chains for x in chain]))
    plain, inside = PlainCache(), []
    lengths = [len(chain) * BLOCK + int(rng.integers(1, BLOCK)) for chain in chains]
    hits = 0
    for request, chain in enumerate(chains):
        found, used = find(cache, 0, request, lengths[request])
        assert found == plain.find(chain, lengths[request])
        assert used == sum(plain.uses[block] > 0 for block in chain[:found])
        hits += found
        lock(cache, 0, request, found)
        for block in chain[:found]:
            plain.use(block)
        store(cache, 0, request, lengths[request])
        for block in chain[found:]:
            plain.use(block)
        inside.append(request)
        if len(inside) > 5:
            leaving = inside.pop(int(rng.integers(len(inside))))
            release(cache, 0, leaving)
            plain.release(chains[leaving])
        most = int(rng.integers(20, 120))
        evict(cache, 0, most)
        plain.evict(most)
        assert cache.idle_tokens[0] == len(plain.idle) * BLOCK
    assert hits > 100


def shared(limits: Limits, isl: list[int], chains: list[list[int]], osl: int = 1) -> Served:
    offsets = np.concatenate([[0], np.cumsum([len(chain) for chain in chains])])
    blocks = PromptBlocks(BLOCK, offsets, np.asarray([x for chain in chains for x in chain]))
    load = Load(np.asarray(isl), np.full(len(isl), osl), concurrency=1, blocks=blocks)

    def step(plan: Plan) -> float:
        return float(plan.prefill_tokens.sum()) or 1.0

    return serve(load, limits, ranks=1, instances=1, step_time=step)


def test_a_prompt_computes_only_what_is_not_there() -> None:
    limits = Limits(100, 4, 1000, True, False)
    served = shared(limits, [10, 10, 8], [[1, 2], [1, 2], [1, 2]])
    # Two full blocks of the second prompt are found; of the third one, as its last token has to be computed.
    assert (served.finish_s - served.arrival_s).tolist() == [10.0, 2.0, 4.0]
    assert (served.prefix_found_tokens, served.prefix_asked_tokens) == (12, 28)


def test_what_is_needed_is_evicted_least_recently_used_first() -> None:
    # Room for 17 tokens, 8 of them idle blocks: the second prompt (9 + 1) evicts one, the tail of the first prompt.
    limits = Limits(100, 4, 17, True, False)
    served = shared(limits, [9, 9, 9], [[1, 2], [3, 4], [1, 2]])
    assert served.prefix_found_tokens == 4


def test_all_rules_find_the_same_when_memory_is_ample() -> None:
    chains = [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3]]
    for rule, mixes in ((SGLANG, False), (VLLM, True)):
        served = shared(Limits(100, 4, 1000, True, mixes, rule), [14, 14, 6, 14], chains, osl=3)
        assert served.prefix_found_tokens == 8 + 0 + 12
        assert served.preemptions == 0


def test_a_published_trace_finds_what_was_ever_read_when_memory_is_ample(shared_data: Path) -> None:
    """One request at a time on one rank that forgets nothing: the trace's own reuse, counted in plain Python."""
    trace = read_request_trace(shared_data / "requests" / "mooncake_synthetic_trace.jsonl")
    assert trace.blocks is not None
    seen: set[int] = set()
    found = 0
    for request in range(len(trace.isl)):
        chain = trace.blocks.hashes[trace.blocks.offsets[request] : trace.blocks.offsets[request + 1]].tolist()
        length = int(trace.isl[request])
        hits = 0
        while hits < min(len(chain), (length - 1) // 512) and chain[hits] in seen:
            hits += 1
        found += hits * 512
        seen.update(chain[: length // 512])
    assert found > 0.1 * trace.isl.sum()

    def step(plan: Plan) -> float:
        return 1.0

    limits = Limits(8192, 4, 10**9, True, False)
    for rule in (RESERVE, SGLANG, VLLM):
        load = Load(trace.isl, np.ones_like(trace.osl), concurrency=1, blocks=trace.blocks)
        served = serve(load, limits._replace(rule=rule), ranks=1, instances=1, step_time=step)
        assert served.prefix_found_tokens == found
        assert served.step_prefill_tokens.sum() == trace.isl.sum() - found
