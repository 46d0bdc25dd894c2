"""One run of a serving benchmark's client: what was asked when, and how long first and last tokens took."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.arrivals import gamma
from moesim.engine.serving import Load
from moesim.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Fewer say nothing about what holds beyond them; more than this share failed, and the server was in trouble.
FEWEST_REQUESTS, MOST_FAILED = 16, 0.05
# Far above what any run holds: a larger figure is damage or another unit.
MOST_TOKENS, MOST_S, MOST_REQUESTS = 10_000_000, 1e5, 2_000_000
# Files tell their own means beside the single requests; rounding aside, both are the same.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class BenchRun:
    """A run, its requests in the order in which they were sent.

    isl, osl [requests] in tokens; ttft_s [requests]; decode_s [requests]: from the first token to the last. start_s
    [requests]: when each was sent, the first at 0; None where the file neither tells it nor lets it be worked out.
    sent: how requests were sent, in words. requests_per_s, burstiness: of a run without start_s, whose times have to be
    drawn. failed: left out. told: what the file says of engine, model and date. where: file and run, for errors.
    """

    format: str
    where: str
    isl: Ints
    osl: Ints
    ttft_s: Floats
    decode_s: Floats
    start_s: Floats | None
    sent: str
    requests_per_s: float = 0.0
    burstiness: float = 1.0
    failed: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """How many succeeded."""
        return len(self.isl)

    @property
    def paired(self) -> bool:
        """Whether a simulation of the run meets each request when the server met it."""
        return self.start_s is not None

    @property
    def tpot_s(self) -> Floats:
        """Seconds of a token but the first [requests]; NaN for outputs of one token."""
        later = np.maximum(self.osl - 1, 1)
        return np.where(self.osl > 1, self.decode_s / later, np.nan)

    @property
    def in_flight(self) -> int:
        """Requests that are under way at a time, on the mean; they share batches, and so their errors."""
        if self.start_s is None:
            return 1
        latency_s = self.ttft_s + self.decode_s
        span_s = float((self.start_s + latency_s).max())
        return max(1, round(float(latency_s.sum()) / span_s)) if span_s > 0 else self.requests

    def load(self, rng: np.random.Generator) -> Load:
        """The requests as the serving loop takes them; rng draws the times that the file does not tell."""
        if self.start_s is not None:
            return Load(self.isl, self.osl, arrival_s=self.start_s)
        # Clients stretch the times so that the last falls where the rate has it (vLLM's does; an open loop's mean).
        times_s = gamma(self.requests_per_s, self.burstiness, self.requests, rng)
        return Load(self.isl, self.osl, arrival_s=times_s * (self.requests / self.requests_per_s / times_s[-1]))


def closed_loop_starts(latency_s: Floats, concurrency: int) -> Floats:
    """When a client that keeps `concurrency` requests in flight sends each [requests], by how long each took.

    A request is sent when an earlier one ends; those that take no time (failed ones) make room at once.
    """
    start_s = np.zeros(len(latency_s))
    ends: list[float] = []
    for request, seconds in enumerate(latency_s.tolist()):
        if len(ends) >= concurrency:
            start_s[request] = heapq.heappop(ends)
        heapq.heappush(ends, start_s[request] + seconds)
    return start_s


def shown(value: Any) -> str:
    """A value of a file as an error shows it."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)[:40]


def checked(run: BenchRun) -> BenchRun:
    """The run in the order of its times, its first request at 0. Raises BadInput on what no client can have seen."""
    total = run.requests + run.failed
    if run.failed > MOST_FAILED * total:
        raise BadInput(
            f"{run.failed} of {total} requests failed", where=run.where, mend="calibrate on a run that the server bore"
        )
    if run.requests < FEWEST_REQUESTS:
        raise BadInput(
            f"{run.requests} requests are too few to calibrate on", where=run.where,
            mend=f"give a run of at least {FEWEST_REQUESTS}",
        )  # fmt: skip
    if (run.osl > 1).sum() < FEWEST_REQUESTS:
        raise BadInput("outputs of one token tell no TPOT", where=run.where, mend="give a run with longer outputs")
    if not (run.decode_s[run.osl > 1] > 0).any():
        raise BadInput(
            "first and last tokens came at once: the run was not streamed", where=run.where, mend="stream the responses"
        )
    if run.start_s is None:
        return run
    order = np.argsort(run.start_s, kind="stable")
    found = {name: getattr(run, name)[order] for name in ("isl", "osl", "ttft_s", "decode_s", "start_s")}
    span_s = float(found["start_s"][-1] - found["start_s"][0])
    if not span_s <= MOST_S:
        raise BadInput(f"requests were sent over {span_s:g} s", where=run.where, mend=f"at most {MOST_S:g} s")
    return replace(run, **(found | {"start_s": found["start_s"] - found["start_s"][0]}))
