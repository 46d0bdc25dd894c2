"""The serving loop as one server and as several, against queueing theory.

One rank that runs one request at a time, each of one prompt token and one output token, is a single-server queue in
order of arrival: a request's wait is the time from its arrival to the start of its only step.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from moesim.engine import arrivals
from moesim.engine.batcher import Limits
from moesim.engine.serving import Load, serve

ARRIVALS, LOOPED = 200_000, 20_000


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
    return waits_by_recursion(arrival_s, services_s, 1)


def test_m_m_1():
    # The loop's waits are the recursion's, request by request; the recursion, which is cheaper, then shows the mean.
    # One service a second: the mean wait in queue is rho / (1 - rho). Over 200,000 arrivals at half load the mean is
    # itself random, by 1.2 % (one standard deviation over seeds 0 to 11): 3 % says something and is rarely missed.
    rho, seed = 0.5, 0
    services_s = np.random.default_rng([seed, 1]).exponential(1.0, ARRIVALS)
    waits, arrival_s = queue(rho, services_s[:LOOPED], seed)
    np.testing.assert_allclose(waits, lindley(arrival_s, services_s[:LOOPED]), atol=1e-6)
    many = lindley(arrivals.poisson(rho, ARRIVALS, np.random.default_rng([seed, 0])), services_s)
    assert many.mean() == pytest.approx(rho / (1 - rho), rel=0.03)
    # An arrival finds the server free with probability 1 - rho.
    assert (many <= 1e-6).mean() == pytest.approx(1 - rho, rel=0.03)


def test_m_d_1():
    # Half of the M/M/1 wait (Pollaczek and Khinchine, without variance of service).
    rho, seed = 0.5, 0
    services_s = np.ones(LOOPED)
    waits, arrival_s = queue(rho, services_s, seed)
    np.testing.assert_allclose(waits, lindley(arrival_s, services_s), atol=1e-6)
    many = lindley(arrivals.poisson(rho, ARRIVALS, np.random.default_rng([seed, 0])), np.ones(ARRIVALS))
    assert many.mean() == pytest.approx(rho / (1 - rho) / 2, rel=0.03)


def many_servers(arrival_s, concurrency, services_s, servers):
    """The loop as `servers` instances that serve one request at a time from one queue at the router."""
    ones = np.ones(len(services_s), dtype=np.int64)
    limits = Limits(max_tokens=1, max_running=1, kv_tokens=2, chunked=True, mixes=False)
    following = iter(services_s.tolist())
    return serve(
        Load(ones, ones, arrival_s=arrival_s, concurrency=concurrency),
        limits,
        ranks=1,
        instances=servers,
        step_time=lambda plan: next(following),
        balance="central_queue",
    )


def waits_by_recursion(arrival_s, services_s, servers):
    """The exact waits of several servers in order of arrival (J. Kiefer and J. Wolfowitz, 1955)."""
    free_s = [0.0] * servers
    waits = np.zeros(len(arrival_s))
    for request, (arrived, service) in enumerate(zip(arrival_s.tolist(), services_s.tolist(), strict=True)):
        start = max(arrived, heapq.heappop(free_s))
        waits[request] = start - arrived
        heapq.heappush(free_s, start + service)
    return waits


def erlang_c(servers, offered):
    """Chance that an arrival waits: A. K. Erlang, 1917; offered: mean service times that come in one."""
    terms = [offered**n / math.factorial(n) for n in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


def drawn(servers, offered, count, seed):
    services_s = np.random.default_rng([seed, 1]).exponential(1.0, count)
    return arrivals.poisson(offered, count, np.random.default_rng([seed, 0])), services_s


@pytest.mark.parametrize("servers", [2, 4])
def test_m_m_c(servers):
    # The loop's waits are the recursion's, request by request; the recursion, which is cheaper, then shows the mean: of
    # 100,000 arrivals it is itself random by 3 % (one standard deviation over seeds), of twenty times as many by 0.7 %.
    offered = 0.6 * servers
    arrival_s, services_s = drawn(servers, offered, 20_000, 0)
    served = many_servers(arrival_s, None, services_s, servers)
    waits = served.first_token_s - served.arrival_s - services_s
    np.testing.assert_allclose(waits, waits_by_recursion(arrival_s, services_s, servers), atol=1e-6)
    many = np.stack([waits_by_recursion(*drawn(servers, offered, 100_000, seed), servers) for seed in range(20)])
    busy = erlang_c(servers, offered)
    assert many.mean() == pytest.approx(busy / (servers - offered), rel=0.03)
    assert (many > 1e-6).mean() == pytest.approx(busy, rel=0.03)


def test_closed_loop():
    # Nine requests go round through four servers without a pause: all four are always busy, so that requests leave at
    # four times the rate of one server, and by Little's law each takes 9 / 4 of a mean service.
    services_s = np.random.default_rng(0).exponential(1.0, 40_000)
    served = many_servers(None, 9, services_s, 4)
    assert served.duration_s == pytest.approx(services_s.sum() / 4, rel=1e-3)
    inside_s = (served.finish_s - served.arrival_s)[100:-100]
    assert inside_s.mean() == pytest.approx(9 / 4, rel=0.03)
