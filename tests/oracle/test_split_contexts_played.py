"""Attention to a split context, played rank by rank: the outputs are those of whole attention, and the collectives that
it takes are the ones that are priced, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.graph.batch import step_batch
from moesim.graph.decode_context import exchanged
from moesim.graph.priced_step import LayerSetup
from moesim.spec.model import AttentionSpec
from moesim.spec.parallel import ParallelSpec
from tests.priced_steps import setup

Floats = NDArray[np.float64]
TP, DECODE_CP = 8, 4
LATENT, ROPE = 16, 8  # MLA: what a token leaves in the cache; its first part is the value
SEQS, LENGTH = 3, 37
rng = np.random.default_rng(0)


@dataclass
class Ranks:
    """Collectives among ranks that are arrays of one process; moved: (kind, bytes), as `Collective` counts sizes."""

    moved: list[tuple[str, float]] = field(default_factory=list)

    def all_gather(self, parts: list[Floats], size: int) -> Floats:
        """All ranks' parts side by side along the last axis but one, as every rank gets them."""
        whole = np.concatenate(parts, axis=-2)
        self.moved.append(("all_gather", whole.size * size))
        return whole

    def reduce_scatter(self, parts: list[Floats], size: int) -> list[Floats]:
        """The sum, each rank its heads."""
        self.moved.append(("reduce_scatter", parts[0].size * size))
        return np.split(np.sum(parts, axis=0), len(parts), axis=1)

    def all_to_all(self, parts: list[Floats], sums: list[Floats]) -> list[tuple[Floats, Floats]]:
        """Every rank gets all partial outputs and sums of its own heads."""
        self.moved.append(("all_to_all", parts[0].size * 2 + sums[0].size * 4))
        cut = [np.split(one, len(parts), axis=1) for one in parts], [np.split(one, len(parts), axis=1) for one in sums]
        ranks = range(len(parts))
        return [(np.stack([one[rank] for one in cut[0]]), np.stack([one[rank] for one in cut[1]])) for rank in ranks]


def attention(queries: Floats, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Outputs [seqs, heads, values] and log-sum-exps [seqs, heads] of one token each."""
    scores = np.einsum("shq,stq->sht", queries, keys)
    total = np.logaddexp.reduce(scores, axis=-1)
    return np.einsum("sht,stv->shv", np.exp(scores - total[..., None]), values), total


def layer(model: Any, *, packed: bool) -> LayerSetup:
    plain = setup(2, {})
    spec = {"model": plain.model.model_copy(update={"attention": model}), "context_by_all_to_all": packed}
    return replace(plain, parallel=ParallelSpec(tp=TP, ep=TP, decode_cp=DECODE_CP), **spec)  # type: ignore[arg-type]


MLA = AttentionSpec(
    kind="mla", heads=32, kv_heads=32, head_dim=12, value_head_dim=12, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE
)
GQA = AttentionSpec(kind="gqa", heads=32, kv_heads=2, head_dim=24, value_head_dim=24)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spec", [MLA, GQA], ids=["mla", "gqa"])
def test_split_attention_is_whole_attention_and_moves_what_is_priced(spec: AttentionSpec, packed: bool) -> None:
    """Four neighbours hold one KV head's copies; each keeps the tokens whose position it is in turn."""
    own = spec.heads // TP
    width = LATENT + ROPE if spec.kind == "mla" else spec.head_dim
    keys = rng.normal(size=(SEQS, LENGTH, width))
    values = keys[..., :LATENT] if spec.kind == "mla" else rng.normal(size=(SEQS, LENGTH, spec.value_head_dim))
    queries = [rng.normal(size=(SEQS, own, width)) for _ in range(DECODE_CP)]
    whole, _ = attention(np.concatenate(queries, axis=1), keys, values)

    ranks = Ranks()
    gathered = ranks.all_gather(queries, 2)
    partial = [attention(gathered, keys[:, rank::DECODE_CP], values[:, rank::DECODE_CP]) for rank in range(DECODE_CP)]
    if packed:
        arrived = ranks.all_to_all([out for out, _ in partial], [total for _, total in partial])
        weights = [np.exp(sums - np.logaddexp.reduce(sums, axis=0)) for _, sums in arrived]
        found = [(out * weight[..., None]).sum(axis=0) for (out, _), weight in zip(arrived, weights, strict=True)]
    else:
        sums = ranks.all_gather([total[:, None] for _, total in partial], 4)
        together = np.logaddexp.reduce(sums, axis=1)
        scaled = [out * np.exp(total - together)[..., None] for out, total in partial]
        found = ranks.reduce_scatter(scaled, 2)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-12)
    assert max(len(range(rank, LENGTH, DECODE_CP)) for rank in range(DECODE_CP)) <= LENGTH / DECODE_CP + 1

    priced = exchanged(layer(spec, packed=packed), step_batch(ranks=1, decode_seqs=float(SEQS), decode_kv=LENGTH))
    assert ranks.moved == [(kind, float(size[0, 0])) for kind, size in (*priced.before, *priced.after)]


def test_a_chunk_and_the_context_before_it_are_merged_into_whole_attention() -> None:
    """Grouped queries: the context by the group, the chunk's own tokens by each rank, then both by their sums."""
    own, chunk, before = GQA.heads // TP, 5, 18
    keys, values = (rng.normal(size=(1, before + chunk, GQA.head_dim)) for _ in range(2))
    queries = [rng.normal(size=(chunk, own, GQA.head_dim)) for _ in range(DECODE_CP)]
    whole = [
        np.stack([attention(mine[None, row], keys[:, : before + row + 1], values[:, : before + row + 1])[0][0]
                  for row in range(chunk)]) for mine in queries
    ]  # fmt: skip

    ranks = Ranks()
    gathered = ranks.all_gather(queries, 2)
    shards = [slice(rank, before, DECODE_CP) for rank in range(DECODE_CP)]
    context = [
        attention(gathered, np.repeat(keys[:, shard], chunk, axis=0), np.repeat(values[:, shard], chunk, axis=0))
        for shard in shards
    ]
    sums = ranks.all_gather([total[:, None] for _, total in context], 4)
    together = np.logaddexp.reduce(sums, axis=1)
    scaled = [out * np.exp(total - together)[..., None] for out, total in context]
    outputs, totals = ranks.reduce_scatter(scaled, 2), np.split(together, DECODE_CP, axis=1)
    for rank, mine in enumerate(queries):
        for row in range(chunk):
            reach = slice(before, before + row + 1)
            out, total = attention(mine[None, row], keys[:, reach], values[:, reach])
            share = np.exp(totals[rank][row] - np.logaddexp(totals[rank][row], total[0]))[..., None]
            merged = outputs[rank][row] * share + out[0] * (1.0 - share)
            np.testing.assert_allclose(merged, whole[rank][row], rtol=1e-10)
    batch = step_batch(ranks=1, prefill_seqs=1.0, prefill_new=float(chunk), prefill_prefix=float(before))
    priced = exchanged(layer(GQA, packed=False), batch)
    assert ranks.moved == [(kind, float(size[0, 0])) for kind, size in (*priced.before, *priced.after)]
