"""How an engine would run a decode batch of so many tokens a rank: its dispatch mode, and why it would not run it."""

from __future__ import annotations

import math

from moesim.engine.batch_rules import exchange_mode, low_latency_sequences
from moesim.engine.deployment import Deployment
from moesim.engine.rules import low_latency_tokens
from moesim.engine.speculative import draft_tokens
from moesim.engine.workload import lengths


def decode_mode(deployment: Deployment, tokens: int) -> str:
    """The dispatch mode of a decode step: the engine's, whatever the profile holds.

    More tokens a rank than low-latency dispatch takes do not run under `auto` (see `refused`) and are priced in normal.
    """
    dispatch = deployment.setup.policies.dispatch
    mode = exchange_mode(deployment, "decode")
    if dispatch.mode != "auto" or mode != "low_latency":
        return mode
    limit = low_latency_tokens(dispatch.low_latency_tokens, deployment.rules.name) * deployment.setup.parallel.tp
    return mode if tokens <= limit else "normal"


def refused(deployment: Deployment, tokens: int) -> str:
    """Why no decode step of so many tokens of an attention-DP rank ever runs, every reason; "" where it does.

    Of the limits that `simulate` runs by: requests of a rank, low-latency dispatch, and a KV cache that holds the
    requests in the middle of their output.
    """
    requests = math.ceil(tokens / (1 + draft_tokens(deployment.serving)))
    asked = lengths(deployment.serving.workload)
    needed = requests * (asked.mean_isl + asked.mean_osl / 2)
    found = []
    most = deployment.serving.batching.max_running_requests_per_dp_rank
    if requests > most:
        found.append(f"a rank runs at most {most} requests (serving.batching.max_running_requests_per_dp_rank)")
    taken = low_latency_sequences(deployment)
    if taken is not None and requests > taken:
        found.append(f"low-latency dispatch takes at most {taken} requests of a rank (policies.dispatch.mode)")
    room = deployment.memory.kv_capacity_tokens
    if needed > room:
        found.append(f"{requests} requests need a KV cache of {needed:,.0f} tokens, a rank's holds {room:,}")
    return "; ".join(found)
