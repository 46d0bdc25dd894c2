"""Published exchanges of DeepEP's first version against the formula, whose figures come from other tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.cost.links import exchange
from moesim.cost.ops import MoeExchange
from moesim.cost.overlap import DEEPEP_NORMAL_MULTIPROCESSORS
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from profiles.importers.published import context_of, read_published
from profiles.record import LATENCY

pytestmark = pytest.mark.data


def off(shared_data: Path, system: str, kernel: str) -> dict[tuple[str, str, int, int], float]:
    """ln(predicted / published) by mode, step, EP size and multiprocessors."""
    cluster = load_cluster(ClusterChoice(system=system, nodes=36))
    found = {}
    for _, row in read_published(shared_data / "published" / "comm_ep_kernels.csv", context_of(system, 256)).rows:
        if row["kernel"] != kernel:
            continue
        names = ("step", "mode", "hidden", "top_k", "experts", "ep", "nodes", "dtype")
        op = MoeExchange(tokens=np.array([row["tokens"]]), **{name: row[name] for name in names})
        told = exchange(cluster, op, row["sms"] or DEEPEP_NORMAL_MULTIPROCESSORS).seconds()[0]
        found[row["mode"], f"{row['step']} {row['dtype']}", row["ep"], row["sms"]] = float(np.log(told / row[LATENCY]))
    return found


def test_h800_inside_a_node_and_between(shared_data: Path) -> None:
    """DeepSeek's own: links that the fit never saw, NICs of another cluster, both modes, EP 8 to 128.

    The rows of EP 64 send to four of eight nodes at most, which the formula does not know: a third too long.
    """
    found = off(shared_data, "h800", "DeepEP v1 2025-06 (LL uses NVLink)")
    assert len(found) == 14
    for key, error in sorted(found.items()):
        print(f"{' '.join(map(str, key[:3]))}: {np.expm1(error):+.0%}")
    limited = [error for (mode, _, ep, _), error in found.items() if mode == "normal" and ep == 64]
    others = [error for (mode, _, ep, _), error in found.items() if mode != "normal" or ep != 64]
    assert np.abs(others).max() < 0.18 and np.median(np.abs(others)) < 0.08
    assert min(limited) > 0.0 and max(limited) < 0.35


@pytest.mark.parametrize(
    ("system", "kernel", "rows"), [("b200_sxm", "DeepEP", 24), ("gb200_nvl72", "DeepEP(v1 MNNVL)", 18)]
)
def test_blackwell_by_the_multiprocessors_that_ran(shared_data: Path, system: str, kernel: str, rows: int) -> None:
    """NVIDIA's runs of the same kernels with 16 to 48 multiprocessors, from another source than the fit's."""
    found = off(shared_data, system, kernel)
    errors = np.asarray(list(found.values()))
    size, wide = np.median(np.abs(errors)), np.quantile(np.abs(errors), 0.9)
    print(
        f"{system}: {len(errors)} rows, median {np.median(errors):+.2f}, of size {size:.2f}, nine of ten in {wide:.2f}"
    )
    assert len(errors) == rows
    assert size < 0.12 and wide < 0.33
