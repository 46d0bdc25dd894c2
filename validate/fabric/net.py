"""The commands that make a lab's network: a namespace for each node, veth cables, bridges as switches, `tc tbf` rates.

Pure: from a lab to lines for `ip -batch` and `tc -batch`. All of it is made inside namespaces that belong to one
process (`validate.fabric.cell`), so the kernel takes it apart when that process ends, however it ends.

A NIC is a veth whose other end is a port of its leaf's bridge; `tbf` on the NIC limits what leaves the node, on the
port what enters it. Leaves meet in a spine over veth uplinks with a `tbf` at both ends. Acknowledgements overtake data,
as on an InfiniBand or RoCE fabric, whose queues are too short to hold them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from validate.fabric.spec import LabSpec

SWITCHES = "switches"
# What tbf lets through at once: enough that a timer some hundred microseconds late costs no rate.
BURST_S, LEAST_BURST_BYTES = 1e-3, 20_000
# A device has two queues: TCP packets below so many bytes, IP header included (acknowledgements), go before all others;
# the classes limit nothing, they only order. In one queue an acknowledgement waits behind the data of its own NIC's
# ranks, 40 ms on a NIC of 60 Mbit/s with two windows before it, and the data that it acknowledges comes no faster than
# a window in that time: a skewed exchange over the slow NIC took 191 ms, and 171 so (the wire alone: 172).
ACKS, DATA, ACK_BYTES = 1, 2, 64
UNLIMITED, HTB_BURST = "100gbit", "1mb"
# Packets of several segments stay below the burst, else tbf cuts them.
GSO_BYTES = 16_384
# What a connection may have on its way: as small as keeps the link busy while a process waits for its turn (4 ms, a
# tick of a 250 Hz kernel), and four times what the delay holds. With larger ones a switch's queue takes in as much as a
# whole message before its senders slow down, and other links stand idle at the end (measured on the fabric that
# calibrates: 1 MB loses 10 % of an even exchange's rate, 256 kB 8 %, 128 kB 5 %; with 64 kB links wait for senders, and
# with 112 kB those do that carry one connection alone: two-level on own NICs took 10 to 19 % longer).
LEAST_WINDOW_BYTES, WINDOW_S, WINDOW_DELAYS = 160_000, 4e-3, 4.0
RECEIVE_BYTES = 4_000_000
SUBNET = "10.77"
# Ranks run under a user id for each NIC of a node, by which the kernel tells over which NIC their packets go.
FIRST_UID = 77_000


def window_bytes(lab: LabSpec) -> int:
    """The send buffer of a connection."""
    rate = lab.nic_bits_per_s / 8.0
    return int(max(LEAST_WINDOW_BYTES, rate * WINDOW_S) + WINDOW_DELAYS * rate * 2.0 * lab.delay_s)


def sysctl(lab: LabSpec) -> dict[str, str]:
    """The kernel's settings in every node.

    No new slow start after a pause, nothing remembered of earlier connections, and reno, which a namespace may always
    choose and whose windows only grow where nothing is lost.
    """
    window = window_bytes(lab)
    return {
        "net.ipv4.tcp_congestion_control": "reno",
        "net.ipv4.tcp_slow_start_after_idle": "0",
        "net.ipv4.tcp_no_metrics_save": "1",
        "net.ipv4.tcp_wmem": f"4096 {window} {window}",
        "net.ipv4.tcp_rmem": f"4096 {RECEIVE_BYTES // 2} {RECEIVE_BYTES}",
        "net.ipv4.conf.all.arp_ignore": "1",
        "net.ipv4.conf.all.arp_announce": "2",
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.default.rp_filter": "0",
        "net.ipv6.conf.all.disable_ipv6": "1",
        "net.ipv6.conf.default.disable_ipv6": "1",
    }


@dataclass(frozen=True)
class Nic:
    """One NIC: its node, its number there, its rate, and the leaf that it hangs on."""

    node: int
    nic: int
    bits_per_s: float
    leaf: int

    @property
    def device(self) -> str:
        """Its name in the node."""
        return f"nic{self.nic}"

    @property
    def port(self) -> str:
        """Its other end, in the switches' namespace."""
        return f"p{self.node}-{self.nic}"

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return f"{SUBNET}.{self.nic}.{self.node + 1}"


def uid_of(nic: int) -> int:
    """The user id of the ranks that use a NIC."""
    return FIRST_UID + nic


def node_space(node: int) -> str:
    """The namespace of a node."""
    return f"node{node}"


def nics_of(lab: LabSpec) -> list[Nic]:
    """Every NIC of a lab."""
    return [
        Nic(node, nic, lab.rate(node, nic), lab.leaf(node, nic))
        for node in range(lab.nodes)
        for nic in range(lab.nics_per_node)
    ]


def namespaces(lab: LabSpec) -> list[str]:
    """One for each node, and one for all switches."""
    return [*(node_space(node) for node in range(lab.nodes)), SWITCHES]


def cables(lab: LabSpec) -> list[str]:
    """`ip` lines, run outside the namespaces: the veth pairs between nodes and switches, where no relay makes them."""
    return [
        f"link add {nic.device} netns {node_space(nic.node)} mtu {lab.mtu_bytes} type veth "
        f"peer name {nic.port} mtu {lab.mtu_bytes} netns {SWITCHES}"
        for nic in nics_of(lab)
    ]


