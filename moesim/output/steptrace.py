"""The timeline of a simulation: its steps, requests and counters, and one typical decode step task by task."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.engine.critical import critical_path
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, typical_decode
from moesim.engine.stepmodel import ExactModel, Fidelity
from moesim.output.timeline import Counter, Slice, Span, write_timeline

Floats = NDArray[np.float64]

# Requests that get a track, the first to arrive; points of each counter: enough to look at, and a file that opens.
MOST_REQUESTS = 5000
MOST_POINTS = 20_000


def write_step_timeline(path: Path, simulation: Simulation) -> None:
    """Write a run as a Chrome trace, whole or not at all.

    Ranks are processes, streams their threads: one typical decode step, set at the time of the run's step that is most
    like it, with its critical path and the arrows of its dependencies. Steps of each instance, requests, and counters
    (batch, queue, KV cache) have processes of their own.
    """
    batch = typical_decode(simulation)
    fidelity: Fidelity = "des" if simulation.fidelity == "des" else "maxplus"  # with background, the run is of `des`
    graph, times = ExactModel(simulation.model, fidelity).run(batch, "decode", timeline=True)
    served = simulation.served
    write_timeline(
        path,
        graph,
        times,
        offset_s=like(served, float(batch.decode_seqs.sum())),
        critical=critical_path(graph, times),
        arrows=True,
        slices=chain(step_slices(served), pause_slices(simulation)),
        counters=run_counters(served),
        spans=request_spans(served),
    )


def like(served: Served, seqs: float) -> float:
    """When the run's decode step begins whose sequences are nearest to `seqs`; 0 where it has none."""
    decode = np.flatnonzero((served.step_prefill_tokens == 0) & (served.step_decode_seqs > 0))
    if not decode.size:
        return 0.0
    return float(served.step_start_s[decode[np.abs(served.step_decode_seqs[decode] - seqs).argmin()]])


def pause_slices(simulation: Simulation) -> Iterator[Slice]:
    """A slice for each time that an instance waits for experts to move."""
    for instance, start_s, seconds in simulation.pauses:
        yield "steps", f"instance {instance}", "re-layout", start_s, seconds


def step_slices(served: Served) -> Iterator[Slice]:
    """A slice for each step of each instance; steps under way at once get a track each."""
    steps = (served.step_start_s, served.step_s, served.step_prefill_tokens, served.step_decode_seqs)
    for instance in np.unique(served.step_instance).tolist():
        rows = zip(*(values[served.step_instance == instance].tolist() for values in steps), strict=True)
        free_s: list[float] = []
        for start_s, seconds, prompts, decoding in rows:
            name = "decode" if prompts == 0 else "prefill" if decoding == 0 else "prefill and decode"
            track = next((track for track, end_s in enumerate(free_s) if end_s <= start_s + 1e-9), len(free_s))
            free_s[track : track + 1] = [start_s + seconds]
            beside = f", batch {track + 1}" if track else ""
            yield "steps", f"instance {instance}{beside}", name, start_s, seconds


def run_counters(served: Served) -> Iterator[Counter]:
    """Batch of each instance's steps; requests that wait and that run, and their context in the KV cache."""
    for instance in np.unique(served.step_instance).tolist():
        chosen = np.flatnonzero(served.step_instance == instance)
        chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, MOST_POINTS).astype(np.int64))]
        for name, values in (
            ("decoding sequences", served.step_decode_seqs),
            ("prompt tokens", served.step_prefill_tokens),
        ):
            for time_s, value in zip(served.step_start_s[chosen].tolist(), values[chosen].tolist(), strict=True):
                yield "batch", f"instance {instance}: {name}", time_s, float(value)
    at = np.linspace(0.0, served.duration_s, min(MOST_POINTS, 4 * len(served.isl) + 1))
    for name, found in (
        ("waiting for their first token", waiting(served, at)),
        ("generating", running(served, at)),
        ("tokens in the KV cache, of those generating", held_tokens(served, at)),
    ):
        for time_s, value in zip(at.tolist(), found.tolist(), strict=True):
            yield "requests", name, time_s, value


def request_spans(served: Served) -> Iterator[Span]:
    """For each of the first requests its whole time, until its first token, and generating.

    What a fault took is named "lost", and drawn until its first token: when it was lost is not kept.
    """
    order = np.argsort(served.arrival_s, kind="stable")[:MOST_REQUESTS]
    process = "requests" if len(order) == len(served.isl) else f"first {len(order)} of {len(served.isl)} requests"
    for request in order.tolist():
        begin, first, end = (
            float(times[request]) for times in (served.arrival_s, served.first_token_s, served.finish_s)
        )
        if not np.isfinite(end):
            yield process, request, "lost", begin, first if np.isfinite(first) else begin
            continue
        yield process, request, f"request of {served.isl[request]} in, {served.osl[request]} out", begin, end
        yield process, request, "until its first token", begin, first
        yield process, request, "generating", first, end


def waiting(served: Served, at: Floats) -> Floats:
    """Requests that have arrived and have no token yet, at times [points]; those that never get one are left out."""
    told = np.isfinite(served.first_token_s)
    return _since(served.arrival_s[told], at) - _since(served.first_token_s[told], at)


def running(served: Served, at: Floats) -> Floats:
    """Requests with a first token and not the last, at times [points]; lost ones are left out."""
    done = np.isfinite(served.finish_s)
    return _since(served.first_token_s[done], at) - _since(served.finish_s[done], at)


def held_tokens(served: Served, at: Floats) -> Floats:
    """Context of the requests that generate, at times [points], each growing evenly from its prompt to its end."""
    done = np.isfinite(served.finish_s) & (served.finish_s > served.first_token_s)
    first, end = served.first_token_s[done], served.finish_s[done]
    isl, osl = served.isl[done].astype(np.float64), served.osl[done].astype(np.float64)
    # A sum of straight lines, each from first to end: its value and slope come and go with the requests.
    slope = (osl - 1) / (end - first)
    level = isl + 1 - slope * first
    return _summed(first, end, level, at) + _summed(first, end, slope, at) * at


def _since(times_s: Floats, at: Floats) -> Floats:
    """How many of the known times are not later than each point."""
    known = np.sort(times_s[np.isfinite(times_s)])
    return np.searchsorted(known, at, side="right").astype(np.float64)


def _summed(first: Floats, end: Floats, values: Floats, at: Floats) -> Floats:
    """Sum of the values whose span [first, end) holds each point."""

    def until(times_s: Floats) -> Floats:
        order = np.argsort(times_s, kind="stable")
        total = np.concatenate([[0.0], np.cumsum(values[order])])
        return np.asarray(total[np.searchsorted(times_s[order], at, side="right")])

    return until(first) - until(end)
