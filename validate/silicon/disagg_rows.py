"""What ran behind a disaggregated row: its columns beside the public launch files.

Two dumps hold these rows. One tells the workers of both pools and holds no run with speculative decoding: it has none
of the concurrencies that the launch files give to drafts alone. The other leaves workers, batch sizes and attention DP
out; its sizes are the GPUs of a worker of each pool (in older rows 1, not told, or the GPUs of both pools together),
and the prefill pool's EP stands for both. There the concurrency finds the launch: most have one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import Infeasible
from validate.silicon.disagg_launches import Launch, Workers, launches
from validate.silicon.rows import Layout, PoolRow, SiliconRow

_FAMILIES = {"DeepSeek": "deepseek", "Kimi": "kimi", "GLM": "glm", "gpt-oss": "gpt-oss", "Qwen3-235B": "qwen3"}


@dataclass(frozen=True)
class Ran:
    """A deployment as it ran. running: most requests of a decode rank, None where no file says; drafts: of MTP."""

    prefill: Workers
    decode: Workers
    running: int | None
    drafts: int

    @property
    def gpus(self) -> int:
        """GPUs of both pools."""
        return sum(pool.count * pool.layout.gpus for pool in (self.prefill, self.decode))


def family_of(row: SiliconRow) -> str:
    """The name that launch files of a row's model go by here; empty for others."""
    return next((name for part, name in _FAMILIES.items() if part in row.model), "")


def ran(row: SiliconRow) -> Ran:
    """What ran behind a row. Raises Infeasible with the reason why that is not known."""
    if row.prefill is None or row.decode is None:
        raise Infeasible("the row does not tell its two pools", reason="no_pools")
    known = _known(row)
    if row.prefill.workers and row.decode.workers:
        return _told(row.prefill, row.decode, known)
    fits = [one for one in known if _fits(row.prefill, one.prefill) and _fits(row.decode, one.decode)]
    if not fits:
        fits = [one for one in _of_lengths(row) if row.prefill.layout.gpus == row.decode.layout.gpus == _gpus(one)]
    found = sorted({Ran(one.prefill, one.decode, one.running, one.drafts) for one in fits}, key=repr)
    if not found:
        raise Infeasible("the row tells no workers, and no launch file this concurrency", reason="unknown_launch")
    if len({one.drafts > 0 for one in found}) > 1:
        raise Infeasible(
            "launch files run this layout and concurrency with speculative decoding and without",
            reason="drafts_not_told",
        )
    if len(found) > 1:
        raise Infeasible("several launch files fit the row, which tells no workers", reason="several_launches")
    return found[0]


def _of_lengths(row: SiliconRow) -> list[Launch]:
    """Launches of the row's model, system, engine, types and lengths; those of its version where there are any."""
    asked = (family_of(row), row.system, row.engine, row.precision, row.isl, row.osl)
    same = [one for one in launches() if asked == (one.family, one.system, one.engine, one.precision, one.isl, one.osl)]
    return [one for one in same if row.version.startswith(one.version)] or same


def _known(row: SiliconRow) -> list[Launch]:
    found = [one for one in _of_lengths(row) if row.concurrency in one.concurrency]
    if found:
        return found
    asked = (family_of(row), row.system, row.engine, row.precision, row.isl, row.osl, row.concurrency)
    return [
        one
        for one in launches()
        if asked[:-1] == (one.family, one.system, one.engine, one.precision, one.isl, one.osl)
        and asked[-1] in one.concurrency
    ]


def _gpus(launch: Launch) -> int:
    return sum(pool.count * pool.layout.gpus for pool in (launch.prefill, launch.decode))


def _fits(pool: PoolRow, workers: Workers) -> bool:
    """Whether a pool without its number of workers may be this one: by the GPUs of a worker, where they are told."""
    return pool.layout.gpus in (1, workers.layout.gpus)


def _told(prefill: PoolRow, decode: PoolRow, known: list[Launch]) -> Ran:
    """A row that tells its workers: the launch without drafts that has them, which knows EP and limits better."""
    for one in known:
        alike = [
            (pool.workers, pool.layout.gpus, pool.layout.attention_dp > 1)
            == (workers.count, workers.layout.gpus, workers.layout.attention_dp > 1)
            for pool, workers in ((prefill, one.prefill), (decode, one.decode))
        ]
        if all(alike) and one.drafts == 0:
            return Ran(one.prefill, one.decode, one.running, 0)
    reading, decoding = (Workers(pool.workers, _whole(pool.layout)) for pool in (prefill, decode))
    return Ran(reading, decoding, None, 0)


def _whole(layout: Layout) -> Layout:
    """A layout of the columns: attention DP with no expert size at all keeps experts cut over its ranks."""
    ranks = layout.tp * layout.attention_dp
    if layout.expert_tp * layout.ep == 1 and ranks > 1:
        return Layout(layout.tp, layout.pp, layout.attention_dp, ranks, 1)
    return layout
