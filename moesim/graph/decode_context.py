"""Decode context parallelism: the ranks of a group inside a TP group keep each a share of a context's tokens.

A rank attends to its share with the query heads of the whole group and the group merges the partial outputs by their
log-sum-exp. This is vLLM's `--decode-context-parallel-size` and SGLang's `--dcp-size`; docs/explanation/serving.md says
what each does, with sources. Group members are neighbours: ranks 0 .. c - 1, c .. 2c - 1 and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.graph.batch import Floats, StepBatch
from moesim.graph.priced_step import LayerSetup
from moesim.units import BYTES_PER_ELEMENT

Kind = Literal["all_gather", "reduce_scatter", "all_to_all"]
# Engines that merge by an all-gather of log-sum-exps and a reduce-scatter of outputs (vLLM's default,
# `--dcp-comm-backend ag_rs`: cp_lse_ag_out_rs in vllm/v1/attention/ops), and by one all-to-all of both.
BY_REDUCE_SCATTER, BY_ALL_TO_ALL = ("vllm", "moesim"), ("sglang",)
CONTEXT = "context_collective"
# Log-sum-exps are kept and sent in this type.
LSE_BYTES = BYTES_PER_ELEMENT["fp32"]


@dataclass(frozen=True)
class Exchanged:
    """What a layer's attention moves for its context being split, of each attention-DP rank: [steps, ranks] bytes.

    before, after: collectives of a group around the kernel, sizes as `Collective` counts them. passes: kernels bound by
    memory beside the attention kernel, by name.
    """

    before: tuple[tuple[Kind, Floats], ...] = ()
    passes: tuple[tuple[str, Floats], ...] = ()
    after: tuple[tuple[Kind, Floats], ...] = ()

    def __add__(self, other: Exchanged) -> Exchanged:
        return Exchanged(self.before + other.before, self.passes + other.passes, self.after + other.after)


def exchanged(setup: LayerSetup, batch: StepBatch) -> Exchanged:
    """What the attention of a batch moves; nothing where contexts are not split."""
    found = Exchanged()
    if setup.parallel.decode_cp == 1:
        return found
    if batch.decode_seqs.any():
        found = found + _of_queries(setup, batch.decode_seqs)
    if not batch.prefill_seqs.any():
        return found
    if setup.model.attention.kind == "mla":
        return found + _of_prefixes(setup, batch.prefill_seqs * batch.prefill_prefix)
    return found + _of_queries(setup, batch.prefill_tokens, own=True)


def _of_queries(setup: LayerSetup, rows: Floats, *, own: bool = False) -> Exchanged:
    """Queries of `rows` tokens are gathered over their heads, and partial outputs merged and scattered over them.

    own: the tokens attend to each other in a kernel of its own, whose output is merged with the context's at the end
    (vLLM's BatchDCPPrefillWrapper of vllm/v1/attention/backends/flashinfer.py).
    """
    spec, parts = setup.model.attention, setup.parallel.decode_cp
    element = BYTES_PER_ELEMENT[setup.precision.activations]
    mla = spec.kind == "mla"
    query = spec.kv_lora_rank + spec.qk_rope_head_dim if mla else spec.head_dim
    value = spec.kv_lora_rank if mla else spec.value_head_dim
    heads = spec.heads // setup.parallel.tp * parts
    outputs, sums = rows * (heads * value * element), rows * (heads * LSE_BYTES)
    before: Sequence[tuple[Kind, Floats]] = (("all_gather", rows * (heads * query * element)),)
    passes: list[tuple[str, Floats]] = []
    after: Sequence[tuple[Kind, Floats]]
    if setup.context_by_all_to_all:
        packed = outputs + sums
        passes += [("pack partial outputs", packed * 2.0), ("merge partial outputs", packed + outputs / parts)]
        after = (("all_to_all", packed),)
    else:
        passes.append(("scale partial outputs", outputs * 2.0))
        after = (("all_gather", sums * parts), ("reduce_scatter", outputs))
    if own:
        passes.append(("merge attention states", outputs / parts * 3.0))
    return Exchanged(tuple(before), tuple(passes), tuple(after))


def _of_prefixes(setup: LayerSetup, tokens: Floats) -> Exchanged:
    """MLA's prompts gather the latents of the context before them: `tokens` of it, each copied twice on arrival.

    vLLM: `_context_parallel_compute_prefill_context` of its MLA attention; a prompt without such a context moves none.
    """
    if not tokens.any():
        return Exchanged()
    spec = setup.model.attention
    size = np.asarray(
        tokens * ((spec.kv_lora_rank + spec.qk_rope_head_dim) * BYTES_PER_ELEMENT[setup.precision.kv_cache])
    )
    return Exchanged((("all_gather", size),), (("lay out gathered latents", size * 4.0),))
