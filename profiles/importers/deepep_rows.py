"""Logs of DeepEP's tests become rows of the `exchange` family; a bandwidth becomes seconds by the test's own bytes.

Where a time and a bandwidth are printed, the bytes they make must be those of the setup: so a wrong option, or figures
in other units, are refused by line.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.units import GIGA, MICRO
from profiles.importers.deepep import Best, DeepEpLog, RankTime, Setup, read_deepep_log
from profiles.importers.deepep_bytes import MASKED, NORMAL_BYTES, fault_of, low_latency_bytes, visited
from profiles.importers.gathered import UNKNOWN
from profiles.importers.printed import rounding
from profiles.record import DEEPEP, LATENCY

PACKAGE = "deepseek-ai/DeepEP tests"
# The tests' random routing at 4,096 tokens and top-8 scatters the count of received tokens by 0.4 % (one standard
# deviation); nine such deviations, so that only a wrong setup or unit is refused.
DRAWN_SLACK = 0.035
LOW_LATENCY_SLACK = 0.005  # its bytes are exact but for the masked selections and the rounding
UNLIMITED_NODES = 4  # test_internode.py keeps min(nodes, 4) groups unless told: up to here that limits nothing
OPTION = {
    "tokens": "--tokens", "hidden": "--hidden", "top_k": "--top-k", "experts": "--experts", "ep": "--ep",
    "nodes": "--nodes", "topk_groups": "--topk-groups",
}  # fmt: skip


@dataclass(frozen=True)
class ExchangeRows:
    """Rows with their family, what was left out (reason -> lines), and by row what is worth telling."""

    rows: tuple[tuple[str, dict[str, Any]], ...]
    left_out: dict[str, int]
    measured: tuple[dict[str, Any], ...]


def read_exchanges(
    paths: Sequence[Path], setups: Sequence[Setup], *, system: str, device: str = UNKNOWN, version: str = UNKNOWN
) -> ExchangeRows:
    """The rows of all logs at these paths, as `exchanges_of`."""
    logs = [(str(path), read_deepep_log(path)) for path in paths]
    return exchanges_of(logs, setups, system=system, device=device, version=version)


def exchanges_of(
    logs: Sequence[tuple[str, DeepEpLog]], setups: Sequence[Setup], *, system: str, device: str, version: str
) -> ExchangeRows:
    """The rows of all logs, each with its path; setups: what the options say, one for each log.

    Raises BadInput with file and line.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    left_out: Counter[str] = Counter()
    measured: list[dict[str, Any]] = []
    for (path, log), given in zip(logs, setups, strict=True):
        left_out.update(log.left_out)
        for told, seconds, more in [*_normal(log, given, path), *_low_latency(log, given, path)]:
            provenance = {
                "system": system, "engine": DEEPEP, "version": version, "kernel": "deepep", "device": device,
                "package": PACKAGE, "package_version": version, "tag": "measured",
            }  # fmt: skip
            rows.append(("exchange", {**told, LATENCY: seconds, **provenance}))
            measured.append({"file": Path(path).name, **told, **more})
    return ExchangeRows(tuple(rows), dict(left_out), tuple(measured))


Row = tuple[dict[str, Any], float, dict[str, Any]]


def _normal(log: DeepEpLog, given: Setup, where: str) -> list[Row]:
    found = []
    for best in log.best:
        place = f"{where}:{best.line}"
        setup = _complete(log, given, where, place, internode=best.internode, normal=True)
        seconds, how = _seconds(best, setup, place)
        found.append((_key(best.step, "normal", setup, best.dtype, best.sms), seconds, {"seconds": how}))
    return found


def _seconds(best: Best, setup: Setup, place: str) -> tuple[float, str]:
    """Seconds of a best line and how they were found. Raises BadInput where its figures contradict the setup."""
    tokens, hidden, top_k, experts, ep, nodes = _all(setup)
    groups = setup.topk_groups or 0
    token_bytes = tokens * hidden * NORMAL_BYTES[best.dtype]
    nvl_bytes = token_bytes * visited(ep, experts, top_k, groups, nodes)
    by_nvl = nvl_bytes / (float(best.nvl) * GIGA)
    by_rdma = 0.0
    if best.internode:
        by_rdma = token_bytes * visited(nodes, experts, top_k, groups, nodes) / (float(best.rdma) * GIGA)
        _same(by_rdma, by_nvl, _blur(best.rdma) + _blur(best.nvl), "the RDMA rate", "the NVLink rate", place)
    if not best.transmit_us:
        return by_rdma or by_nvl, f"bytes of the test's routing over its {'RDMA' if best.internode else 'NVLink'} rate"
    transmit = float(best.transmit_us) * MICRO
    _same(transmit, by_rdma or by_nvl, _blur(best.transmit_us) + _blur(best.nvl), "the time", "the rate", place)
    notify = float(best.notify_us or 0.0) * MICRO
    return transmit + notify, "transmit plus notify" if best.notify_us else "printed"


