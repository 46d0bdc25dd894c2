"""Gates whose experts get equally many tokens by construction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import NO_EXPERT, Floats, Ints, Routed, TokenScores, best, softmax, taken


def expert_choice(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Each expert takes the tokens that want it most, tokens x top_k / experts of them (arXiv:2202.09368).

    A token may end with no expert or with many. Where the division leaves a remainder, experts drawn at random take one
    token more.
    """
    wanted = softmax(scores.logits)
    room = even_room(scores.tokens * how.top_k, scores.experts, rng)
    chosen = np.zeros((scores.tokens, scores.experts), dtype=bool)
    order = best(wanted.T, min(int(room.max(initial=0)), scores.tokens))  # [experts, most]: tokens, best first
    held = np.arange(order.shape[1])[None, :] < np.minimum(room, scores.tokens)[:, None]
    chosen[order[held], np.nonzero(held)[0]] = True
    return _of_choice(chosen, wanted, scores.experts)


def base_assignment(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """The assignment of one expert to each token with the largest summed logits and equal loads (BASE layers,
    arXiv:2103.16716), solved by scipy's linear_sum_assignment.

    Solved for `block` tokens at a time, as BASE's workers each solve their own. Weighed by the sigmoid of the logit.
    Raises BadInput for a top_k other than 1, as the rule has no other.
    """
    from scipy.optimize import linear_sum_assignment

    if how.top_k != 1:
        raise BadInput(
            f"a balanced assignment gives a token one expert, not {how.top_k}", where="gate.top_k", mend="set it to 1"
        )
    ids = np.empty((scores.tokens, 1), dtype=np.int64)
    for start in range(0, scores.tokens, how.block):
        rows = scores.logits[start : start + how.block]
        places = np.repeat(np.arange(scores.experts), even_room(len(rows), scores.experts, rng))
        token, place = linear_sum_assignment(rows[:, places], maximize=True)
        ids[start + token, 0] = places[place]
    weights = 0.5 * (1.0 + np.tanh(0.5 * taken(scores.logits, ids)))
    return Routed(ids, weights, scores.experts)


def even_room(picks: int, experts: int, rng: np.random.Generator) -> Ints:
    """Picks for each expert [experts]: the same for all, the remainder one each to experts drawn at random."""
    room = np.full(experts, picks // experts, dtype=np.int64)
    room[rng.permutation(experts)[: picks % experts]] += 1
    return room


def _of_choice(chosen: NDArray[np.bool_], weights: Floats, experts: int) -> Routed:
    """Ids and weights of a boolean table [tokens, experts]; slots as many as the widest token has."""
    most = max(int(chosen.sum(axis=1).max(initial=0)), 1)
    ids = best(np.where(chosen, weights, -np.inf), min(most, experts))
    return Routed(ids, np.where(ids == NO_EXPERT, 0.0, taken(weights, ids)), experts)
