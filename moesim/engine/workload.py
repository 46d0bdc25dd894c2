"""The requests of a scenario: their lengths, their times, what their prompts share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.engine.arrivals import gamma, poisson
from moesim.engine.request_traces import RequestTrace, read_request_trace
from moesim.engine.serving import Load, PromptBlocks
from moesim.errors import BadInput
from moesim.spec.workload import ArrivalsSpec, WorkloadSpec


@dataclass(frozen=True)
class Lengths:
    """Tokens of a workload's requests: means, the longest prompt, the longest prompt with its output."""

    mean_isl: float
    mean_osl: float
    longest_isl: int
    longest_context: int


def lengths(workload: WorkloadSpec) -> Lengths:
    """Lengths of a workload. Raises BadInput for a trace file that cannot be read."""
    if workload.file is None:
        isl, osl = workload.isl or 1, workload.osl or 1
        mean_isl, mean_osl = ((least(length, workload.range_ratio) + length) / 2 for length in (isl, osl))
        return Lengths(mean_isl, mean_osl, isl, isl + osl)
    trace = _trace(workload)
    return Lengths(
        float(trace.isl.mean()), float(trace.osl.mean()), int(trace.isl.max()), int((trace.isl + trace.osl).max())
    )


def least(length: int, range_ratio: float) -> int:
    """The shortest length that is drawn: as clients with `--random-range-ratio` round it (InferenceMAX), at least 1."""
    return max(1, int(length * range_ratio))


def make_load(workload: WorkloadSpec, seed: int, *, prefix_cache: bool = False) -> Load:
    """The requests: the same for every plan and draw. Raises BadInput for a trace file that cannot be read."""
    if workload.file is None:
        assert workload.isl and workload.osl and workload.requests and workload.arrivals
        rng = np.random.default_rng([seed, 11])
        isl, osl = (
            rng.integers(least(length, workload.range_ratio), length + 1, size=workload.requests)
            for length in (workload.isl, workload.osl)
        )
        return _timed(isl, osl, workload.arrivals, seed, None)
    trace = _trace(workload)
    blocks = trace.blocks if prefix_cache else None
    if prefix_cache and blocks is None:
        raise BadInput(
            f"{workload.file} has no block hashes, so that nothing is known to be shared",
            where="serving.batching.prefix_cache",
            mend="use a trace of Mooncake's layout, or leave prefix_cache out",
        )
    if workload.arrivals is not None:
        return _timed(trace.isl, trace.osl, workload.arrivals, seed, blocks)
    return Load(trace.isl, trace.osl, arrival_s=trace.arrival_s / (workload.speed or 1.0), blocks=blocks)


def _trace(workload: WorkloadSpec) -> RequestTrace:
    """The workload's part of its trace file."""
    assert workload.file is not None
    trace = read_request_trace(workload.file)
    count = workload.requests or len(trace.isl)
    if count > len(trace.isl):
        raise BadInput(
            f"{workload.file} has {len(trace.isl)} requests, not {count}",
            where="serving.workload.requests",
            mend="ask for fewer, or leave it out for all",
        )
    blocks = trace.blocks
    if blocks is not None:
        offsets = blocks.offsets[: count + 1]
        blocks = PromptBlocks(blocks.tokens, offsets, blocks.hashes[: offsets[-1]])
    return RequestTrace(
        trace.arrival_s[:count], trace.isl[:count], trace.osl[:count], blocks, trace.layout, trace.failed
    )


def _timed(isl: np.ndarray, osl: np.ndarray, arrivals: ArrivalsSpec, seed: int, blocks: PromptBlocks | None) -> Load:
    rng = np.random.default_rng([seed, 6])
    if arrivals.poisson is not None:
        return Load(isl, osl, arrival_s=poisson(arrivals.poisson.requests_per_s, len(isl), rng), blocks=blocks)
    if arrivals.gamma is not None:
        times_s = gamma(arrivals.gamma.requests_per_s, arrivals.gamma.burstiness, len(isl), rng)
        return Load(isl, osl, arrival_s=times_s, blocks=blocks)
    return Load(isl, osl, concurrency=arrivals.concurrency, blocks=blocks)


def failed_requests(workload: WorkloadSpec) -> int:
    """Requests of a whole trace file that failed where it was recorded, and are left out; 0 without a file."""
    return 0 if workload.file is None else _trace(workload).failed
