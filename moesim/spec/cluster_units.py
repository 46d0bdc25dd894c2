"""Figures of a cluster file that no hardware can have: most often the right number in another unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec

# Unit that may have been meant -> how many SI units it is.
RATES = {"GB/s": 1e9, "Gbit/s": 1e9 / 8, "TB/s": 1e12, "MB/s": 1e6}
TIMES = {"us": 1e-6, "ms": 1e-3, "ns": 1e-9}
SIZES = {"GB": 1e9, "MiB": 2**20, "TB": 1e12}
PEAKS = {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "PFLOP/s": 1e15}


@dataclass(frozen=True)
class Range:
    """Least and most of a figure in SI (`least` 0: none), what is usual, and the units it may have been given in."""

    unit: str
    least: float
    most: float
    usual: tuple[float, float]
    meant: dict[str, float]


# Why so wide. Most: over a hundred times the fastest preset (NVLink 9e11, HBM 8e12 bytes/s; 3e11 bytes; 1.5e16 FLOP/s),
# so that no generation in sight comes near. Least: far below the slowest machines that ranks are tried on.
LINK = Range("bytes/s", 1e6, 1e14, (1e9, 5e12), RATES)  # 10 Mbit/s, Ethernet of IEEE 802.3i, is 1.25e6
MEMORY = Range("bytes/s", 1e8, 1e15, (1e11, 1e14), {"TB/s": 1e12, "GB/s": 1e9})  # a channel of DDR3-1333 is 1.07e10
# Light in fibre, 2e8 m/s, is half around the earth (2e7 m) in 0.1 s; a process on a busy machine may wait besides.
LATENCY = Range("s", 0, 0.5, (1e-7, 1e-3), TIMES)
SIZE = Range("bytes", 1e8, 1e15, (4e9, 5e12), SIZES)  # a share of a small machine's memory has more
PEAK = Range("FLOP/s", 1e7, 1e20, (1e13, 1e17), PEAKS)  # one operation in a hundred cycles of a core of 1 GHz

LINKS = ("nvlink_bytes_per_s", "nic_bytes_per_s", "pcie_bytes_per_s", "socket_bytes_per_s")
LATENCIES = ("nvlink_latency_s", "nic_latency_s", "pcie_latency_s")


def check_units(cluster: ClusterSpec, *, where: str | Path) -> None:
    """Whether each figure of a cluster that a person wrote can be one; 0 stands where the spec lets it.

    Specs that code makes (a link of a test, a lab of slow links) are not held to this. Raises BadInput with the key,
    the range, and what may have been meant.
    """
    figures = [(name, getattr(cluster, name), LINK) for name in LINKS]
    figures += [(name, getattr(cluster, name), LATENCY) for name in LATENCIES]
    gpu = cluster.gpu
    figures += [("gpu.hbm_bytes", gpu.hbm_bytes, SIZE), ("gpu.hbm_bytes_per_s", gpu.hbm_bytes_per_s, MEMORY)]
    figures += [(f"gpu.flops_per_s.{dtype}", peak, PEAK) for dtype, peak in gpu.flops_per_s.items()]
    for key, value, range_ in figures:
        if value and not range_.least <= value <= range_.most:
            raise BadInput(
                f"{value:g} {range_.unit} is not possible ({_bounds(range_)})",
                where=f"{where}: {key}",
                mend=_guess(value, range_),
            )


def _bounds(range_: Range) -> str:
    return f"at most {range_.most:g}" if not range_.least else f"{range_.least:g} to {range_.most:g}"


def _guess(value: float, range_: Range) -> str:
    meant = [(name, value * factor) for name, factor in range_.meant.items()]
    found = [f"{value:g} {name} is {_yaml(si)}" for name, si in meant if range_.usual[0] <= si <= range_.usual[1]]
    return f"give {range_.unit}" + (f": {' and '.join(found[:2])}" if found else "")


def _yaml(value: float) -> str:
    """A number as YAML reads one: 5.0e+10, since it takes 5e10 for a word."""
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    mantissa = mantissa.rstrip("0")
    return f"{mantissa + '0' if mantissa.endswith('.') else mantissa}e{exponent}"
