"""The network of one model instance: its part of the cluster, the exchanges over it, and who may price by it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesim.cost.links import at_exchange_rates, at_reached_rates, exchange_kind
from moesim.network.exchange import Exchange, Scheme, prepare
from moesim.spec.cluster import ClusterSpec


@dataclass(frozen=True, eq=False)
class InstanceNetwork:
    """The GPUs of one instance and their links.

    cluster: as many nodes as the instance spans. formula: whether the scenario takes prices that no table holds.
    """

    cluster: ClusterSpec
    formula: bool
    _kept: dict[str, Exchange] = field(default_factory=dict, repr=False)

    @property
    def measured(self) -> bool:
        """Whether every link figure that exchanges need was measured: inside a domain, and between several."""
        inside = "nvlink" if self.cluster.nvlink_bytes_per_s else "pcie"
        levels = [inside] if self.cluster.domain_gpus >= self.cluster.gpus else [inside, "nic"]
        return all(
            f"{level}_{figure}" in self.cluster.measured for level in levels for figure in ("bytes_per_s", "latency_s")
        )

    def exchange(self, scheme: Scheme) -> Exchange:
        """The instance's GPUs under one scheme of exchange, with links as fast as it finds them; prepared once.

        Raises BadInput as `prepare` does.
        """
        if scheme not in self._kept:
            self._kept[scheme] = prepare(at_exchange_rates(self.cluster, self.kind(scheme)), scheme)
        return self._kept[scheme]

    def paths(self, scheme: Scheme) -> Exchange:
        """The same with links as fast as a large send from one GPU to another finds them: what no exchange exceeds."""
        key = f"paths {scheme}"
        if key not in self._kept:
            self._kept[key] = prepare(at_reached_rates(self.cluster), scheme)
        return self._kept[key]

    def kind(self, scheme: Scheme) -> str:
        """What `moesim.cost.reach` calls an exchange of all of the instance's GPUs under a scheme."""
        if not scheme.startswith("deepep"):
            return "collective all_to_all"
        mode = "normal" if scheme == "deepep_normal" else "low_latency"
        return exchange_kind(mode, self.cluster.domains_of(self.cluster.nodes))


def instance_network(cluster: ClusterSpec, gpus: int, *, formula: bool) -> InstanceNetwork:
    """The network of an instance of `gpus` GPUs, which fill whole nodes or lie in one."""
    size = {"nodes": max(1, gpus // cluster.gpus_per_node), "gpus_per_node": min(gpus, cluster.gpus_per_node)}
    return InstanceNetwork(cluster.model_copy(update={**size, "background": ()}), formula)
