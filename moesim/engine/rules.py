"""How each serving engine batches, pads and chooses modes: named rules with their public source.

Host overheads are `assumed` until they are calibrated against measured runs (`overheads.py`); their spread enters every
interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from moesim.cost.host import HostTime
from moesim.errors import BadInput

NO_TIME = HostTime(0.0)


@dataclass(frozen=True)
class EngineRules:
    """Rules of one engine.

    mixes: prompt chunks share a rank's batch with decode tokens (vLLM); else a rank that has prompts to read runs only
    those in the step (SGLang's prefill-first scheduler). capture_sizes: batch sizes with a captured decode graph.
    low_latency_tokens: DeepEP low-latency dispatch limit per GPU as the engine sets it.
    step: host time between steps that nothing hides; layer: host time per layer that kernels do not hide when no graph
    was captured; request: front end's time with a request before its prompt is queued. overhead_rel_sigma: one standard
    deviation of the logarithm of host times that are assumed.
    captures_prompts: a step that reads prompts can run in a captured graph, too (vLLM's cudagraph_mode FULL).
    """

    name: str
    mixes: bool
    capture_sizes: tuple[int, ...]
    low_latency_tokens: int
    step: HostTime
    layer: HostTime
    overhead_rel_sigma: float
    captures_prompts: bool = False
    request: HostTime = NO_TIME

    @property
    def step_overhead_s(self) -> float:
        """Host time between steps."""
        return self.step.seconds

    @property
    def eager_layer_s(self) -> float:
        """Host time of a layer without a captured graph."""
        return self.layer.seconds


# Capture sizes: SGLang server_args.py, default decode list without speculation, up to 512 on GPUs with 140 GB or more.
_SGLANG_SIZES = tuple(chain([1, 2, 4, 8, 12], range(16, 257, 8), range(272, 513, 16)))
# vLLM config (compilation): 1, 2, 4, then every 8 up to 256, every 16 up to 512.
_VLLM_SIZES = tuple(chain([1, 2, 4], range(8, 257, 8), range(272, 513, 16)))
# TensorRT-LLM's PyTorch backend, cuda_graph_config with padding: powers of two to 128, then to max_batch_size.
_TRTLLM_SIZES = tuple(chain(range(1, 33), range(64, 129, 32), (256, 512, 1024, 2048)))
# SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK defaults to 128; vLLM's low-latency buffers hold 256 tokens a rank
# (VLLM_DEEPEP... MOE_DP_CHUNK_SIZE default 256). DeepEP's README advises fewer than 256.
_SGLANG_LOW_LATENCY = 128
_VLLM_LOW_LATENCY = 256
# Assumed: half a millisecond between steps (overlapped schedulers hide most of the host's work), 20 microseconds a
# layer in eager mode (a dozen launches of which long kernels hide most). One sigma of 0.5 is a factor of 1.6.
_OVERHEAD_REL_SIGMA = 0.5
_STEP = HostTime(0.5e-3, _OVERHEAD_REL_SIGMA)
_LAYER = HostTime(20e-6, _OVERHEAD_REL_SIGMA)
# By the even cells of the measured serving runs (docs/accuracy.md): engines that form the next step while the last one
# runs hide nearly all of the host's work.
_VLLM_STEP = HostTime(0.1e-3, _OVERHEAD_REL_SIGMA)
_TRTLLM_STEP = HostTime(0.0, _OVERHEAD_REL_SIGMA)

_RULES = {
    "sglang": EngineRules("sglang", False, _SGLANG_SIZES, _SGLANG_LOW_LATENCY, _STEP, _LAYER, _OVERHEAD_REL_SIGMA),
    "vllm": EngineRules("vllm", True, _VLLM_SIZES, _VLLM_LOW_LATENCY, _VLLM_STEP, _LAYER, _OVERHEAD_REL_SIGMA, True),
    "trtllm": EngineRules("trtllm", True, _TRTLLM_SIZES, _VLLM_LOW_LATENCY, _TRTLLM_STEP, _LAYER, _OVERHEAD_REL_SIGMA),
    "moesim": EngineRules("moesim", True, _VLLM_SIZES, _VLLM_LOW_LATENCY, _STEP, _LAYER, _OVERHEAD_REL_SIGMA, True),
}


def low_latency_tokens(asked: int | None, name: str) -> int:
    """DeepEP's low-latency dispatch limit per GPU: as the scenario sets it, or else the engine."""
    return asked or engine_rules(name).low_latency_tokens


def engine_rules(name: str, *, where: str = "engine.name") -> EngineRules:
    """The rules of an engine. Raises BadInput for one whose rules are not modelled."""
    if name not in _RULES:
        raise BadInput(f"the batching rules of {name!r} are not modelled", where=where, mend=f"use {', '.join(_RULES)}")
    return _RULES[name]
