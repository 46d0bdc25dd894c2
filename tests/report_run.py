"""A small run folder, written by hand: what the report's tests read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.scenarios import small

RANKS, LAYERS = 8, 5
METRICS = {
    "output_tokens_per_s_per_gpu": 179.55311993338307,
    "ttft_s.p50": 0.18407151740765704,
    "ttft_s.p99": 0.2871763682367036,
    "tpot_s.p50": 0.0120141234,
    "tpot_s.p90": 0.0131,
    "tpot_s.p99": 0.0145,
    "rank_load_max_over_mean": 1.0621,
    "memory_peak_bytes": 18323273264.0,
}


def plan_row(label: str, scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A plan whose rates are `scale` times, and whose times are 1/`scale` times, those of METRICS."""
    metrics = {
        name: value * scale if "per_s" in name else value / scale if name.startswith("t") else value
        for name, value in METRICS.items()
    }
    row: dict[str, Any] = {
        "label": label,
        "parallel": {"attention_dp": RANKS, "ep": RANKS},
        "status": "ok",
        "meets_slo": scale > 0.9,
        "metrics": metrics,
        "intervals": {
            name: {"low": value * 0.97, "high": value * 1.04, "level": 0.9} for name, value in metrics.items()
        },
    }
    return row | changes


def explained(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """An explained step whose ranks wait for rank 0."""
    waited = np.r_[0.0, rng.uniform(0.001, 0.002, RANKS - 1)]
    path = {"engine_overhead": 0.0005, "attention_projections": 0.003, "dispatch": 0.0025, "experts": 0.004}
    return {
        "kind": kind,
        "which": "typical",
        "mode": "normal",
        "share_of_time": 0.5,
        "tokens_per_dp_rank": 12.0,
        "reading_ranks": 1 if kind == "prefill" else 0,
        "drawn_steps": 8,
        "step_s": 0.01,
        "critical_path_s": path,
        "busy_s": path,
        "exposed_communication_s": [0.003] * RANKS,
        "waited_s": waited.tolist(),
        "waited_for_operation_s": {
            "attention_projections": (waited * 0.7).tolist(),
            "experts": (waited * 0.3).tolist(),
        },
        "waited_for_rank_s": [float(waited.mean()), *[0.0] * (RANKS - 1)],
        "layers": [
            {
                "layer": 3 + row,
                "rank": row,
                "rank_over_mean": 1.2 + row / 10,
                "slowest_rank": row,
                "slowest_over_mean": 1.1,
                "per_step_max_over_mean": 1.4,
                "expert": 5,
                "expert_over_mean": 7.5,
                "replicas": 1 + row,
            }
            for row in range(LAYERS)
        ],
        "what_if": {
            name: {"step_s": 0.01 * (1 - saves), "saves": saves}
            for name, saves in (
                ("perfect_balance", 0.3),
                ("infinite_network", 0.25),
                ("perfect_overlap", 0.2),
                ("no_host_overhead", 0.05),
            )
        },
        "without_operation": {
            name: {"step_s": 0.01 - seconds, "saves": 100 * seconds} for name, seconds in path.items()
        },
        "exchange_evened": True,
        "traffic": {
            "tag": "formula",
            "links": [
                {"from": f"nic{rank}", "to": "leaf0", "dispatch_bytes": 1e8, "combine_bytes": 2e8, "full_rate_s": 0.006}
                for rank in range(RANKS)
            ],
            "endpoint_bytes": {"nic_out": [3e8] * RANKS},
        },
    }


def told(seed: int, spread: float) -> dict[str, Any]:
    """A simulation's figures and series."""
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0.0, spread, (LAYERS, RANKS))
    loads /= loads.mean(axis=1, keepdims=True)
    curves = {name: np.sort(rng.gamma(4.0, 0.01, 101)).tolist() for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s")}
    at = np.linspace(0.0, 9.0, 40)
    metrics = {"requests_completed": 120, "duration_s": 9.1, "output_tokens_per_s_per_gpu": 179.5}
    latencies = {name: {"mean": 0.02, "p50": 0.02, "p90": 0.03, "p99": 0.04} for name in ("ttft_s", "tpot_s")}
    return {
        "figures": {
            "metrics": {**metrics, **latencies},
            "intervals": {"tpot_s.p99": {"low": 0.035, "high": 0.045, "level": 0.9}},
            "step": {
                "tokens_per_dp_rank": 12.0,
                "step_s": 0.0111,
                "by_operation_s": {"attention": 0.003, "experts": 0.004, "dispatch": 0.001, "combine": 0.0015},
                "exposed_communication_s": 0.0025,
                "by_rank_s": [0.008] * RANKS,
            },
            "routing": {
                "max_over_mean": float(loads.max(axis=1).mean()),
                "per_step_max_over_mean": 1.9,
                "dropped_fraction": 0.0,
                "dispersion": "assumed",
                "judged_on": ["synthetic-0", "synthetic-1"],
                "judged_on_fit": False,
            },
            "memory": {
                "peak_bytes": 18.3e9,
                "limit_bytes": 130e9,
                "ledger": {"weights_attention": 2e9, "weights_experts": 12e9, "runtime": 2.5e9, "kv_cache": 113.5e9},
            },
            "load": {
                "offered_output_tokens_per_s_per_gpu": 182.0,
                "served_output_tokens_per_s_per_gpu": 179.5,
                "fault": "the batch still grows when the arrivals end (200 to 340 sequences in a step)"
                if seed
                else None,
            },
            "slo": {
                "met": True,
                "limits": [
                    {"metric": "ttft_s.p99", "limit_s": 2.0, "value_s": 0.287, "met": True},
                    {"metric": "tpot_s.p99", "limit_s": 0.05, "value_s": 0.0145, "met": True},
                ],
            },
            "provenance": {"interpolated": 0.6, "measured": 0.15, "formula": 0.246, "assumed": 0.004},
            "plan": {
                "parallel": {"attention_dp": RANKS, "ep": RANKS},
                "instances": 1,
                "solver": "greedy",
                "redundant_experts": 8,
                "schedule": "sequential",
                "dispatch": {"backend": "deepep", "mode": "auto", "replica": "local_first"},
                "max_running_requests_per_dp_rank": 64,
            },
            "explain": {"steps": [explained(rng, "decode"), explained(rng, "prefill")], "not_priced": {}},
            "run": {"seed": 0, "wall_s": 0.5, "cpu_s": 0.4, "steps": 40, "events": 90, "fidelity": "table"},
        },
        "series": {
            "layer_ids": list(range(3, 3 + LAYERS)),
            "rank_loads": loads.tolist(),
            "latency": curves,
            "steps": {
                "start_s": at.tolist(),
                "step_s": [0.01] * 40,
                "decode_seqs": (10 + 40 * at).tolist() if seed else [200.0] * 40,
                "prefill_tokens": [100.0] * 39 + [0.0],
            },
        },
    }


def result() -> dict[str, Any]:
    """What `tune --json` told."""
    best, base = plan_row("DP8 EP8 deepep, greedy +8"), plan_row("DP8 EP8 deepep, contiguous +0", 0.8)
    other = plan_row("TP8 allreduce, contiguous +0", 0.95, tied_with_best=True)
    gain = {"level": 0.9, "value": 0.25, "low": 0.19, "high": 0.31}
    return {
        "schema_version": 1,
        "best": best,
        "baseline": base,
        "gain": gain | {"metric": "output_tokens_per_s_per_gpu"},
        "latency_gain": gain | {"metric": "tpot_s.p50"},
        "placement_gain": {"tpot_s.p50": {"value": 0.043, "low": 0.021, "high": 0.062}},
        "verdict": {"code": "gain", "text": "Worth it. <greedy> & co. against the plain baseline: +25.0%."},
        "alternatives": [other],
        "pareto": [best],
        "trials": 4,
        "space": 30,
        "exhausted": False,
        "infeasible": {"out_of_memory": 7, "outside_profile": 1},
        "missed_slo": 1,
        "notes": ["trtllm: a note <b>of</b> the export"],
        "trial_list": [
            best,
            base,
            other,
            plan_row("TP2 DP4 EP8", status="outside_profile", meets_slo=False, metrics={}, intervals={}),
        ],
        "run": {"seed": 0, "wall_s": 4.25, "cpu_s": 4.0, "workers": 1, "resumed_trials": 0},
    }


def write_run_folder(folder: Path) -> Path:
    """Write the folder's files, as `moesim tune` lays them out."""
    (folder / "sglang").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result()))
    (folder / "simulation.json").write_text(json.dumps({"best": told(0, 0.05), "baseline": told(1, 0.6)}))
    scenario = small(objective={"slo": {"ttft_p99_ms": 2000, "tpot_p99_ms": 50}})
    (folder / "plan.yaml").write_text(yaml.safe_dump({"placement": "placement.json", "scenario": scenario}))
    (folder / "sglang" / "launch.txt").write_text("python -m sglang.launch_server \\\n  --tp-size 8\n")
    (folder / "timeline.json.gz").write_bytes(b"\x1f\x8b")
    return folder