def _same(one: float, other: float, blur: float, first: str, second: str, place: str) -> None:
    if abs(one - other) > (DRAWN_SLACK + blur) * max(one, other):
        raise BadInput(
            f"{first} makes {one * 1e6:.4g} us, but {second} {other * 1e6:.4g} us with the setup given", where=place,
            mend="correct --tokens, --hidden, --top-k, --topk-groups, --experts, --ep or --nodes",
        )  # fmt: skip


def _blur(text: str) -> float:
    """By what share a printed figure is rounded."""
    return rounding(text) / float(text)


def _low_latency(log: DeepEpLog, given: Setup, where: str) -> list[Row]:
    if not log.ranks:
        return []
    setup = _complete(log, given, where, f"{where}:{log.ranks[0].line}", internode=True, normal=False)
    ep = setup.ep or 0
    found = []
    for step in ("dispatch", "combine"):
        times = [time for time in log.ranks if time.step == step]
        for time in times:
            if time.rank >= ep:
                raise BadInput(f"rank {time.rank} of {ep}", where=f"{where}:{time.line}", mend="correct --ep")
        dtypes = {_dtype(time, setup, f"{where}:{time.line}"): time.line for time in times}
        if len(dtypes) > 1:
            raise BadInput(
                f"{step} in {' and in '.join(sorted(dtypes))}", where=f"{where}:{max(dtypes.values())}",
                mend="cut the log into one file for each run",
            )  # fmt: skip
        seconds = sorted(float(time.time_us) * MICRO for time in times)
        middle = statistics.median(seconds)
        heard = len({time.rank for time in times})
        more = {"ranks": f"{heard} of {ep}", "spread": round((seconds[-1] - seconds[0]) / middle, 4)}
        found.append((_key(step, "low_latency", setup, next(iter(dtypes)), 0), middle, more))
    return found


def _dtype(time: RankTime, setup: Setup, place: str) -> str:
    """The element type whose bytes are the printed time times the printed rate. Raises BadInput where none is."""
    tokens, hidden, top_k, *_ = _all(setup)
    bytes_sent = float(time.rate) * GIGA * float(time.time_us) * MICRO
    slack = LOW_LATENCY_SLACK + _blur(time.rate) + _blur(time.time_us)
    pairs = tokens * top_k
    for dtype in ("fp8", "bf16") if time.step == "dispatch" else ("bf16", "logfmt10"):
        pair = low_latency_bytes(dtype, hidden, time.step)
        if max(pairs - MASKED, 1) * pair * (1 - slack) <= bytes_sent <= pairs * pair * (1 + slack):
            return dtype
    raise BadInput(
        f"{time.rate} GB/s in {time.time_us} us are {bytes_sent / 1e6:.3f} MB, but {tokens} tokens x top-{top_k} x "
        f"hidden {hidden} are {pairs * low_latency_bytes('bf16', hidden, time.step) / 1e6:.3f} MB in bf16",
        where=place,
        mend="correct --tokens, --top-k or --hidden",
    )


def _complete(log: DeepEpLog, given: Setup, where: str, place: str, *, internode: bool, normal: bool) -> Setup:
    """The setup from the log and the options. Raises BadInput for what is missing, contradicts or cannot be."""
    known: dict[str, int] = {}
    for name, flag in OPTION.items():
        printed, option = getattr(log.printed, name), getattr(given, name)
        if printed is not None and option is not None and printed != option:
            raise BadInput(
                f"the log says {name} {printed}, not {option}", where=f"{where}:{log.config_line}",
                mend=f"leave {flag} out",
            )  # fmt: skip
        value = printed if printed is not None else option
        if value is not None:
            known[name] = value
    if not internode and known.setdefault("nodes", 1) != 1:
        raise BadInput(
            f"an intranode test on {known['nodes']} nodes", where=place, mend="give --nodes for logs of several nodes"
        )
    lacking = [option for name, option in OPTION.items() if name not in known and name != "topk_groups"]
    if normal and known.get("nodes", 1) > UNLIMITED_NODES and "topk_groups" not in known:
        lacking.append(OPTION["topk_groups"])
    if lacking:
        raise BadInput(
            "neither the log nor an option tells all of what was exchanged",
            where=place,
            mend=f"give {' '.join(lacking)}",
        )
    setup = dataclasses.replace(Setup(), **known)
    _, _, top_k, experts, ep, nodes = _all(setup)
    fault = fault_of(experts, top_k, ep, nodes, setup.topk_groups or 0)
    if fault:
        raise BadInput(fault, where=place, mend="correct --experts, --top-k, --topk-groups, --ep or --nodes")
    return setup


def _all(setup: Setup) -> tuple[int, int, int, int, int, int]:
    found = (setup.tokens, setup.hidden, setup.top_k, setup.experts, setup.ep, setup.nodes)
    return tuple(int(value or 0) for value in found)  # type: ignore[return-value]


def _key(step: str, mode: str, setup: Setup, dtype: str, sms: int) -> dict[str, Any]:
    tokens, hidden, top_k, experts, ep, nodes = _all(setup)
    return {
        "step": step, "mode": mode, "nodes": nodes, "ep": ep, "hidden": hidden, "top_k": top_k, "experts": experts,
        "dtype": dtype, "sms": sms, "tokens": float(tokens),
    }  # fmt: skip
