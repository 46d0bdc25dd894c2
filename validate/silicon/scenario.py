"""From a measured row to the scenario that describes it; what cannot be described is refused with its reason."""

from __future__ import annotations

from pathlib import Path

from moesim.errors import BadInput, Infeasible
from moesim.spec.scenario import Scenario
from validate.silicon.rows import SiliconRow
from validate.silicon.settings import Settings, benchmark, clients_limit, layout_of, settings_of

# The package's names of systems -> cluster presets.
SYSTEMS = {"gb200": "gb200_nvl72", "gb300": "gb300_nvl72"}
GPUS_PER_NODE = {"gb200": 4, "gb300": 4}
# What each engine's own memory option is a share of.
FRACTION_OF = {"sglang": "static", "trtllm": "free"}
RACKS = tuple(GPUS_PER_NODE)
FEWEST_REQUESTS = 40


def scenario_of(row: SiliconRow, profiles: Path) -> Scenario:
    """The scenario of an aggregated row, priced by the profile in `profiles`/<system>.

    Raises Infeasible or BadInput with the reason why the row is not supported.
    """
    if not row.aggregated:
        raise Infeasible("disaggregated rows of dense models are not priced", reason="disaggregated")
    in_flight = row.in_flight
    if in_flight is None:
        raise Infeasible("the row does not say how many requests were in flight", reason="no_concurrency")
    if row.system in RACKS and benchmark(row):
        raise Infeasible(
            "the benchmark ran GB200 and GB300 disaggregated alone: the row sums the GPUs of both pools",
            reason="summed_pools",
        )
    if clients_limit(row):
        raise Infeasible(
            "the client sent 512 at once to a server of fewer places, which the row does not say", reason="hidden_load"
        )
    layout = layout_of(row)
    if layout.expert_tp * layout.ep != layout.tp * layout.attention_dp:
        raise Infeasible(
            f"expert TP {layout.expert_tp} x EP {layout.ep} is not TP {layout.tp} x attention DP "
            f"{layout.attention_dp}: the sizes contradict each other",
            reason="contradictory_layout",
        )
    folder = profiles / row.system
    if not folder.is_dir():
        raise Infeasible(f"no profile of {row.system}", reason="no_profile")
    settings = settings_of(row, layout)
    node = GPUS_PER_NODE.get(row.system, 8)
    gpus = layout.gpus
    cost = {"source": "store", "profiles": [str(folder)], "extrapolate": "allow"}
    if settings.experts_from is not None:
        cost["experts_from"] = settings.experts_from
    if settings.experts_version is not None:
        cost["experts_version"] = settings.experts_version
    if settings.experts_kernel is not None:
        cost["experts_kernel"] = settings.experts_kernel
    return Scenario.read(
        {
            "schema_version": 1,
            "model": row.model,
            "cluster": {
                "system": SYSTEMS.get(row.system, row.system),
                "nodes": -(-gpus // node),
                "gpus_per_node": min(gpus, node),
            },
            "engine": {"name": row.engine, "version": row.version or "unknown"},
            "precision": precision_of(settings),
            "cost": cost,
            "parallel": {
                "tp": layout.tp,
                "pp": layout.pp,
                "attention_dp": layout.attention_dp,
                "ep": layout.ep,
                "expert_tp": layout.expert_tp,
            },
            "policies": {
                "dispatch": {"backend": "allreduce" if layout.attention_dp == 1 else "allgather_reducescatter"}
            },
            "serving": {
                "workload": {
                    "isl": row.isl,
                    "osl": row.osl,
                    "requests": max(settings.rounds * in_flight, FEWEST_REQUESTS),
                    "arrivals": {"concurrency": in_flight},
                    "range_ratio": settings.range_ratio,
                },
                "batching": {
                    "max_batch_tokens_per_dp_rank": settings.batch_tokens,
                    "max_running_requests_per_dp_rank": settings.running,
                    "chunked_prefill": settings.chunked,
                    "poll_steps": settings.poll_steps,
                    "hold_steps": settings.hold_steps,
                    "gather_steps": settings.gather_steps,
                    "wait_steps": settings.wait_steps,
                    "wait_share": settings.wait_share,
                },
                "balance": settings.balance,
                "memory": {
                    "fraction": settings.memory,
                    "fraction_of": FRACTION_OF.get(row.engine, "all"),
                    "admission": _admission(row),
                },
                **_speculative(settings),
            },
        },
        where=row.id,
    )


def precision_of(settings: Settings) -> dict[str, str]:
    """The scenario's `precision` of a server's types."""
    found = {
        "dense": settings.dense,
        "experts": settings.experts,
        "activations": "bf16",
        "kv_cache": settings.kv,
        "dispatch": "bf16",
        "combine": "bf16",
    }
    if settings.attention is not None:
        found["attention"] = settings.attention
    if settings.gather is not None:
        found["gather"] = settings.gather
    return found


def _speculative(settings: Settings) -> dict[str, dict[str, object]]:
    if not settings.drafts:
        return {}
    return {
        "speculative": {"method": "mtp", "draft_tokens": settings.drafts, "acceptance": settings.acceptance},
    }


def _admission(row: SiliconRow) -> str:
    """TensorRT-LLM keeps room for whole requests (GUARANTEED_NO_EVICT), the others take memory as it is needed."""
    return "reserve" if row.engine == "trtllm" else "engine"


def reason_of(error: Exception) -> str:
    """Why a row is unsupported, in one line."""
    return error.line() if isinstance(error, BadInput | Infeasible) else str(error)
