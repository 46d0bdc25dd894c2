"""Speculative decoding by acceptance rate: what a step verifies, and what drafting costs beside it.

A step verifies one token and `draft_tokens` drafts of each sequence, as so many sequences of the same context: every
query reads the cache for itself, which is an upper bound where a kernel shares the read (the products, the exchange and
the logits are exact). Each draft is a pass through the multi-token-prediction layer, which is a layer of the model with
a projection of [2 hidden, hidden] before it and the logits after it (arXiv:2412.19437, section 2.2); a prompt passes
through it once, to fill its cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel
from moesim.cost.ops import Gemm
from moesim.engine.batch_state import Plan
from moesim.errors import BadInput
from moesim.graph.priced_step import LayerSetup, Part
from moesim.spec.model import ModelSpec
from moesim.spec.workload import ServingSpec

Floats = NDArray[np.float64]


def draft_tokens(serving: ServingSpec) -> int:
    """Drafts of a sequence in each step; 0 without speculation."""
    return 0 if serving.speculative is None else serving.speculative.draft_tokens


def refuse_drafts(serving: ServingSpec, model: ModelSpec) -> None:
    """Whether the model can draft as asked. Raises BadInput."""
    asked = serving.speculative
    if asked is None:
        return
    if asked.method != "mtp":
        raise BadInput(
            f"drafts by {asked.method} are not simulated yet", where="serving.speculative.method", mend="use mtp"
        )
    if model.mtp_layers == 0:
        raise BadInput(
            f"{model.id} has no multi-token-prediction layer",
            where="serving.speculative",
            mend="leave it out, or use a model whose config has num_nextn_predict_layers",
        )


def verified(plan: Plan, drafts: int) -> Plan:
    """A planned step with each token that it verifies as a sequence of its own."""
    if drafts == 0:
        return plan
    return plan._replace(decode_seqs=plan.decode_seqs * (1 + drafts), decode_kv=plan.decode_kv * (1.0 + drafts))


def projection(setup: LayerSetup, costs: CostModel, rows: Floats) -> Part:
    """The product that joins a hidden state and an embedding before the layer; rows [...]: tokens of a rank."""
    hidden = setup.model.hidden
    return Part((costs.estimate(Gemm(m=rows, n=hidden, k=2 * hidden, dtype=setup.precision.dense)),))


def pass_seconds(step_s: float, overhead_s: float, logits_s: float, layers: int) -> float:
    """A pass through one mean layer and the logits, from a step of all layers on the same tokens."""
    return (step_s - overhead_s - logits_s) / layers + logits_s
