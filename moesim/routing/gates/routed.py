"""What a gate is given and what it answers: scores of tokens in, expert ids with weights out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_EXPERT = -1


@dataclass(frozen=True)
class TokenScores:
    """The tokens of one layer of one step.

    logits: float64 [tokens, experts], what the router computes. Some gates need more: token_ids [tokens] (hash),
    request [tokens] (sample-level), source_node [tokens] and expert_node [experts] (topology-aware), bias [experts]
    (bias-corrected). Raises BadInput where shapes disagree or a logit is no number.
    """

    logits: Floats
    token_ids: Ints | None = None
    request: Ints | None = None
    source_node: Ints | None = None
    expert_node: Ints | None = None
    bias: Floats | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or not np.isfinite(self.logits).all():
            raise BadInput("logits are no finite [tokens, experts]", mend="give one row for each token")
        tokens, experts = self.logits.shape
        for name, length in (
            ("token_ids", tokens),
            ("request", tokens),
            ("source_node", tokens),
            ("expert_node", experts),
            ("bias", experts),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != (length,):
                raise BadInput(f"{name} has shape {value.shape}, not ({length},)", mend="give one value for each")

    @property
    def tokens(self) -> int:
        """Rows."""
        return int(self.logits.shape[0])

    @property
    def experts(self) -> int:
        """Columns."""
        return int(self.logits.shape[1])

    def need(self, name: str, gate: str) -> NDArray[np.int64]:
        """An optional column that this gate cannot do without. Raises BadInput that names it."""
        value = getattr(self, name)
        if value is None:
            raise BadInput(f"the {gate} gate needs {name}", where="gate", mend=f"give TokenScores({name}=...)")
        return np.asarray(value)


@dataclass(frozen=True)
class Routed:
    """Where each token goes: ids int64 [tokens, slots], best first, NO_EXPERT where a slot is empty; weights alike.

    Weights are what the experts' outputs are multiplied with; 0 in empty slots.
    """

    ids: Ints
    weights: Floats
    experts: int

    def counts(self) -> Floats:
        """Tokens of each expert: float64 [experts]."""
        return np.bincount(self.ids[self.ids >= 0], minlength=self.experts).astype(np.float64)

    def counts_by_source(self, source_rank: Ints, ranks: int) -> Floats:
        """Tokens of each expert by the rank that they come from [tokens]: float64 [ranks, experts]."""
        at = np.broadcast_to(source_rank[:, None] * self.experts, self.ids.shape) + self.ids
        found = np.bincount(at[self.ids >= 0], minlength=ranks * self.experts)
        return found.reshape(ranks, self.experts).astype(np.float64)


def step_counts(layers: list[list[Routed]], source_rank: list[Ints], ranks: int) -> Floats:
    """Counts float64 [steps, layers, source rank, experts] of routed [steps][layers]; source_rank [steps]."""
    return np.stack(
        [
            np.stack([one.counts_by_source(source, ranks) for one in step])
            for step, source in zip(layers, source_rank, strict=True)
        ]
    )


def softmax(logits: Floats) -> Floats:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def sigmoid(logits: Floats) -> Floats:
    """Elementwise; from tanh, which does not overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))


def best(scores: Floats, top_k: int) -> Ints:
    """Columns of the top_k largest scores, largest first: int64 [rows, top_k]; a tie goes to the lower column.

    Columns of -inf are never picked: NO_EXPERT.
    """
    if top_k < scores.shape[1]:
        edge = np.partition(scores, scores.shape[1] - top_k, axis=1)[:, -top_k, None]
        # Ties at the edge are rare; only rows without them can take the fast way.
        chosen = scores >= edge
        if (chosen.sum(axis=1) == top_k).all():
            columns = np.nonzero(chosen)[1].reshape(-1, top_k)
        else:
            columns = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    else:
        columns = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    found = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    ids = np.take_along_axis(columns, order, axis=1)
    lost = np.isneginf(np.take_along_axis(found, order, axis=1))
    return np.asarray(np.where(lost, NO_EXPERT, ids), dtype=np.int64)


def taken(values: Floats, ids: Ints) -> Floats:
    """Values [tokens, experts] at the picked ids [tokens, slots]; 0 in empty slots."""
    found = np.take_along_axis(values, np.maximum(ids, 0), axis=1)
    return np.asarray(np.where(ids >= 0, found, 0.0))


def normalised(weights: Floats) -> Floats:
    """Each row over its sum; a row without weight stays 0."""
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(weights / np.where(total > 0, total, 1.0))
