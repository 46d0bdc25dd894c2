"""LAB.yaml: the network that `validate fabric` builds out of namespaces, and what it exchanges there.

Rates are what `tc tbf` lets through, Ethernet headers included, in bits/s and one direction.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.yaml_text import read_yaml

WHERE = "validate fabric"
Pattern = Literal["even", "skewed", "routed_contiguous", "routed_planned"]
PATTERNS: tuple[Pattern, ...] = ("even", "skewed", "routed_contiguous", "routed_planned")
ROUTED: tuple[Pattern, ...] = ("routed_contiguous", "routed_planned")
Pair = Annotated[tuple[Pattern, ...], Field(min_length=2, max_length=2)]
# Below it a run lasts for minutes; above it this is a test of the CPU (all nodes share one machine's).
LEAST_BITS_PER_S, MOST_BITS_PER_S = 1e6, 2e9
# Processes of one machine.
MOST_RANKS = 32


class SlowNic(Spec):
    """A NIC that is slower than the others, both ways."""

    node: int = Field(ge=0)
    nic: int = Field(default=0, ge=0)
    bits_per_s: float = Field(ge=LEAST_BITS_PER_S, le=MOST_BITS_PER_S)


class DeadLink(Spec):
    """A NIC whose cable is pulled while the first measured exchange runs."""

    node: int = Field(ge=0)
    nic: int = Field(default=0, ge=0)
    after_s: float = Field(default=0.05, ge=0, le=60, description="after the start of the exchange")


class RoutedSpec(Spec):
    """Where the experts of the routed patterns come from, and how many a token picks.

    loads: a file that `moesim place` reads, its most skewed layer unless `layer` names one; else a seeded lognormal
    profile of `experts`.
    """

    loads: Path | None = None
    layer: int | None = Field(default=None, ge=0)
    experts: int = Field(default=64, gt=0, le=4096)
    top_k: int = Field(default=8, gt=0, le=64)

    @model_validator(mode="after")
    def _fits(self) -> RoutedSpec:
        if self.loads is None and self.layer is not None:
            raise ValueError("layer names one of the loads: give loads")
        if self.loads is None and self.top_k > self.experts:
            raise ValueError(f"a token picks {self.top_k} of {self.experts} experts")
        return self


class LabSpec(Spec):
    """One fabric and its exchanges. Rank r of a node uses NIC r x nics_per_node // ranks_per_node.

    rails: NIC i of every node on leaf switch i; else the NICs of `nodes_per_leaf` nodes (all of them where it is null)
    on one leaf. Several leaves meet in a spine, each by an uplink of `spine_bits_per_s` (null: as much as its NICs).
    delay_s: one way, between any two nodes. concurrent: pairs of patterns that are exchanged at the same time.
    """

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=40, pattern=r"^[a-z0-9][a-z0-9._-]*$")
    nodes: int = Field(ge=1, le=16)
    ranks_per_node: int = Field(ge=1, le=16)
    nics_per_node: int = Field(default=1, ge=1, le=8)
    nic_bits_per_s: float = Field(ge=LEAST_BITS_PER_S, le=MOST_BITS_PER_S)
    slow_nics: tuple[SlowNic, ...] = ()
    delay_s: float = Field(default=0.0, ge=0, le=1)
    rails: bool = False
    nodes_per_leaf: int | None = Field(default=None, ge=1)
    spine_bits_per_s: float | None = Field(default=None, ge=LEAST_BITS_PER_S)
    mtu_bytes: int = Field(default=1500, ge=576, le=9000)
    patterns: tuple[Pattern, ...] = PATTERNS
    concurrent: tuple[Pair, ...] = ()
    routed: RoutedSpec = Field(default_factory=RoutedSpec)
    bytes_per_rank: int = Field(default=2_000_000, ge=10_000, le=10**9, description="send buffer of a rank, the mean")
    row_bytes: int = Field(default=2048, ge=64, le=2**20, multiple_of=4, description="of one copy of a token")
    repeats: int = Field(default=6, ge=2, le=1000)
    seed: int = Field(default=0, ge=0)
    dead_link: DeadLink | None = None

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    def nic(self, rank: int) -> int:
        """The NIC of its node that a rank uses."""
        return rank % self.ranks_per_node * self.nics_per_node // self.ranks_per_node

    def rate(self, node: int, nic: int) -> float:
        """Bits/s of a NIC."""
        for slow in self.slow_nics:
            if (slow.node, slow.nic) == (node, nic):
                return slow.bits_per_s
        return self.nic_bits_per_s

    def leaf(self, node: int, nic: int) -> int:
        """The leaf switch of a NIC."""
        per_leaf = self.nodes_per_leaf or self.nodes
        return node // per_leaf * self.nics_per_node + nic if self.rails else node // per_leaf

    @property
    def leaves(self) -> int:
        """Leaf switches."""
        return 1 + max(self.leaf(node, nic) for node in range(self.nodes) for nic in range(self.nics_per_node))

    @property
    def nics_per_leaf(self) -> int:
        """NICs on a leaf that is full."""
        nodes = self.nodes_per_leaf or self.nodes
        return nodes if self.rails else nodes * self.nics_per_node

    @property
    def uplink_bits_per_s(self) -> float:
        """Bits/s of a leaf's uplink, one way."""
        return self.spine_bits_per_s or self.nics_per_leaf * self.nic_bits_per_s

    @model_validator(mode="after")
    def _fits(self) -> LabSpec:
        if not 2 <= self.ranks <= MOST_RANKS:
            raise ValueError(f"{self.ranks} ranks: use 2 to {MOST_RANKS}")
        if self.ranks_per_node % self.nics_per_node:
            raise ValueError(f"{self.ranks_per_node} ranks do not share {self.nics_per_node} NICs evenly")
        for what in (*self.slow_nics, *((self.dead_link,) if self.dead_link else ())):
            if what.node >= self.nodes or what.nic >= self.nics_per_node:
                raise ValueError(f"there is no NIC {what.nic} of node {what.node}")
        if len({(slow.node, slow.nic) for slow in self.slow_nics}) < len(self.slow_nics):
            raise ValueError("a NIC is named twice in slow_nics")
        if any(slow.bits_per_s > self.nic_bits_per_s for slow in self.slow_nics):
            raise ValueError("a slow NIC is faster than nic_bits_per_s")
        if self.nodes_per_leaf and self.nodes % self.nodes_per_leaf:
            raise ValueError(f"{self.nodes} nodes do not fill leaves of {self.nodes_per_leaf}")
        if self.spine_bits_per_s and self.leaves == 1:
            raise ValueError("one leaf needs no spine: leave spine_bits_per_s out, or give nodes_per_leaf or rails")
        if self.spine_bits_per_s and self.spine_bits_per_s > self.nics_per_leaf * self.nic_bits_per_s:
            raise ValueError("spine_bits_per_s is more than the NICs of a leaf can send")
        if self.bytes_per_rank < self.row_bytes * self.ranks:
            raise ValueError(f"bytes_per_rank holds fewer rows of {self.row_bytes} bytes than there are ranks")
        used = {*self.patterns, *(name for pair in self.concurrent for name in pair)}
        if self.routed.loads is None and self.routed.experts % self.ranks and used & set(ROUTED):
            raise ValueError(f"routed.experts ({self.routed.experts}) do not divide by {self.ranks} ranks")
        if len(set(self.patterns)) < len(self.patterns):
            raise ValueError("a pattern is named twice")
        if not self.patterns and not self.concurrent:
            raise ValueError("nothing to exchange: give patterns or concurrent")
        return self


def labs_folder() -> Path:
    """The labs that ship."""
    return Path(str(resources.files("validate.fabric") / "labs"))


def bundled() -> list[str]:
    """Names of the labs that ship."""
    return sorted(path.stem for path in labs_folder().glob("*.yaml"))


def read_lab(given: str) -> LabSpec:
    """A lab file, or one that ships by its name. Raises BadInput with file and key."""
    path = Path(given)
    if path.suffix not in (".yaml", ".yml", ".json") and given in bundled():
        path = labs_folder() / f"{given}.yaml"
    elif path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
        raise BadInput(f"no lab {given!r}", where=WHERE, mend=f"give a LAB.yaml, or one of: {', '.join(bundled())}")
    data = read_yaml(path, what="lab")
    if not isinstance(data, dict):
        raise BadInput("a lab is a mapping of keys", where=str(path), mend="start with `name:`")
    lab = LabSpec.read(data, where=path)
    if lab.routed.loads is None or lab.routed.loads.is_absolute():
        return lab
    routed = lab.routed.model_copy(update={"loads": path.parent / lab.routed.loads})
    return lab.model_copy(update={"routed": routed})
