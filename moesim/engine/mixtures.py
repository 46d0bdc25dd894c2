"""Steps whose requests are each of one load, so that a small batch is of few loads and a large one of all."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.engine.deployment import Deployment
from moesim.engine.routing_draws import RoutingDraws, shared_draws
from moesim.engine.speculative import draft_tokens
from moesim.engine.workload import lengths

Floats = NDArray[np.float64]
MIXED = ("decode", "prefill")


class RequestMix(RoutingDraws):
    """Draws for steps of each phase: the loads of a phase are mixed by request, in the given weights.

    It holds one mix for each phase, decode at 0 and prefill at 1, which take the place of loads. How many requests of
    a step are of which load is multinomial; every request brings as many tokens as the others. The dispersion is drawn
    for each load's part of a step.
    """

    def __init__(
        self, draws: RoutingDraws, load_weights: Floats, *, decode_tokens: float, prompt_tokens: float
    ) -> None:
        """load_weights: [loads]. decode_tokens, prompt_tokens: of one request in a step."""
        self.draws, self.load_weights = draws, load_weights
        self.loads, self.samplers, self.dispersion = draws.loads, draws.samplers, draws.dispersion
        self.top_k = draws.top_k
        self._kept, self._kept_bytes = OrderedDict(), 0  # draws of this mix alone
        self.weights = np.full(len(MIXED), 1.0 / len(MIXED))
        self.tokens_of_request = (decode_tokens, prompt_tokens)

    def under(self, load_weights: Floats) -> RequestMix:
        """The same with other weights."""
        decode, prompt = self.tokens_of_request
        return RequestMix(self.draws, load_weights, decode_tokens=decode, prompt_tokens=prompt)

    def for_phase(self, phase: str) -> list[int]:
        """The mix of a phase."""
        return [MIXED.index(phase)] if phase in MIXED else list(range(len(MIXED)))

    def counts(
        self, load: int, tokens: ArrayLike, rng: np.random.Generator, *, requests: ArrayLike | None = None
    ) -> Floats:
        """Counts [steps, layers, experts] of steps of a mix; arguments as in RoutingDraws."""
        whole = np.maximum(1, np.rint(np.asarray(tokens, dtype=np.float64))).astype(np.int64)
        each = self.tokens_of_request[load]
        held = np.maximum(1, np.rint(whole / each if requests is None else np.asarray(requests)).astype(np.int64))
        members = self.draws.for_phase(MIXED[load])
        weights = self.load_weights[members]
        drawn = rng.multinomial(np.broadcast_to(held, whole.shape), weights / weights.sum())
        shared = whole[:, None] * drawn // np.maximum(drawn.sum(axis=1, keepdims=True), 1)
        shared[np.arange(len(whole)), drawn.argmax(axis=1)] += whole - shared.sum(axis=1)
        parts = [
            self.samplers[member].counts(
                shared[:, place], rng, self.dispersion, requests=np.maximum(drawn[:, place], 1)
            )
            for place, member in enumerate(members)
        ]
        return np.asarray(np.sum(parts, axis=0))


def routing_of(deployment: Deployment) -> RoutingDraws:
    """The routing that a deployment meets, mixed as its scenario says."""
    draws = shared_draws(deployment.ground.judge, deployment.setup.model.moe.top_k)
    if deployment.scenario.routing.mix == "step":
        return draws
    serving = deployment.serving
    prompt = min(lengths(serving.workload).mean_isl, float(serving.batching.max_batch_tokens_per_dp_rank))
    return RequestMix(draws, draws.weights, decode_tokens=1.0 + draft_tokens(serving), prompt_tokens=max(prompt, 1.0))
