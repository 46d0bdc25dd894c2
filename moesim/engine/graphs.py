"""Captured CUDA graphs: at which sizes decode batches run, and which batches run eagerly."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from moesim.engine.rules import EngineRules
from moesim.spec.scenario import PoliciesSpec
from moesim.spec.workload import BatchingSpec


@dataclass(frozen=True)
class CapturedGraphs:
    """The decode batch sizes of an attention-DP rank that have a graph, rising; none: all steps run eagerly."""

    sizes: tuple[int, ...]

    def padded(self, tokens: int) -> int:
        """The captured size that a decode batch of `tokens` runs at; the batch itself beyond the largest."""
        place = bisect_left(self.sizes, tokens)
        return self.sizes[place] if place < len(self.sizes) else tokens

    def holds(self, tokens: int) -> bool:
        """Whether a decode batch of `tokens` runs in a graph."""
        return bool(self.sizes) and tokens <= self.sizes[-1]


def captured_graphs(batching: BatchingSpec, policies: PoliciesSpec, rules: EngineRules, *, mode: str) -> CapturedGraphs:
    """The graphs of decode steps whose exchange runs in `mode`.

    DeepEP's normal kernels wait on the host for their sizes and cannot be captured: with them SGLang (server_args.py,
    "Cuda graph is disabled because deepep_mode=`normal`") and vLLM (platforms/cuda.py, deepep_high_throughput) run all
    steps eagerly.
    """
    asked = batching.cuda_graph_sizes
    if asked == "none" or (policies.dispatch.backend == "deepep" and mode == "normal"):
        return CapturedGraphs(())
    return CapturedGraphs(rules.capture_sizes if asked == "engine" else tuple(sorted(asked)))