def node_lines(lab: LabSpec, node: int) -> list[str]:
    """`ip` lines inside a node: addresses, and a table for each NIC, so that what is sent from its address uses it."""
    lines = ["link set lo up"]
    for nic in nics_of(lab):
        if nic.node == node:
            table = 100 + nic.nic
            lines += [
                f"link set {nic.device} gso_max_size {GSO_BYTES} txqueuelen 10000",
                f"link set {nic.device} up",
                f"addr add {nic.address}/16 dev {nic.device}",
                f"rule add from {nic.address} lookup {table}",
                f"rule add uidrange {uid_of(nic.nic)}-{uid_of(nic.nic)} lookup {table}",
                f"route add {SUBNET}.0.0/16 dev {nic.device} src {nic.address} table {table}",
            ]
    return lines


def switch_lines(lab: LabSpec) -> list[str]:
    """`ip` lines inside the switches' namespace: a bridge for each leaf, ports, and uplinks to the spine."""
    spine = lab.leaves > 1
    bridges = [*(f"leaf{leaf}" for leaf in range(lab.leaves)), *(["spine"] if spine else [])]
    lines = [f"link add {name} mtu {lab.mtu_bytes} type bridge mcast_snooping 0" for name in bridges]
    for nic in nics_of(lab):
        lines.append(f"link set {nic.port} gso_max_size {GSO_BYTES} txqueuelen 10000 master leaf{nic.leaf}")
        lines.append(f"link set {nic.port} up")
    for leaf in range(lab.leaves if spine else 0):
        lines.append(f"link add up{leaf} mtu {lab.mtu_bytes} type veth peer name down{leaf} mtu {lab.mtu_bytes}")
        lines.append(f"link set up{leaf} gso_max_size {GSO_BYTES} txqueuelen 10000 master leaf{leaf}")
        lines.append(f"link set down{leaf} gso_max_size {GSO_BYTES} txqueuelen 10000 master spine")
        lines += [f"link set up{leaf} up", f"link set down{leaf} up"]
    return [*lines, *(f"link set {name} up" for name in bridges)]


def shaping(lab: LabSpec, *, netem: bool) -> Iterator[tuple[str, list[str]]]:
    """Namespace and its `tc` lines. netem: whether the kernel delays; else a relay does (`validate.fabric.delay`)."""
    queue = queue_bytes(lab)
    for node in range(lab.nodes):
        yield (
            node_space(node),
            [line for nic in nics_of(lab) if nic.node == node for line in limited(nic.device, nic.bits_per_s, queue)],
        )
    delay_s = lab.delay_s if netem else 0.0
    lines = [line for nic in nics_of(lab) for line in limited(nic.port, nic.bits_per_s, queue, delay_s)]
    for leaf in range(lab.leaves if lab.leaves > 1 else 0):
        lines += [line for end in ("up", "down") for line in limited(f"{end}{leaf}", lab.uplink_bits_per_s, queue)]
    yield SWITCHES, lines


def limited(device: str, bits_per_s: float, queue: int, delay_s: float = 0.0) -> list[str]:
    """The `tc` lines of a device: its rate, and before it two queues, of which acknowledgements have the first."""
    lines = [
        tbf(device, bits_per_s, queue),
        f"qdisc add dev {device} parent 1:1 handle 2: htb default {DATA}",
        *(
            f"class add dev {device} parent 2: classid 2:{which} htb rate {UNLIMITED} burst {HTB_BURST} "
            f"quantum {GSO_BYTES * 2} prio {which}"
            for which in (ACKS, DATA)
        ),
        f"filter add dev {device} parent 2: protocol ip prio 1 u32 match ip protocol 6 0xff "
        f"match u16 0 {~(ACK_BYTES - 1) & 0xFFFF:#06x} at 2 flowid 2:{ACKS}",
    ]
    for which in (ACKS, DATA):
        kind = f"netem delay {delay_s * 1e6:.0f}us limit 100000" if delay_s else f"bfifo limit {queue}"
        lines.append(f"qdisc add dev {device} parent 2:{which} handle {which}0: {kind}")
    return lines


def queue_bytes(lab: LabSpec) -> int:
    """What a queue holds: twice what all connections may have on their way, in each of two exchanges at once.

    So nothing is dropped: the network is lossless, as an InfiniBand or RoCE fabric with flow control is.
    """
    return 2 * 2 * window_bytes(lab) * lab.ranks**2


def tbf(device: str, bits_per_s: float, queue: int) -> str:
    """The `tc` line that limits a device."""
    burst = max(int(bits_per_s / 8 * BURST_S), LEAST_BURST_BYTES)
    return f"qdisc add dev {device} root handle 1: tbf rate {bits_per_s:.0f}bit burst {burst} limit {queue}"


def settings(lab: LabSpec) -> dict[str, object]:
    """What of the network is not in the lab file, for the record."""
    return {
        "sysctl": sysctl(lab),
        "tc": sorted({"; ".join(limited("NIC", nic.bits_per_s, queue_bytes(lab))) for nic in nics_of(lab)}),
        "gso_max_size": GSO_BYTES,
    }
