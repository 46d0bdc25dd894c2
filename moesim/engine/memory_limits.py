"""What an engine's memory option is a share of, and the KV cache that it leaves.

all: vLLM's `gpu_memory_utilization`. static: SGLang's `mem_fraction_static` (model_runner.profile_max_num_token takes
the share of what is free once its processes are connected, for weights and cache; activations and graphs get what
remains). free: TensorRT-LLM's `free_gpu_memory_fraction` (KvCacheCreator: of what a trial run leaves).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moesim.spec.workload import MemorySpec

Of = Literal["all", "static", "free"]
BEFORE_WEIGHTS = ("runtime", "nccl_buffers")


def limit_bytes(items: Mapping[str, float], hbm_bytes: float, memory: MemorySpec) -> float:
    """Bytes that all items and the KV cache may take together. items: name -> bytes, without `kv_cache`.

    Less than the items' sum where no cache is left.
    """
    fixed = sum(items.values())
    if memory.fraction_of == "all":
        return hbm_bytes * memory.fraction - memory.reserved_bytes
    if memory.fraction_of == "free":
        return fixed + (hbm_bytes - fixed) * memory.fraction - memory.reserved_bytes
    cache = (hbm_bytes - _before(items)) * memory.fraction - _weights(items) - memory.reserved_bytes
    return min(fixed + cache, hbm_bytes)


def share(items: Mapping[str, float], hbm_bytes: float, of: Of) -> float:
    """The `fraction` that gives the KV cache of a ledger's items where it is a share `of` that: 0 to 1."""
    used = sum(items.values())
    cache = items["kv_cache"]
    if of == "free":
        return cache / (hbm_bytes - used + cache)
    if of == "static":
        return (_weights(items) + cache) / (hbm_bytes - _before(items))
    return used / hbm_bytes


def _before(items: Mapping[str, float]) -> float:
    return sum(items.get(name, 0.0) for name in BEFORE_WEIGHTS)


def _weights(items: Mapping[str, float]) -> float:
    return sum(size for name, size in items.items() if name.startswith("weights_"))
