"""From what ran behind a disaggregated row to the scenario that describes it: roles, batch limits, dispatch, drafts.

Settings were read in the launch files' own recipes (ishandhanani/srt-slurm and NVIDIA/srt-slurm, `recipes/`, January
to May 2026). TensorRT-LLM: prefill workers read whole prompts, as many as 16384 tokens hold at ISL 1k (8192 on Hopper,
4608 in 2025) and two at 8k (one in 2025), without overlap and graphs. SGLang: 16384 tokens of chunk for each
attention-DP rank (131072 over 8, 65536 over 4), 131072 or 8192 in TP.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.errors import Infeasible
from moesim.spec.scenario import Scenario
from validate.silicon.disagg_launches import Workers
from validate.silicon.disagg_rows import Ran
from validate.silicon.rows import Layout, SiliconRow
from validate.silicon.scenario import GPUS_PER_NODE, SYSTEMS, precision_of
from validate.silicon.settings import HOPPER, Settings, settings_of

# GPUs of the cluster that all deployments of a system are cut from, so that they share its prices.
CLUSTER_GPUS = 128
# Tokens that one more step yields with 1, 2 and 3 drafts of DeepSeek-R1 (TensorRT-LLM, docs blog1: 1.92, 2.58, 2.82),
# as the acceptance of each draft that gives them.
ACCEPTANCE = {1: 0.92, 2: 0.853, 3: 0.770}
MOST_RUNNING, FEWEST_RUNNING = 1024, 32
# Tokens of a decode worker's step that its buffers are made for at least.
FEWEST_TOKENS = 2048
# SGLang's wide expert parallelism: copies of experts, and SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK.
REDUNDANT, LOW_LATENCY_TOKENS = 32, 768
# TensorRT-LLM's free_gpu_memory_fraction is of what weights leave; SGLang's low-latency files set 0.95 of all.
MEMORY = {"trtllm": 0.97, "sglang": 0.9}
FEWEST_REQUESTS = 16
# Models that differ in their weights alone share prices.
ALIKE = {"deepseek-ai/DeepSeek-V3": "deepseek-ai/DeepSeek-R1"}


def disagg_scenario(row: SiliconRow, ran: Ran, profiles: Path, rounds: int) -> Scenario:
    """The scenario of a disaggregated row, `rounds` requests for each place of its closed loop.

    Raises Infeasible or BadInput with the reason why the row is not supported.
    """
    if row.concurrency is None:
        raise Infeasible("the row does not say how many requests were in flight", reason="no_concurrency")
    for pool in (ran.prefill, ran.decode):
        _check(pool.layout)
    folder = profiles / row.system
    if not folder.is_dir():
        raise Infeasible(f"no profile of {row.system}", reason="no_profile")
    prefill, decode = (_settings(row, pool.layout) for pool in (ran.prefill, ran.decode))
    node = GPUS_PER_NODE.get(row.system, 8)
    cost = {"source": "store", "profiles": [str(folder)], "extrapolate": "allow"}
    kernels = _kernels(row, ran, decode)
    if kernels is not None:
        cost["experts_from"] = kernels
    speculative = {"method": "mtp", "draft_tokens": ran.drafts, "acceptance": ACCEPTANCE.get(ran.drafts, 0.0)}
    return Scenario.read(
        {
            "schema_version": 1,
            "model": ALIKE.get(row.model, row.model),
            "cluster": {
                "system": SYSTEMS.get(row.system, row.system),
                "nodes": -(-CLUSTER_GPUS // node),
                "gpus_per_node": node,
            },
            "engine": {"name": row.engine, "version": "unknown"},  # prices do not hang on it
            "precision": precision_of(replace(decode, gather=None)),
            "cost": cost,
            "serving": {
                "workload": {
                    "isl": row.isl,
                    "osl": row.osl,
                    "requests": max(rounds * row.concurrency, FEWEST_REQUESTS),
                    "arrivals": {"concurrency": row.concurrency},
                    "range_ratio": decode.range_ratio,
                },
                "speculative": speculative if ran.drafts else None,
                "memory": {
                    "fraction": MEMORY.get(row.engine, decode.memory),
                    "admission": _admission(row),
                },
                "roles": {
                    "prefill": _role(row, ran.prefill, _prefill_batching(row, ran.prefill.layout), prefill),
                    "decode": _role(row, ran.decode, _decode_batching(row, ran), decode),
                },
            },
        },
        where=row.id,
    )


def _check(layout: Layout) -> None:
    if layout.expert_tp * layout.ep != layout.tp * layout.attention_dp:
        raise Infeasible(
            f"expert TP {layout.expert_tp} x EP {layout.ep} is not TP {layout.tp} x attention DP "
            f"{layout.attention_dp}: the sizes contradict each other",
            reason="contradictory_layout",
        )


def _settings(row: SiliconRow, layout: Layout) -> Settings:
    return settings_of(replace(row, layout=layout), layout)


def _role(row: SiliconRow, pool: Workers, batching: dict[str, Any], settings: Settings) -> dict[str, Any]:
    layout = pool.layout
    return {
        "gpus": layout.gpus,
        "replicas": pool.count,
        "parallel": {
            "tp": layout.tp,
            "pp": layout.pp,
            "attention_dp": layout.attention_dp,
            "ep": layout.ep,
            "expert_tp": layout.expert_tp,
        },
        "policies": {"dispatch": _dispatch(row, layout)},
        "placement": _placement(row, layout),
        "batching": batching,
        "precision": precision_of(replace(settings, gather=None)),
    }


def _placement(row: SiliconRow, layout: Layout) -> dict[str, Any]:
    """SGLang's wide experts lie as a map made by its `deepseek` algorithm has them; others in order.

    Assumed: the arguments that SGLang publishes for wide expert parallelism (`--ep-num-redundant-experts 32
    --eplb-algorithm deepseek --init-expert-location`), as rows name no map.
    """
    if row.engine == "sglang" and _wide(row, layout):
        return {"solver": "eplb", "redundant_experts": REDUNDANT}
    return {"solver": "contiguous", "redundant_experts": 0}


def joined_gpus(row: SiliconRow, ran: Ran) -> int:
    """GPUs that NVLink joins: 8, or in racks as many as the larger worker has, which are all in one domain."""
    return max(ran.prefill.layout.gpus, ran.decode.layout.gpus) if row.system in GPUS_PER_NODE else 8


def _kernels(row: SiliconRow, ran: Ran, settings: Settings) -> str | None:
    """The engine whose expert kernels ran: SGLang's wide FP4 runs took CUTLASS and CuteDSL, as TRT-LLM's tables."""
    if row.engine == "sglang" and row.precision == "fp4" and ran.decode.layout.attention_dp > 1:
        return "trtllm"
    return settings.experts_from


def _wide(row: SiliconRow, layout: Layout) -> bool:
    """Whether whole experts lie on the GPUs of several trays of a rack, all with attention of their own."""
    return row.system in GPUS_PER_NODE and layout.attention_dp == layout.ep > GPUS_PER_NODE[row.system]


def _dispatch(row: SiliconRow, layout: Layout) -> dict[str, Any]:
    """Over racks kernels that write to all GPUs at once, DeepEP's or TensorRT-LLM's over NVLink; else as elsewhere."""
    if layout.attention_dp == 1:
        return {"backend": "allreduce"}
    if _wide(row, layout):
        return {"backend": "deepep", "low_latency_tokens": LOW_LATENCY_TOKENS}
    return {"backend": "alltoall" if layout.gpus > 8 and layout.expert_tp == 1 else "allgather_reducescatter"}


def _prefill_batching(row: SiliconRow, layout: Layout) -> dict[str, Any]:
    first = row.version.startswith("0.5")
    if row.engine == "trtllm":
        if row.isl > 2048:
            tokens, prompts = (8448, 1) if first else (16640, 2)
        elif first:
            tokens, prompts = 4608, 4
        else:
            tokens, prompts = (8192, 8) if row.system in HOPPER else (16384, 16)
        return _batching(tokens, prompts, chunked=False)
    if row.engine == "sglang":
        tp = 131072 if row.precision == "fp4" else 8192
        return _batching(16384 if layout.attention_dp > 1 else tp, 256, chunked=True)
    return _batching(_settings(row, layout).batch_tokens, 256, chunked=True)


def _decode_batching(row: SiliconRow, ran: Ran) -> dict[str, Any]:
    """Requests wait for a place where a file limits them; else a rank takes up to twice its even share."""
    ranks = ran.decode.count * ran.decode.layout.attention_dp
    share = -(-max(1, row.concurrency or 1) // ranks)
    running = ran.running or min(MOST_RUNNING, 2 * share)
    # No rank is ever sent more than all requests in flight: smaller tables price the same run. Sizes are rounded up, so
    # that loads share them.
    load = max(FEWEST_RUNNING, row.concurrency or 1)
    running = min(ran.running or MOST_RUNNING, _power(load if ran.running else min(load, max(FEWEST_RUNNING, running))))
    return _batching(decode_tokens(running, ran.drafts), running, chunked=True)


def decode_tokens(running: int, drafts: int) -> int:
    """Tokens that a step of a decode worker may have, which reads no prompts."""
    return max(FEWEST_TOKENS, 2 * running * (1 + drafts))


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _admission(row: SiliconRow) -> str:
    """TensorRT-LLM keeps room for whole requests (GUARANTEED_NO_EVICT); SGLang nearly does so where it decodes alone.

    Its DecodePreallocQueue admits a request when the prompt and up to 512 tokens to come find room.
    """
    return "engine" if row.engine == "vllm" else "reserve"


def front_end_s(row: SiliconRow) -> float:
    """The front end's time with a request, as in aggregated rows: what routers between the pools take is not known."""
    return _settings(row, row.layout).front_end_s


def _batching(tokens: int, running: int, *, chunked: bool) -> dict[str, Any]:
    return {
        "max_batch_tokens_per_dp_rank": tokens,
        "max_running_requests_per_dp_rank": running,
        "chunked_prefill": chunked,
    }
