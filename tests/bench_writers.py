"""Results of serving benchmarks as their clients write them, from a simulated run with noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.serving import Served

Floats = NDArray[np.float64]
EPOCH_NS = 1_759_813_207_532_900_363


@dataclass(frozen=True)
class Client:
    """What a client saw, in seconds, by request in the order of sending; itls: gaps of each request."""

    isl: list[int]
    osl: list[int]
    start_s: Floats
    ttft_s: Floats
    itls: list[list[float]]

    @property
    def latency_s(self) -> Floats:
        """From sending to the last token."""
        return np.asarray(self.ttft_s + np.asarray([sum(gaps) for gaps in self.itls]))


def client_of(served: Served, rng: np.random.Generator, noise: float = 0.01, end_s: float = 0.5e-3) -> Client:
    """A client's view of a run: first tokens with a relative scatter of `noise` in TTFT, last ones `end_s` off.

    A client of a closed loop sends when it sees an end, so that ends have no scatter there: end_s 0.
    """
    count = len(served.isl)
    true_s = served.first_token_s - served.arrival_s
    ttft_s = true_s * np.exp(noise * rng.standard_normal(count))
    later = served.osl > 1
    whole_s = served.finish_s - served.arrival_s + np.where(later, end_s * rng.standard_normal(count), 0.0)
    ttft_s = np.where(later, np.minimum(ttft_s, 0.5 * (true_s + whole_s)), whole_s)
    decode_s = np.where(later, whole_s - ttft_s, 0.0)
    itls = []
    for seconds, tokens in zip(decode_s, served.osl, strict=True):
        parts = rng.gamma(20.0, size=int(tokens) - 1)
        itls.append((seconds * parts / parts.sum()).tolist() if tokens > 1 else [])
    return Client(served.isl.tolist(), served.osl.tolist(), served.arrival_s, ttft_s, itls)


def vllm(client: Client, *, concurrency: int | None, rate: float | None = None, **more: Any) -> dict[str, Any]:
    """`vllm bench serve --save-result --save-detailed`."""
    return {
        "date": "20261120-101500", "endpoint_type": "openai", "backend": "openai", "label": "openai",
        "model_id": "allenai/OLMoE-1B-7B-0924", "tokenizer_id": "allenai/OLMoE-1B-7B-0924",
        "num_prompts": len(client.isl), "request_rate": "inf" if rate is None else rate, "burstiness": 1.0,
        "max_concurrency": concurrency, "duration": float((client.start_s + client.latency_s).max()),
        "completed": len(client.isl), "failed": 0, "total_input_tokens": sum(client.isl),
        "total_output_tokens": sum(client.osl), "request_throughput": 1.0, "request_goodput": None,
        "input_lens": client.isl, "output_lens": client.osl, "ttfts": client.ttft_s.tolist(), "itls": client.itls,
        "start_times": (client.start_s + 5321.25).tolist(), "generated_texts": ["x"] * len(client.isl),
        "errors": [""] * len(client.isl), "mean_ttft_ms": float(client.ttft_s.mean() * 1e3), **more,
    }  # fmt: skip


def sglang(client: Client, *, concurrency: int | None, rate: float = float("inf"), **more: Any) -> dict[str, Any]:
    """`sglang.bench_serving --output-file --output-details`, one line of it; it tells no times of sending."""
    return {
        "tag": None, "backend": "sglang", "dataset_name": "random", "request_rate": rate,
        "max_concurrency": concurrency, "sharegpt_output_len": None, "random_input_len": 1024,
        "random_output_len": 64, "random_range_ratio": 0.5,
        "server_info": {"model_path": "allenai/OLMoE-1B-7B-0924", "version": "0.5.14"},
        "duration": float((client.start_s + client.latency_s).max()), "completed": len(client.isl),
        "total_input_tokens": sum(client.isl), "total_output_tokens": sum(client.osl),
        "total_output_tokens_retokenized": sum(client.osl), "mean_ttft_ms": float(client.ttft_s.mean() * 1e3),
        "concurrency": 7.5, "accept_length": None, "input_lens": client.isl, "output_lens": client.osl,
        "ttfts": client.ttft_s.tolist(), "itls": client.itls, "generated_texts": ["x"] * len(client.isl),
        "errors": [""] * len(client.isl), **more,
    }  # fmt: skip


def aiperf(client: Client) -> list[dict[str, Any]]:
    """AIPerf's profile_export.jsonl, one record for each request, in the order in which they ended."""
    found = []
    for at in np.argsort(client.start_s + client.latency_s):
        start_ns = EPOCH_NS + round(float(client.start_s[at]) * 1e9)
        latency_s, osl = float(client.latency_s[at]), client.osl[at]
        ttft_s = float(client.ttft_s[at])
        metrics: dict[str, Any] = {
            "input_sequence_length": {"value": client.isl[at], "unit": "tokens"},
            "time_to_first_token": {"value": ttft_s * 1e3, "unit": "ms"},
            "request_latency": {"value": latency_s * 1e3, "unit": "ms"},
            "output_sequence_length": {"value": osl, "unit": "tokens"},
            "inter_chunk_latency": {"value": [gap * 1e3 for gap in client.itls[at]], "unit": "ms"},
        }
        if osl > 1:
            metrics["inter_token_latency"] = {"value": (latency_s - ttft_s) / (osl - 1) * 1e3, "unit": "ms"}
        found.append({
            "metadata": {
                "session_num": int(at), "x_request_id": f"r{at}", "conversation_id": f"c{at}", "turn_index": 0,
                "request_start_ns": start_ns, "request_ack_ns": start_ns + 1000,
                "request_end_ns": start_ns + round(latency_s * 1e9), "worker_id": "worker_1",
                "record_processor_id": "record_processor_1", "benchmark_phase": "profiling", "was_cancelled": False,
                "cancellation_time_ns": None,
            },
            "metrics": metrics, "error": None,
        })  # fmt: skip
    return found


def write(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> Path:
    """Write one object, or one on each line."""
    lines = content if isinstance(content, list) else [content]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path
