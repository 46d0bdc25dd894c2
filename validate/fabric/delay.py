"""A cable that takes time, where the kernel has no `netem`: two TAP devices and a process that carries packets between.

What leaves a node waits for the lab's delay; what comes to it goes on at once, so every way between two nodes has the
delay once, as `netem` on the switches' ports has it. Packets of several segments pass whole (a virtio-net header
describes them, linux/virtio_net.h), so that the relay costs little: about 1.5 thousand packets a second at 200 Mbit/s.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence

from validate.fabric.net import SWITCHES, nics_of, node_space
from validate.fabric.spec import LabSpec

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
PACKET_BYTES = 70_000
# Packets taken from one device before the others have their turn.
TURN = 64
# A device that cannot take a packet at this moment is tried again after this long.
AGAIN_S = 2e-4


def open_tap(name: str) -> int:
    """A TAP device of this name in the caller's namespace; it lasts as long as its descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return tap


def open_cables(lab: LabSpec, enter: Callable[[str], None]) -> list[tuple[int, int]]:
    """Both ends of every NIC's cable: descriptors in the node and among the switches. enter: goes into a namespace."""
    found = []
    for nic in nics_of(lab):
        enter(node_space(nic.node))
        inner = open_tap(nic.device)
        enter(SWITCHES)
        found.append((inner, open_tap(nic.port)))
    return found


def carry(cables: Sequence[tuple[int, int]], delay_s: float) -> None:
    """Carry packets for ever: from a node after the delay, to a node at once."""
    poll = select.epoll()
    out_of, into = dict(cables), {outer: inner for inner, outer in cables}
    for descriptor in (*out_of, *into):
        poll.register(descriptor, select.EPOLLIN)
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        _send_due(waiting)
        left_s = waiting[0][0] - time.monotonic() if waiting else None
        # epoll counts whole milliseconds: the last part of a wait is spent turning round.
        ready = poll.poll(None if left_s is None else max(left_s - 1e-3, 0.0))
        now = time.monotonic()
        for descriptor, _ in ready:
            target = out_of.get(descriptor, into.get(descriptor, -1))
            for packet in _packets(descriptor):
                if descriptor in out_of:
                    waiting.append((now + delay_s, target, packet))
                else:
                    _write(target, packet)


def _packets(descriptor: int) -> list[bytes]:
    found = []
    for _ in range(TURN):
        try:
            found.append(os.read(descriptor, PACKET_BYTES))
        except BlockingIOError:
            break
    return found


def _send_due(waiting: deque[tuple[float, int, bytes]]) -> None:
    now = time.monotonic()
    while waiting and waiting[0][0] <= now:
        _, target, packet = waiting.popleft()
        _write(target, packet)


def _write(target: int, packet: bytes) -> None:
    while True:
        try:
            os.write(target, packet)
            return
        except BlockingIOError:
            time.sleep(AGAIN_S)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENETDOWN):  # the device is down: a pulled cable loses what it carries
                return
            raise
