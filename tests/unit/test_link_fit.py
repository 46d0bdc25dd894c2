"""What exchanges reach of links: planted figures are found again, and what ships prices the shipped profile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.cost.links import Transfer
from moesim.cost.reach import REL_SIGMA, link_reach
from profiles import link_fit
from profiles.link_fit import Figures, Rows, fitted, gather, left_out
from profiles.reach_rows import quantile
from profiles.store import DATA

SYSTEMS = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm")
PLANTED = Figures(9e-6, 0.6, 1.4e10)


def planted(noise: float, *, by_kernel: bool = True, figures: Figures = PLANTED, count: int = 2000) -> Rows:
    """Small and large transfers on four systems, bound by link, NIC or multiprocessors, in bins of 50."""
    rng = np.random.default_rng(0)
    near_s, far_s = (10.0 ** rng.uniform(-7.0, -3.0, count) for _ in range(2))
    sm_bytes = 10.0 ** rng.uniform(3.0, 7.5, count) if by_kernel else np.zeros(count)
    rows = Rows(
        Transfer("exchange normal", 0.0, near_s, far_s, sm_bytes),
        rng.uniform(2e-6, 8e-6, count),
        np.ones(count),
        np.arange(count) // 50,
        np.asarray(SYSTEMS)[np.arange(count) % 4],
    )
    return replace(rows, seconds=figures.seconds(rows) * np.exp(noise * rng.normal(size=count)))


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-3), (0.2, 0.05)])
def test_planted_figures_are_found_again(noise: float, within: float) -> None:
    found = fitted(planted(noise))
    assert (found.floor_s, found.near, found.sm_bytes_per_s) == pytest.approx((9e-6, 0.6, 1.4e10), rel=within)


def test_a_library_on_all_multiprocessors_has_no_figure_of_them() -> None:
    found = fitted(planted(0.0, by_kernel=False, figures=Figures(9e-6, 0.6, None)))
    assert found.sm_bytes_per_s is None
    assert (found.floor_s, found.near) == pytest.approx((9e-6, 0.6), rel=1e-3)


def test_a_share_that_is_given_stands() -> None:
    found = fitted(planted(0.1), near=0.6)
    assert found.near == 0.6
    assert (found.floor_s, found.sm_bytes_per_s) == pytest.approx((9e-6, 1.4e10), rel=0.05)


def test_sigma_is_that_of_architectures_left_out() -> None:
    rows = planted(0.0)
    slow = rows.system == "b200_sxm"
    rows = replace(rows, seconds=np.where(slow, 2.0, 1.0) * rows.seconds)
    off = left_out(rows, None)
    assert np.median(off[slow]) == pytest.approx(np.log(2.0), abs=0.02)
    assert quantile(off, rows, 0.9) == pytest.approx(np.log(2.0), abs=0.15)


def test_rows_of_one_architecture_make_nothing_sure() -> None:
    rows = planted(0.0)
    alike = replace(rows, system=np.where(np.arange(2000) % 2 == 0, "h100_sxm", "h200_sxm"))
    assert link_fit.least_sigma(rows) == 0.0
    assert link_fit.least_sigma(alike) == REL_SIGMA
    assert link_fit.least_sigma(rows.of(np.arange(2000) < 900)) == REL_SIGMA
    assert np.abs(left_out(alike, None)).max() < 1e-3  # by system


def test_what_ships_prices_the_shipped_profile() -> None:
    """The H200's rows lie where the figures of all GPUs say, within their sigma."""
    found = {rows.moved.kind: rows for rows in gather([DATA / "h200_sxm"])}
    assert len(found) == 7  # too few low-latency ones between nodes
    for kind, rows in found.items():
        own = link_reach(kind)
        off = np.log(rows.seconds / Figures(own.floor_s, own.near, own.sm_bytes_per_s).seconds(rows))
        wide = quantile(off, rows, 0.9)
        print(f"{kind}: {len(off)} rows, median {np.median(off):+.3f}, 90 % in {wide:.3f}, sigma {own.rel_sigma}")
        assert abs(np.median(off)) < own.rel_sigma
        assert wide < 2.5 * own.rel_sigma
