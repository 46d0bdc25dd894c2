"""The serving loop as a single server, against queueing theory.

One rank that runs one request at a time, each of one prompt token and one output token, is a single-server queue in
order of arrival: a request's wait is the time from its arrival to the start of its only step.
"""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import arrivals
from moesim.engine.batcher import Limits
from moesim.engine.serving import Load, serve

ARRIVALS = 200_000


def queue(rate, services_s, seed):
    """Waits [requests] of the loop, and the arrival times that it was given."""
    n = len(services_s)
    arrival_s = arrivals.poisson(rate, n, np.random.default_rng([seed, 0]))
    ones = np.ones(n, dtype=np.int64)
    limits = Limits(max_tokens=1, max_running=1, kv_tokens=2, chunked=True, mixes=False)
    following = iter(services_s.tolist())
    served = serve(
        Load(ones, ones, arrival_s=arrival_s), limits, ranks=1, instances=1, step_time=lambda plan: next(following)
    )
    assert served.steps == n
    return served.finish_s - served.arrival_s - services_s, arrival_s


def lindley(arrival_s, services_s):
    """The exact waits of a single server: W[i + 1] = max(0, W[i] + S[i] - A[i + 1]) (D. V. Lindley, 1952)."""
    waits = np.zeros(len(arrival_s))
    gaps = np.diff(arrival_s)
    for request in range(len(gaps)):
        waits[request + 1] = max(0.0, waits[request] + services_s[request] - gaps[request])
    return waits


@pytest.mark.slow
def test_m_m_1():
    # One service a second: the mean wait in queue is rho / (1 - rho). Over 200,000 arrivals at half load the mean is
    # itself random, by 1.2 % (one standard deviation over seeds 0 to 11): 3 % says something and is rarely missed.
    rho, seed = 0.5, 0
    services_s = np.random.default_rng([seed, 1]).exponential(1.0, ARRIVALS)
    waits, arrival_s = queue(rho, services_s, seed)
    assert waits.mean() == pytest.approx(rho / (1 - rho), rel=0.03)
    # An arrival finds the server free with probability 1 - rho.
    assert (waits <= 1e-6).mean() == pytest.approx(1 - rho, rel=0.03)
    np.testing.assert_allclose(waits, lindley(arrival_s, services_s), atol=1e-6)


@pytest.mark.slow
def test_m_d_1():
    # Half of the M/M/1 wait (Pollaczek and Khinchine, without variance of service).
    rho, seed = 0.5, 0
    services_s = np.ones(ARRIVALS)
    waits, arrival_s = queue(rho, services_s, seed)
    assert waits.mean() == pytest.approx(rho / (1 - rho) / 2, rel=0.03)
    np.testing.assert_allclose(waits, lindley(arrival_s, services_s), atol=1e-6)
