"""Prices the steps of a whole plan: what `Pricer` does, and what its schedule and its storage add."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutsideProfile
from moesim.graph.batch import StepBatch
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.pricing import Pricer

# Numbers of chunks that an adaptive pipeline chooses from, as Tutel's search does (arXiv:2206.03382, adaptive
# pipelining). The first is the layer in one piece.
CHOICES = (1, 2, 4, 8)
# DeepEP's low-latency kernels use two buffers in turn and return views of them, so the results of only two can be alive
# (deepseek-ai/DeepEP, deep_ep/buffer.py, the warning of `low_latency_dispatch`).
LOW_LATENCY_CHUNKS = 2


class PlanPricer(Pricer):
    """Prices steps with their expert fetches and, for a pipeline, at every number of chunks that it may run with."""

    def price(
        self, batch: StepBatch, counts: NDArray[np.float64], *, mode: str, graphed: bool, attention: bool = True
    ) -> PricedStep:
        """Price one set of steps, see `Pricer.price`.

        Of an adaptive pipeline the first choice that can be priced is returned, with the others in `others`. Raises
        OutsideProfile.
        """
        whole = super().price(batch, counts, mode=mode, graphed=graphed, attention=attention)
        storage, placement = self.setup.storage, self.setup.placement
        if storage is not None:
            slots = self.slot_loads(batch, counts)
            by_rank = slots.reshape(*slots.shape[:-1], placement.ranks, placement.slots_per_rank)
            whole = replace(whole, fetch=Part((storage.fetch(by_rank, batch.tokens.sum(axis=1)),)))
        if self.setup.policies.schedule != "pipeline":
            return whole
        return self._in_chunks(whole, counts, mode)

    def _in_chunks(self, whole: PricedStep, counts: NDArray[np.float64], mode: str) -> PricedStep:
        asked = self.setup.policies.overlap.chunks
        if asked != "auto":
            return self._chunked(whole, counts, mode, asked)
        limited = self.setup.policies.dispatch.backend == "deepep" and mode == "low_latency"
        found = []
        for chunks in CHOICES:
            if limited and chunks > LOW_LATENCY_CHUNKS:
                break
            try:
                found.append(self._chunked(whole, counts, mode, chunks))
            except OutsideProfile:  # chunks smaller than what was measured are no choice
                break
        return replace(found[0], others=tuple(found[1:]))

    def _chunked(self, whole: PricedStep, counts: NDArray[np.float64], mode: str, chunks: int) -> PricedStep:
        if chunks == 1:
            return whole
        one = super().price(whole.batch.chunk(chunks), counts / chunks, mode=mode, graphed=True, attention=False)
        return replace(whole, dispatch=one.dispatch, experts=one.experts, combine=one.combine, chunks=chunks)
