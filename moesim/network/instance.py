"""The network of one model instance: its part of the cluster, the exchanges over it, and who may price by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moesim.network.exchange import Exchange, Scheme, prepare
from moesim.spec.cluster import ClusterSpec, LinkFigure


@dataclass(frozen=True, eq=False)
class InstanceNetwork:
    """The GPUs of one instance and their links.

    cluster: as many nodes as the instance spans, at rates that exchanges reach. formula: whether the scenario takes
    prices that no table holds.
    """

    cluster: ClusterSpec
    formula: bool
    _kept: dict[Scheme, Exchange] = field(default_factory=dict, repr=False)

    @property
    def measured(self) -> bool:
        """Whether every link figure that exchanges need was measured: inside a domain, and between several."""
        inside = "nvlink" if self.cluster.nvlink_bytes_per_s else "pcie"
        levels = [inside] if self.cluster.domain_gpus >= self.cluster.gpus else [inside, "nic"]
        return all(
            f"{level}_{figure}" in self.cluster.measured for level in levels for figure in ("bytes_per_s", "latency_s")
        )

    def exchange(self, scheme: Scheme) -> Exchange:
        """The instance's GPUs under one scheme of exchange; prepared once. Raises BadInput as `prepare` does."""
        if scheme not in self._kept:
            self._kept[scheme] = prepare(self.cluster, scheme)
        return self._kept[scheme]


def instance_network(
    cluster: ClusterSpec, gpus: int, *, formula: bool, reached: Mapping[LinkFigure, float]
) -> InstanceNetwork:
    """The network of an instance of `gpus` GPUs, which fill whole nodes or lie in one.

    reached: by link rate, the share of a datasheet's figure that exchanges reach; measured figures stand as they are.
    """
    size = {"nodes": max(1, gpus // cluster.gpus_per_node), "gpus_per_node": min(gpus, cluster.gpus_per_node)}
    return InstanceNetwork(at_reached_rates(cluster, reached).model_copy(update={**size, "background": ()}), formula)


def at_reached_rates(cluster: ClusterSpec, reached: Mapping[LinkFigure, float]) -> ClusterSpec:
    """A cluster with links as fast as exchanges find them; `reached` as in `instance_network`."""
    return cluster.model_copy(
        update={
            name: getattr(cluster, name) * (1.0 if name in cluster.measured else share)
            for name, share in reached.items()
        }
    )
