"""`validate capacity`: dropped tokens, simulated and executed by a real layer on real ranks, held against each other.

Every rank has tokens of its own, chooses their experts with a real gate, applies the capacity in torch (see
capacity_layer), and runs its experts on what really arrives. Which expert worked on which token is then read from the
outputs, not from any plan, and compared with what the simulator says for the same ids, weights, scores and random
numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files import write_json
from moesim.routing.capacity.on_counts import cap_counts
from moesim.routing.capacity.on_ids import Chance, keep_within
from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.routed import Routed
from profiles.collectives import check_parts, joined, ready
from profiles.launch import LocalRank, launch, serve
from validate.capacity import layer as executed
from validate.capacity.layer import Policy
from validate.hardware.group import Beat, Group
from validate.hardware.job import LayerShape
from validate.hardware.layer import (
    RankLayer,
    Routes,
    draw_router,
    draw_tokens,
    expert_weights,
    gate,
    replica_routes,
    swiglu,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WHERE = "validate capacity"
RECORD_FILE = "record.json"
RULES = ("gshard", "switch", "deepspeed", "megatron", "survey")
KEEPS = ("choice", "token", "probability", "random")
BACKUPS = ("none", "random", "next_best")
FACTORS, TOP_KS = (0.5, 0.8, 1.0, 1.25), (1, 2, 4)
QUICK_FACTORS, QUICK_TOP_KS = (0.75,), (2,)
# Tokens of a rank differ, so that capacities do; more columns than experts, so that outputs tell who worked on them.
TOKENS, LESS = 48, 11
SHAPE = {"hidden": 32, "intermediate": 16, "experts": 12}
LEAST, MOST = 4, 5  # DeepSpeed's min_capacity, and a cap for the survey rule that binds in some cases
# Weights found in outputs of float64 are right to about 1e-12; a pick's own weight is far above this.
TELLING = 1e-7


@dataclass(frozen=True)
class Case:
    """One policy under one placement. table: the expert of each slot, slots contiguous by rank."""

    policy: Policy
    top_k: int
    placement: str
    table: tuple[int, ...]
    replica: str

    @property
    def name(self) -> str:
        """For a person."""
        one = self.policy
        pad = ", padded" if one.pad else ""
        backup = "" if one.backup == "none" else f", backup {one.backup}"
        return f"{one.rule} {one.factor:g}, top-{self.top_k}, keep by {one.keep}{backup}{pad}; {self.placement}"


@dataclass(frozen=True)
class CapacityJob:
    """What to run. tokens: of each rank."""

    cases: tuple[Case, ...]
    tokens: tuple[int, ...]
    seed: int
    out: str
    stall_s: float = 60.0
    backend: str = "gloo"

    @classmethod
    def read(cls, text: str) -> CapacityJob:
        """The job that `asdict` gave."""
        given = json.loads(text)
        cases = tuple(
            Case(Policy(**one.pop("policy")), table=tuple(one.pop("table")), **one) for one in given.pop("cases")
        )
        return cls(cases=cases, tokens=tuple(given.pop("tokens")), **given)


def every_case(ranks: int, *, quick: bool, seed: int) -> tuple[Case, ...]:
    """Every rule with every way to keep, backup and padding, over factors and top-k, placements in turn."""
    experts = SHAPE["experts"]
    rng = np.random.default_rng([seed, 51])
    more = -(-(experts + 2) // ranks) * ranks - experts
    spare = np.concatenate([np.arange(experts), rng.integers(experts, size=more)])
    placements = [
        ("contiguous", tuple(range(experts)), "local_first"),
        ("replicas, local first", tuple(rng.permutation(spare).tolist()), "local_first"),
        ("replicas, equal", tuple(rng.permutation(spare).tolist()), "equal"),
    ]
    factors, top_ks = (QUICK_FACTORS, QUICK_TOP_KS) if quick else (FACTORS, TOP_KS)
    asked = itertools.product(factors, top_ks, RULES, KEEPS, BACKUPS, (False, True))
    return tuple(
        Case(Policy(rule, factor, keep, backup, pad, LEAST, MOST), top_k, *placements[at % len(placements)])
        for at, (factor, top_k, rule, keep, backup, pad) in enumerate(asked)
    )


def run(job: CapacityJob, say: Callable[[str], None]) -> dict[str, Any]:
    """Run on local ranks, one for each entry of `tokens`; returns the record, which is also written."""
    check_parts(job.backend, len(job.tokens))
    record = Path(job.out) / RECORD_FILE
    record.unlink(missing_ok=True)
    launch("validate.capacity.run", asdict(job), len(job.tokens), stall_s=job.stall_s, say=say, where=WHERE)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def session(job: CapacityJob, group: Group, say: Callable[[str], None]) -> dict[str, Any] | None:
    """All cases on one rank; rank 0 compares, writes the record and returns it."""
    torch = group.torch
    experts, most = SHAPE["experts"], max(job.tokens)
    mine = job.tokens[group.rank]
    shape = LayerShape(**SHAPE, top_k=max(case.top_k for case in job.cases))
    rng = np.random.default_rng([job.seed, 1])
    basis = draw_router(shape, rng)
    shares = rng.lognormal(sigma=1.0, size=experts)
    x = torch.from_numpy(
        draw_tokens(mine, basis, shares / shares.sum(), np.random.default_rng([job.seed, 2, group.rank]))
    ).double()
    router = torch.from_numpy(basis).float()
    weights = [expert_weights(shape, one, seed=job.seed, device="cpu", dtype=torch.float64) for one in range(experts)]
    contributions = torch.stack([swiglu(x, one) for one in weights], dim=1)
    # Weights are shares of all experts, as these frameworks have them: over a single choice they would all be alike.
    scores = torch.softmax(x.float() @ router, dim=-1)
    answers = []
    for number, case in enumerate(job.cases):
        if number % 50 == 0 and group.rank == 0:
            say(f"running case {number + 1} of {len(job.cases)}")
        ids, _ = gate(x, router, case.top_k)
        share = scores.gather(1, ids)
        turn, second = (torch.from_numpy(part) for part in _chance(job, number, case.top_k, group.rank))
        placed = executed.place(case.policy, ids, share, scores, turn, second)
        layer = _layer(case, shape, router, weights, group)
        y, rows = executed.forward(x, share.double(), placed, layer, group, pad=case.policy.pad)
        found = executed.worked_on(y, contributions).numpy()
        answers.append((found, ids.numpy(), share.double().numpy(), rows))
    gathered = _gather(job, group, answers, scores.double().numpy(), most)
    if group.rank != 0:
        return None
    record = compare(job, *gathered)
    write_json(Path(job.out) / RECORD_FILE, record, indent=1)
    return record


def _chance(job: CapacityJob, number: int, top_k: int, rank: int | None = None) -> tuple[Ints, Ints]:
    """The random numbers of a case, of all tokens or of one rank's."""
    drawn = Chance.draw((sum(job.tokens), top_k), SHAPE["experts"], np.random.default_rng([job.seed, 3, number]))
    if rank is None:
        return drawn.turn, drawn.second
    first = sum(job.tokens[:rank])
    own = slice(first, first + job.tokens[rank])
    return drawn.turn[own], drawn.second[own]


