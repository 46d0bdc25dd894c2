"""How wrong the counts-only model of fan-out is: ranks and nodes that tokens visit, by their ids and by the model.

`python -m moesim.network.fan_out` draws tokens of a gate on known scores, counts where they go, gives the model nothing
but their counts, and prints both as a table (docs/explanation/routing.md shows it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.network.traffic import visit_chances, visits_from_ids
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.grouped import group_limited
from moesim.routing.gates.routed import TokenScores
from moesim.routing.successive import prepare_successive
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]
# The layout of the table: DeepSeek-V3's gate on four nodes of eight.
EXPERTS, TOP_K, GROUPS, TOP_GROUPS, RANKS, NODES = 256, 8, 8, 4, 32, 4
TOKENS = 20_000
# Spreads of an expert's and of a group's log weight; at 0.55 and 0.3 shares are as uneven as DeepSeek-R1's (sd of ln
# share 0.66, docs/explanation/routing.md).
SKEWS = {"even": (0.0, 0.0), "as recorded": (0.55, 0.3), "twice": (1.1, 0.6)}


@dataclass(frozen=True)
class FanOut:
    """Mean ranks and nodes that a token visits: counted from ids, and modelled from the counts of the same tokens.

    rank_gap: largest error of the chance that a token visits one given rank.
    """

    ranks_ids: float
    ranks_model: float
    nodes_ids: float
    nodes_model: float
    rank_gap: float

    @property
    def rank_error(self) -> float:
        """Relative error of the model's ranks."""
        return self.ranks_model / self.ranks_ids - 1.0

    @property
    def node_error(self) -> float:
        """Relative error of the model's nodes."""
        return self.nodes_model / self.nodes_ids - 1.0


def compare_fan_out(
    ids: NDArray[np.int64], placement: ExpertPlacement, *, nodes: int, groups: int = 1, top_groups: int = 1
) -> FanOut:
    """Count visits of ids [tokens, top_k] under a placement of one layer without replicas, and model them from counts.

    groups, top_groups: of the gate, as the model is told them.
    """
    experts = placement.experts
    home = np.empty(experts, dtype=np.int64)
    home[placement.physical_to_logical[0]] = np.arange(placement.slots) // placement.slots_per_rank
    by_rank, by_node = visits_from_ids(ids, home, placement.ranks, nodes)
    counts = np.bincount(ids.ravel(), minlength=experts).astype(np.float64)[None]
    rank, node = visit_chances(counts, placement, top_k=ids.shape[1], groups=groups, top_groups=top_groups, nodes=nodes)
    return FanOut(
        ranks_ids=float(by_rank.sum() / len(ids)),
        ranks_model=float(rank.sum()),
        nodes_ids=float(by_node.sum() / len(ids)),
        nodes_model=float(node.sum()),
        rank_gap=float(np.abs(rank[0] - by_rank / len(ids)).max()),
    )


def token_ids(log_weight: Floats, *, grouped: bool, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Picks [tokens, TOP_K] by log weights [experts] plus Gumbel scores, of a plain or a group-limited top-k."""
    if not grouped:
        return prepare_successive(np.exp(log_weight), TOP_K).ids(0, tokens, rng).astype(np.int64)
    noisy = log_weight - np.log(np.exp(log_weight).sum()) + rng.gumbel(size=(tokens, EXPERTS))
    choice = GateChoice(TOP_K, GROUPS, TOP_GROUPS, scoring="sigmoid")
    return group_limited(TokenScores(noisy), choice, rng).ids


def fan_out_table(tokens: int = TOKENS, seed: int = 0) -> Iterator[tuple[str, str, str, FanOut]]:
    """Routing, skew, placement and its comparison, for each row of the table."""
    for grouped in (False, True):
        for skew, (by_expert, by_group) in SKEWS.items():
            rng = np.random.default_rng(seed)
            group = np.repeat(rng.standard_normal(GROUPS), EXPERTS // GROUPS)
            ids = token_ids(
                by_expert * rng.standard_normal(EXPERTS) + by_group * group, grouped=grouped, tokens=tokens, rng=rng
            )
            limits = {"groups": GROUPS, "top_groups": TOP_GROUPS} if grouped else {}
            for name, order in (("contiguous", np.arange(EXPERTS)), ("scattered", rng.permutation(EXPERTS))):
                placement = ExpertPlacement(order[None], np.asarray([0]), EXPERTS, RANKS, 1)
                yield (
                    "group-limited" if grouped else "plain top-k",
                    skew,
                    name,
                    compare_fan_out(ids, placement, nodes=NODES, **limits),
                )


def main(tokens: int = TOKENS) -> None:
    """Print the table."""
    print("| routing | shares | placement | ranks, ids | ranks, model | error | nodes, ids | nodes, model | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for routing, skew, placement, found in fan_out_table(tokens):
        print(
            f"| {routing} | {skew} | {placement} | {found.ranks_ids:.3f} | {found.ranks_model:.3f} | "
            f"{found.rank_error:+.1%} | {found.nodes_ids:.3f} | {found.nodes_model:.3f} | {found.node_error:+.1%} |"
        )


if __name__ == "__main__":
    main()
