"""What each attention-DP rank brings to a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepBatch:
    """The batches of independent steps, each array float64 [steps, attention-DP ranks].

    decode_seqs: sequences that get one token; decode_kv: their mean context (tokens). prefill_seqs: prompts or chunks;
    prefill_new: mean new tokens of each; prefill_prefix: mean context before them. padded_tokens: rows of the dense
    products after padding to a captured graph (at least `tokens`).
    """

    decode_seqs: Floats
    decode_kv: Floats
    prefill_seqs: Floats
    prefill_new: Floats
    prefill_prefix: Floats
    padded_tokens: Floats

    @property
    def steps(self) -> int:
        """Independent steps."""
        return int(self.decode_seqs.shape[0])

    @property
    def prefill_tokens(self) -> Floats:
        """New prompt tokens: [steps, attention-DP ranks]."""
        return self.prefill_seqs * self.prefill_new

    @property
    def tokens(self) -> Floats:
        """All tokens, prompt and generated: [steps, attention-DP ranks]."""
        return self.decode_seqs + self.prefill_tokens

    def half(self) -> StepBatch:
        """One of the two equal micro-batches of a two-batch schedule.

        Half the sequences of each kind. A prompt that is alone is cut in two instead, as SGLang does: half its tokens,
        after a prefix that gives each half the mean of the two halves' causal pairs, so that attention work halves.
        """
        alone = self.prefill_seqs < 2
        return StepBatch(
            decode_seqs=self.decode_seqs / 2,
            decode_kv=self.decode_kv,
            prefill_seqs=np.where(alone, self.prefill_seqs, self.prefill_seqs / 2),
            prefill_new=np.where(alone, self.prefill_new / 2, self.prefill_new),
            prefill_prefix=np.where(alone, self.prefill_prefix + self.prefill_new / 4, self.prefill_prefix),
            padded_tokens=self.padded_tokens / 2,
        )

    def chunk(self, parts: int) -> StepBatch:
        """One of `parts` equal chunks of the step's tokens inside the MoE layer, for what depends on tokens alone.

        Each chunk holds the same share of every sequence's tokens, so its attention means nothing.
        """
        return StepBatch(
            decode_seqs=self.decode_seqs / parts,
            decode_kv=self.decode_kv,
            prefill_seqs=self.prefill_seqs,
            prefill_new=self.prefill_new / parts,
            prefill_prefix=self.prefill_prefix,
            padded_tokens=self.padded_tokens / parts,
        )


def step_batch(
    *,
    ranks: int,
    decode_seqs: ArrayLike = 0.0,
    decode_kv: ArrayLike = 0.0,
    prefill_seqs: ArrayLike = 0.0,
    prefill_new: ArrayLike = 0.0,
    prefill_prefix: ArrayLike = 0.0,
    padded_tokens: ArrayLike | None = None,
) -> StepBatch:
    """Build a StepBatch from values that broadcast to [steps, ranks]; without padding, rows are the tokens."""
    given = [
        np.asarray(x, dtype=np.float64) for x in (decode_seqs, decode_kv, prefill_seqs, prefill_new, prefill_prefix)
    ]
    if padded_tokens is not None:
        given.append(np.asarray(padded_tokens, dtype=np.float64))
    steps = np.broadcast_shapes(*(x.shape for x in given), (1, ranks))[0]
    decode, kv, seqs, new, prefix, *padded = (np.broadcast_to(x, (steps, ranks)) for x in given)
    tokens = decode + seqs * new
    rows = np.maximum(padded[0], tokens) if padded else tokens
    return StepBatch(decode, kv, seqs, new, prefix, rows)
