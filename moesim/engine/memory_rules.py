"""How an engine gives KV memory to requests: what it asks before it admits one, and who gives way when memory ends."""

from __future__ import annotations

from typing import NamedTuple

from moesim.errors import BadInput

# Codes for the compiled batcher.
CONTEXT, ESTIMATE, GROW = 0, 1, 2


class MemoryRule(NamedTuple):
    """One engine's rule.

    code: CONTEXT reserves prompt and output of a request at its admission, so that nobody ever gives way; ESTIMATE and
    GROW take tokens as they come. page_tokens: memory is taken in whole pages. first_ratio, last_ratio, ratio_steps:
    ESTIMATE expects running requests to need this share of the output they may still make, falling linearly over so
    many decode steps; retract_steps: after a retraction the share starts again from what was generated so far plus this
    many tokens each; most_output: expected output of a request at most.
    """

    code: int
    page_tokens: int
    first_ratio: float
    last_ratio: float
    ratio_steps: int
    retract_steps: int
    most_output: int


RESERVE = MemoryRule(CONTEXT, 1, 1.0, 1.0, 1, 0, 2**60)
# SGLang, srt/managers/schedule_policy.py (PrefillAdder), schedule_batch.py (retract_decode) and environ.py:
# SGLANG_INIT_NEW_TOKEN_RATIO 0.7, SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR 0.14 of it, SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS 600,
# SGLANG_RETRACT_DECODE_STEPS 20, SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION 4096; --page-size 1.
SGLANG = MemoryRule(ESTIMATE, 1, 0.7, 0.7 * 0.14, 600, 20, 4096)
# vLLM, v1/core/sched/scheduler.py and v1/core/kv_cache_manager.py: blocks of 16 tokens as they fill; a waiting request
# enters when its whole prompt fits (scheduler_reserve_full_isl, default on, watermark 0); the last one admitted gives
# way.
VLLM = MemoryRule(GROW, 16, 1.0, 1.0, 1, 0, 2**60)

_BY_ENGINE = {"sglang": SGLANG, "vllm": VLLM, "moesim": VLLM}


def memory_rule(admission: str, engine: str, split: int = 1) -> MemoryRule:
    """The rule that `serving.memory.admission` asks for: `reserve`, or `engine` for the named engine's own.

    split: GPUs that share a context. A page of the engine is then one on each of them: so many times the tokens (vLLM's
    block size x dcp size; SGLang widens its page size likewise).
    """
    if admission == "reserve":
        return RESERVE
    if engine not in _BY_ENGINE:
        raise BadInput(
            f"how {engine!r} admits requests is not modelled",
            where="serving.memory.admission",
            mend="use admission: reserve",
        )
    rule = _BY_ENGINE[engine]
    return rule._replace(page_tokens=rule.page_tokens * split)
