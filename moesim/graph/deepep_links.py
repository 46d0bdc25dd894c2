"""DeepEP's copies between GPUs, and an exchange priced by them over the cluster's links where no table holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.links import empty_exchange_s
from moesim.cost.reach import link_reach
from moesim.graph.batch import Floats
from moesim.graph.exchanges import MOST_PAIRS, Step
from moesim.network.exchange import Scheme
from moesim.network.instance import InstanceNetwork
from moesim.network.traffic import Mode, message_bytes, pair_copies, step_visits
from moesim.spec.model import ModelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import PrecisionSpec


@dataclass(frozen=True, eq=False)
class DeepEpCopies:
    """Copies of a dispatch: of each pick in low-latency mode, else of each rank and domain that a token visits.

    sent: [steps, 1, gpus], tokens; visits: [steps, layers, gpus], copies that arrive (low latency) or the chance that a
    token visits each rank; domains: [steps, layers, domains], the chance that it visits each domain, normal mode only.
    """

    sent: Floats
    visits: Floats
    domains: Floats | None

    def pairs(self, rows: slice) -> tuple[Floats, Floats | None]:
        """Copies of some steps to every GPU [steps, layers, gpus, gpus] and every domain [..., gpus, domains]."""
        sent, visits = self.sent[rows], self.visits[rows]
        if self.domains is None:
            return pair_copies(sent, visits), None
        return sent[..., :, None] * visits[..., None, :], sent[..., :, None] * self.domains[rows][..., None, :]


def deepep_copies(
    network: InstanceNetwork,
    model: ModelSpec,
    placement: ExpertPlacement,
    mode: Mode,
    *,
    sent: Floats,
    arriving: Floats,
    counts: Floats,
) -> DeepEpCopies:
    """Copies of steps. Raises BadInput where the instance does not fill its domains.

    sent: [steps, gpus]; arriving: [steps, layers, gpus]; counts: [steps, layers, experts].
    """
    network.exchange(deepep_scheme(mode))  # whose links the copies must fit
    tokens = np.broadcast_to(sent, (len(arriving), sent.shape[-1]))[:, None, :]
    if mode == "low_latency":
        return DeepEpCopies(tokens, arriving, None)
    each = min(network.cluster.domain_gpus, network.cluster.gpus)
    by_rank, by_domain = step_visits(
        arriving,
        counts,
        placement,
        top_k=model.moe.top_k,
        groups=model.moe.groups,
        top_groups=model.moe.top_groups,
        nodes=network.cluster.gpus // each,
    )
    # Both chances are modelled; a token that visits a domain visits one of its ranks.
    most = by_rank.reshape(*by_rank.shape[:-1], -1, each).sum(axis=-1)
    return DeepEpCopies(tokens, by_rank, np.minimum(by_domain, most))


def deepep_scheme(mode: Mode) -> Scheme:
    """How DeepEP's kernels use an instance's links."""
    return "deepep_low_latency" if mode == "low_latency" else "deepep_normal"


def deepep_message(step: Step, mode: Mode, model: ModelSpec, precision: PrecisionSpec) -> float:
    """Bytes of one copy of a token."""
    dtype = precision.dispatch if step == "dispatch" else precision.combine
    return message_bytes(step, mode, hidden=model.hidden, dtype=dtype, top_k=model.moe.top_k)


def deepep_by_links(
    network: InstanceNetwork, model: ModelSpec, precision: PrecisionSpec, step: Step, mode: Mode, copies: DeepEpCopies
) -> Estimate:
    """Seconds [steps, layers, 1] of an exchange by formula; `formula` on measured links, `assumed` on a datasheet's.

    The links of a datasheet as far as such exchanges reach them, and what an empty one takes (`moesim.cost.links`). In
    normal mode the copies are a model, which `fan_out_tag` of `network.traffic` calls assumed; the tag here is that
    of the links, as for prices from a table.
    """
    exchange, size = network.exchange(deepep_scheme(mode)), deepep_message(step, mode, model, precision)
    steps, layers, gpus = copies.visits.shape
    block = max(1, MOST_PAIRS // (layers * gpus**2))
    seconds, tag = np.zeros((steps, layers)), Tag.FORMULA
    for first in range(0, steps, block):
        rows = slice(first, first + block)
        pairs, domains = copies.pairs(rows)
        to_domains = None if domains is None else domains * size
        timed = exchange.time(pairs * size, to_domains, backwards=step == "combine")
        seconds[rows], tag = timed.seconds, max(tag, timed.tag)
    kind = network.kind(exchange.scheme)
    empty_s = empty_exchange_s(network.cluster, kind)
    seconds = np.where((seconds > 0.0) | (mode == "low_latency"), empty_s + seconds, 0.0)
    source = f"{exchange.scheme} exchange over the links of {network.cluster.name}"
    return estimate(seconds[..., None], tag, "dispatch", link_reach(kind).rel_sigma, source)