def _layer(case: Case, shape: LayerShape, router: Any, weights: Sequence[Any], group: Group) -> RankLayer:
    torch = group.torch
    table = np.asarray(case.table, dtype=np.int64)
    slots, count = replica_routes(
        table, experts=shape.experts, ranks=group.ranks, rank=group.rank, replica=case.replica  # type: ignore[arg-type]
    )  # fmt: skip
    local = table.reshape(group.ranks, -1)[group.rank]
    routes = Routes(torch.from_numpy(slots), torch.from_numpy(count), len(table))
    return RankLayer(shape, router, routes, tuple(weights[expert] for expert in local.tolist()), None)


def _gather(
    job: CapacityJob, group: Group, answers: Sequence[Any], scores: Floats, most: int
) -> tuple[list[list[Any]], list[Floats]]:
    """On every rank: by case and rank what was found, ids, weights and rows of local slots; and every rank's scores."""
    experts, deepest = SHAPE["experts"], max(case.top_k for case in job.cases)
    width = max(len(case.table) for case in job.cases) // group.ranks
    block = np.zeros((len(job.cases), most, experts + 2 * deepest))
    rows = np.zeros((len(job.cases), width))
    for at, (found, ids, share, arrived) in enumerate(answers):
        top_k = ids.shape[1]
        block[at, : len(ids), :experts] = found
        block[at, : len(ids), experts : experts + top_k] = ids
        block[at, : len(ids), experts + deepest : experts + deepest + top_k] = share
        rows[at, : len(arrived)] = arrived
    every, every_rows = group.gather(block), group.gather(rows)
    padded = np.zeros((most, experts))
    padded[: len(scores)] = scores
    every_score = group.gather(padded)
    told = []
    for at, case in enumerate(job.cases):
        local = len(case.table) // group.ranks
        told.append([
            (
                every[rank, at, :count, :experts],
                every[rank, at, :count, experts : experts + case.top_k].astype(np.int64),
                every[rank, at, :count, experts + deepest : experts + deepest + case.top_k],
                every_rows[rank, at, :local],
            )
            for rank, count in enumerate(job.tokens)
        ])  # fmt: skip
    return told, [every_score[rank, :count] for rank, count in enumerate(job.tokens)]


def simulated_rule(policy: Policy) -> CapacityRule:
    """The simulator's rule for a policy."""
    by_position = policy.keep in ("choice", "token")
    return CapacityRule(
        rule=policy.rule,
        factor=policy.factor,
        drop="position" if by_position else policy.keep,
        by_choice=policy.keep == "choice",
        backup=None if policy.backup == "none" else policy.backup,
        pad=policy.pad,
        min_capacity=policy.least,
        max_capacity=policy.most,
    )


