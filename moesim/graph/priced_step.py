"""What `graph.pricing` takes and makes: what stays fixed over the steps of an instance, and a step by its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moesim.cost.estimate import Estimate
from moesim.cost.host import HostTime
from moesim.cost.overlap import StreamOverlap
from moesim.graph.batch import Floats, StepBatch
from moesim.graph.stages import Stages
from moesim.graph.storage import ExpertStorage
from moesim.network.instance import InstanceNetwork
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec


@dataclass(frozen=True)
class Part:
    """What one kind of operation costs in a step: the sum of its estimates, each with its own error.

    Shapes broadcast to [steps, ranks] (operations alike in all layers) or [steps, layers, ranks].
    """

    estimates: tuple[Estimate, ...] = ()

    def seconds(self, normal: Mapping[str, float] | None = None) -> Floats:
        """Summed seconds; as best known, or under a draw.

        normal: standard normal by cost family (0 where a family is not named); a price is then lognormal around the
        best known one, with its own `rel_sigma`.
        """
        total: Floats = np.zeros((1, 1))
        for priced in self.estimates:
            factor = 1.0 if normal is None else np.exp(priced.rel_sigma * normal.get(priced.family, 0.0))
            total = total + priced.seconds * factor
        return total

    def __add__(self, other: Part) -> Part:
        return Part(self.estimates + other.estimates)


@dataclass(frozen=True)
class LayerSetup:
    """All that stays fixed over the steps of a deployment's instance.

    placement: of the MoE layers over the instance's EP ranks. nodes: nodes that the instance spans.
    gpus_per_node: GPUs of one node. step: host time of a step that nothing hides, layer: extra host time per layer
    without a captured graph, overhead_rel_sigma: the spread of other host times, which are `assumed`.
    storage: where expert weights wait, None = all on the GPU. overlap: what streams cost each other, None = nothing.
    network: the instance's links, for exchanges that no table holds and for the bytes on each link.
    stages: of an instance with several pipeline stages; parallel, nodes and network are then those of one stage.
    context_by_all_to_all: how partial outputs of split contexts are merged, see `moesim.graph.decode_context`.
    """

    model: ModelSpec
    parallel: ParallelSpec
    precision: PrecisionSpec
    policies: PoliciesSpec
    placement: ExpertPlacement
    nodes: int
    gpus_per_node: int
    step: HostTime
    layer: HostTime
    overhead_rel_sigma: float
    storage: ExpertStorage | None = None
    overlap: StreamOverlap | None = None
    network: InstanceNetwork | None = None
    stages: Stages | None = None
    context_by_all_to_all: bool = False

    @property
    def domains(self) -> int:
        """NVLink domains that the instance lies in, each with as many EP ranks; else, and without a network, nodes."""
        domains = self.nodes if self.network is None else self.network.cluster.domains_of(self.nodes)
        return self.nodes if self.parallel.ep % domains else domains


@dataclass(frozen=True)
class PricedStep:
    """The parts of a step by name. Shapes: see Part; rank axes are attention-DP ranks or EP ranks as named.

    per attention-DP rank [steps, dp]: head (embedding), projections, attention, gate, shared, dense, tail (logits);
    around attention to split contexts, the same: context_gather, context_merge;
    whole group [steps, 1]: attention_sync, dense_sync, gather, replica_choice, overhead, eager (of one layer);
    by layer: dispatch, combine [steps, layers, 1], experts, fetch (of weights from the host) [steps, layers, ep];
    between pipeline stages: transfer [steps, hops, 1], arrival (the gather after it) [steps, 1].
    chunks: how many equal parts the MoE layer's tokens travel in; dispatch, experts and combine are then one part's.
    others: the same steps with other numbers of chunks, for a schedule that chooses.
    """

    batch: StepBatch
    mode: str
    head: Part = field(default_factory=Part)
    projections: Part = field(default_factory=Part)
    attention: Part = field(default_factory=Part)
    attention_sync: Part = field(default_factory=Part)
    gate: Part = field(default_factory=Part)
    shared: Part = field(default_factory=Part)
    replica_choice: Part = field(default_factory=Part)
    dispatch: Part = field(default_factory=Part)
    experts: Part = field(default_factory=Part)
    combine: Part = field(default_factory=Part)
    gather: Part = field(default_factory=Part)
    dense: Part = field(default_factory=Part)
    dense_sync: Part = field(default_factory=Part)
    tail: Part = field(default_factory=Part)
    overhead: Part = field(default_factory=Part)
    eager: Part = field(default_factory=Part)
    fetch: Part = field(default_factory=Part)
    transfer: Part = field(default_factory=Part)
    arrival: Part = field(default_factory=Part)
    context_gather: Part = field(default_factory=Part)
    context_merge: Part = field(default_factory=Part)
    chunks: int = 1
    others: tuple[PricedStep, ...] = ()
