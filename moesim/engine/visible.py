"""When clients see tokens: engines that prepare a step while the last one runs hand its results out a step late.

vLLM's asynchronous scheduling, SGLang's overlap scheduler and TensorRT-LLM's overlap scheduler all form step n + 1
before the results of step n are read. A request that comes when a step ends therefore waits for one more, which was
prepared without it, and its tokens are sent when the step after theirs ends. Before and behind that, the front end
(HTTP, tokenizer, detokenizer) takes its time with each request.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.serving import Served
from moesim.errors import BadInput

Floats = NDArray[np.float64]


def as_seen(served: Served, *, lag: bool, front_end_s: float) -> Served:
    """A run of one instance as its clients see it: first tokens and ends later, tokens as far apart as they were.

    lag: the engine prepares a step ahead. front_end_s: of a request, before its prompt is queued. Raises BadInput where
    several instances ran, whose steps are not told apart by request.
    """
    if len(np.unique(served.step_instance)) > 1:
        raise BadInput("results a step late are modelled for one instance only", mend="ask for one instance")
    late_s = np.full(len(served.arrival_s), front_end_s)
    if lag and served.steps:
        late_s = late_s + _step_before(served, served.arrival_s) + _step_from(served, served.first_token_s)
    return replace(served, first_token_s=served.first_token_s + late_s, finish_s=served.finish_s + late_s)


def with_pause(served: Served, tokens: int, seconds: float) -> Served:
    """A run whose first step of at least `tokens` prompt tokens takes `seconds` more, and all that follows comes later.

    As when kernels for so many rows are compiled at their first use. `gaps_s` and `step_s` stay as they were. Nothing
    happens where no step is as large.
    """
    large = np.flatnonzero(served.step_prefill_tokens >= tokens)
    if len(large) == 0:
        return served
    end_s = float(served.step_start_s[large[0]] + served.step_s[large[0]]) - 1e-9

    def later(times_s: Floats) -> Floats:
        return np.where(times_s >= end_s, times_s + seconds, times_s)

    return replace(
        served,
        arrival_s=later(served.arrival_s),
        first_token_s=later(served.first_token_s),
        finish_s=later(served.finish_s),
        duration_s=float(later(np.asarray(served.duration_s))),
        step_start_s=later(served.step_start_s),
    )


def _step_before(served: Served, times_s: Floats) -> Floats:
    """Seconds of the step that ends at each time, or is running then: as long as the prepared one; 0 where none is."""
    starts, seconds = served.step_start_s, served.step_s
    at = np.searchsorted(starts, times_s - 1e-9, side="left") - 1
    known = np.clip(at, 0, len(starts) - 1)
    near = (at >= 0) & (times_s - 1e-9 <= starts[known] + seconds[known])
    return np.where(near, seconds[known], 0.0)


def _step_from(served: Served, times_s: Floats) -> Floats:
    """Seconds of the step that begins at each time, or that is running then; 0 where none is."""
    starts, seconds = served.step_start_s, served.step_s
    at = np.clip(np.searchsorted(starts, times_s + 1e-9, side="right") - 1, 0, len(starts) - 1)
    running = (times_s + 1e-9 >= starts[at]) & (times_s + 1e-9 < starts[at] + seconds[at])
    return np.where(running, seconds[at], 0.0)