def compare(job: CapacityJob, told: Sequence[Sequence[Any]], scores: Sequence[Floats]) -> dict[str, Any]:
    """Simulate every case for what the ranks say they routed, and hold it against what their outputs show."""
    from validate.capacity.record import record_of

    home = np.repeat(np.arange(len(job.tokens)), job.tokens)
    outcomes = []
    for number, (case, ranks) in enumerate(zip(job.cases, told, strict=True)):
        found, ids, share = (np.concatenate([one[part] for one in ranks]) for part in range(3))
        experts = SHAPE["experts"]
        kept = keep_within(
            Routed(ids, share, experts), simulated_rule(case.policy), Chance(*_chance(job, number, case.top_k)),
            top_k=case.top_k, source=home, scores=np.concatenate(scores),
        )  # fmt: skip
        wanted = np.zeros_like(found)
        token, slot = np.nonzero(kept.routed.ids >= 0)
        wanted[token, kept.routed.ids[token, slot]] = kept.routed.weights[token, slot]
        worked = np.abs(found) > TELLING
        asked = np.zeros(found.shape, dtype=bool)
        np.put_along_axis(asked, ids, True, axis=1)
        arrived = np.concatenate([one[3] for one in ranks])
        rows = np.bincount(case.table, arrived, minlength=experts).astype(np.float64)
        told_rows = kept.routed.counts() + kept.padded
        outcomes.append({
            "name": case.name,
            "picks": int(ids.size),
            "dropped": {"simulated": int(kept.dropped.sum()), "executed": int(ids.size - worked.sum())},
            "moved": {"simulated": int(kept.rerouted.sum()), "executed": int((worked & ~asked).sum())},
            "tokens_without_expert": {
                "simulated": int((kept.routed.ids < 0).all(axis=1).sum()), "executed": int((~worked).all(axis=1).sum()),
            },
            "rows": {"simulated": int(told_rows.sum()), "executed": int(rows.sum())},
            "places_in_floats_differ": _floats_differ(job, case),
            "largest_weight_error": float(np.abs(found - wanted).max()),
            "differences": _differences(worked, wanted > 0, home, told_rows, rows),
            "counts": _counts(case, ids, home, worked, asked, rows, job),
        })  # fmt: skip
    return record_of(job, outcomes)


def _differences(worked: Any, wanted: Any, home: Ints, told_rows: Floats, rows: Floats) -> list[str]:
    """Each token and expert, and each expert's rows, on which both sides disagree."""
    found = []
    for token, expert in np.argwhere(worked != wanted).tolist():
        own = token - int(np.argmax(home == home[token]))
        said = "worked on it, the simulator says not" if worked[token, expert] else "did not, the simulator says so"
        found.append(f"rank {home[token]}, token {own}: expert {expert} {said}")
    return found + [
        f"expert {expert} computed {rows[expert]:g} rows, the simulator says {told_rows[expert]:g}"
        for expert in np.flatnonzero(rows != told_rows).tolist()
    ]


def _floats_differ(job: CapacityJob, case: Case) -> bool:
    """Whether an engine's doubles would give some rank another capacity than decimals do."""
    return any(
        executed.capacity_of(case.policy, tokens, SHAPE["experts"], case.top_k)
        != executed.capacity_in_floats(case.policy, tokens, SHAPE["experts"], case.top_k)
        for tokens in job.tokens
    )


def _counts(
    case: Case, ids: Ints, home: Ints, worked: Any, asked: Any, rows: Floats, job: CapacityJob
) -> dict[str, Any]:
    """What the counts of each rank alone tell: exact by expert where they claim it, conserving where they assume."""
    exact, holds = True, True
    told_rows = np.zeros(SHAPE["experts"])
    for rank, tokens in enumerate(job.tokens):
        counts = np.bincount(ids[home == rank].ravel(), minlength=SHAPE["experts"]).astype(np.float64)
        flow = cap_counts(
            counts[None, None], np.asarray([[float(tokens)]]), simulated_rule(case.policy), top_k=case.top_k
        )
        told_rows += flow.rows[0, 0]
        holds &= bool(np.isclose((flow.processed + flow.dropped).sum(), counts.sum()))
        if flow.tag != "formula":
            exact = False
            continue
        lost = (asked & ~worked)[home == rank].sum(axis=0)
        holds &= bool(np.array_equal(flow.dropped[0, 0], lost))
    if exact:
        holds &= bool(np.array_equal(told_rows, rows))
    both = np.bincount(ids.ravel(), minlength=SHAPE["experts"]).astype(np.float64)
    flow = cap_counts(
        both[None, None], np.asarray([job.tokens], dtype=float), simulated_rule(case.policy), top_k=case.top_k
    )
    return {"claimed_exact": exact, "holds": holds, "dropped_of_all_ranks": float(flow.dropped.sum())}


def main(arguments: Sequence[str]) -> int:
    """One local rank, as `launch` runs it."""

    def work(one: LocalRank) -> str:
        job = CapacityJob.read(one.job)
        torch = ready(job.backend, one.ranks)
        with (
            joined(torch, job.backend, one.rank, one.ranks, one.rank, one.store, job.stall_s) as device,
            torch.no_grad(),
        ):
            session(job, Group(one.rank, one.ranks, device, Beat(None)), one.say)
        return ""

    return serve(arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
