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


# Why so wide: 10 Mbit/s, the first Ethernet over wires, is 1.25e6 bytes/s; the links announced for 2027 (NVLink of
# 1.8 TB/s a direction, NICs of 1.6 Tbit/s) are 2e12 and less.
LINK = Range("bytes/s", 1e6, 1e14, (1e9, 5e12), RATES)
# One DDR3 channel reads 1e10; HBM4 of one package is announced with 2e13 and less.
MEMORY = Range("bytes/s", 1e8, 1e15, (1e11, 1e14), {"TB/s": 1e12, "GB/s": 1e9})
# A signal goes half around the earth in 0.1 s, in fibre; a process on a busy machine may wait for a while besides.
LATENCY = Range("s", 0, 0.5, (1e-7, 1e-3), TIMES)
# The smallest share of a small machine, and a rack taken for one device.
SIZE = Range("bytes", 1e8, 1e15, (4e9, 5e12), SIZES)
# A core of a small machine makes 1e9; one package announced for 2027 has 1e17.
PEAK = Range("FLOP/s", 1e7, 1e20, (1e13, 1e17), PEAKS)

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
