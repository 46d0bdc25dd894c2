"""The first process of a lab's own process, network and mount namespaces: builds the network, runs the ranks, watches.

`validate.fabric.run` starts it under `unshare --net --pid --mount --kill-child`. It is process 1 there and its named
namespaces lie on a file system of its own, so that when it ends, killed or not, the kernel ends all ranks and takes
apart every namespace, veth, bridge and queue; nothing can be left behind. A job comes as JSON on stdin; lines of JSON
go out on stdout: progress, then a result or an error.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import CheckFailed, MissingPart, MoesimError
from validate.fabric import delay as fabric_delay
from validate.fabric import net as fabric_net
from validate.fabric.rank import MEETING, Case, Plans, Shared, be_rank, make_plans
from validate.fabric.spec import WHERE, LabSpec

CLONE_NEWNET = 0x40000000
POLL_S = 0.02
# After a rank fails, how long the others may take to fail too, so that the cause can be told from its echoes.
GRACE_S = 1.0
# While ranks move, a sign of life at least this often.
ALIVE_EVERY_S = 1.0
# What ranks may take to find each other; nothing else of a run is that slow on a busy machine.
MEETING_S = 60.0
HOME = Path("/run/moesim-lab")
NETNS = Path("/run/netns")


@dataclass(frozen=True)
class CellJob:
    """A lab's network and what to exchange on it."""

    lab: LabSpec
    cases: tuple[Case, ...]
    stall_s: float

    @classmethod
    def read(cls, text: str) -> CellJob:
        """The job that `fabric_run` wrote."""
        given = json.loads(text)
        cases = tuple(Case(tuple(one["patterns"]), one["scheme"], one["bytes_per_rank"]) for one in given["cases"])
        return cls(LabSpec.read(given["lab"], where="the lab"), cases, float(given["stall_s"]))


def tell(kind: str, what: object) -> None:
    """One line to whoever started this."""
    sys.stdout.write(json.dumps({kind: what}) + "\n")
    sys.stdout.flush()


def enter(namespace: str) -> None:
    """Move this process into a named network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(NETNS / namespace, os.O_RDONLY)
    try:
        if libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(handle)


def batch(tool: str, lines: Sequence[str], namespace: str | None = None) -> None:
    """Run lines of `ip` or `tc`. Raises MissingPart where the kernel lacks what a line asks for."""
    line = [tool, *(["-n", namespace] if namespace else []), "-batch", "-"]
    done = subprocess.run(line, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise MissingPart(
            f"`{tool}` cannot build the network ({said[0]})", where=WHERE,
            mend="run as root on a kernel with network namespaces, veth, bridge, policy routing, sch_tbf, sch_htb and "
            "cls_u32",
        )  # fmt: skip


def has_netem() -> bool:
    """Whether the kernel knows `netem`."""
    done = subprocess.run(
        ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1us"], capture_output=True, check=False
    )
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], capture_output=True, check=False)
    return done.returncode == 0


def private_run() -> None:
    """A file system of our own for the names of namespaces and for what the ranks leave."""
    done = subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingPart(f"cannot mount a tmpfs ({done.stderr.strip()})", where=WHERE, mend="run as root")
    HOME.mkdir()
    HOME.chmod(0o777)  # ranks are not root
    (HOME / MEETING).touch()
    (HOME / MEETING).chmod(0o666)
    NETNS.mkdir()


def build(lab: LabSpec) -> str:
    """The network of a lab; returns how it delays: none, netem or relay."""
    batch("ip", [f"netns add {name}" for name in fabric_net.namespaces(lab)])
    how = "none" if not lab.delay_s else "netem" if has_netem() else "relay"
    for name in fabric_net.namespaces(lab):
        if mp_child(_settle, lab, name):
            raise MissingPart("cannot set the kernel's network settings", where=WHERE, mend="run as root")
    if how == "relay":
        _start_relay(lab)
    else:
        batch("ip", fabric_net.cables(lab))
    batch("ip", fabric_net.switch_lines(lab), fabric_net.SWITCHES)
    for node in range(lab.nodes):
        batch("ip", fabric_net.node_lines(lab, node), fabric_net.node_space(node))
    for name, lines in fabric_net.shaping(lab, netem=how == "netem"):
        batch("tc", lines, name)
    return how


def mp_child(work: Any, *arguments: Any) -> int:
    """Run `work` in a child, which may move to another namespace; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        except BaseException as error:
            sys.stderr.write(f"{error}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _settle(lab: LabSpec, namespace: str) -> None:
    enter(namespace)
    for name, value in fabric_net.sysctl(lab).items():
        path = Path("/proc/sys") / name.replace(".", "/")
        if namespace == fabric_net.SWITCHES and ".tcp_" in name:
            continue
        path.write_text(value, encoding="ascii")


def _start_relay(lab: LabSpec) -> None:
    """The process that carries packets; it opens the devices before this returns."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            cables = fabric_delay.open_cables(lab, enter)
            os.write(write, b"1")
            fabric_delay.carry(cables, lab.delay_s)
        except BaseException as error:
            sys.stderr.write(f"the relay: {error}\n")
        os._exit(1)
    os.close(write)
    ready = os.read(read, 1)
    os.close(read)
    if not ready:
        raise MissingPart(
            "the kernel has no netem, and no TAP devices either", where=WHERE,
            mend="load sch_netem or tun, or leave delay_s out",
        )  # fmt: skip


class Watch:
    """The ranks as processes: which have ended and how, and whether any moves."""

    def __init__(self, lab: LabSpec, shared: Shared, stall_s: float) -> None:
        self.lab, self.shared, self.stall_s = lab, shared, stall_s
        self.running: dict[int, int] = {}  # process -> rank
        self.codes: dict[int, int] = {}

    def start(self, cases: Sequence[Case], plans: Plans) -> None:
        """Fork every rank; each goes into its node's namespace."""
        for rank in range(self.lab.ranks):
            pid = os.fork()
            if pid == 0:
                be_rank(self.lab, cases, plans, rank, self.shared, HOME, enter)
                os._exit(0)
            self.running[pid] = rank

    def reap(self) -> None:
        """Note which ranks have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.running:
                self.codes[self.running.pop(pid)] = os.waitstatus_to_exitcode(status)

    def run(self) -> None:
        """Until all ranks are done. Raises CheckFailed that names rank, node and reason."""
        moved, seen, said = time.monotonic(), list(self.shared.steps), ""
        pulled, told = self.lab.dead_link is None, moved
        while self.running:
            time.sleep(POLL_S)
            self.reap()
            if any(self.codes.values()):
                until = time.monotonic() + GRACE_S
                while self.running and time.monotonic() < until:
                    time.sleep(POLL_S)
                    self.reap()
                raise self.cause()
            steps = list(self.shared.steps)
            if steps != seen:
                moved, seen = time.monotonic(), steps
                if moved - told > ALIVE_EVERY_S:
                    told = moved
                    tell("alive", min(steps))
            if not pulled and self.shared.timed.value and self._pull():
                pulled = True
            label = self.shared.label(min(steps))
            if label != said:
                said = label
                tell("progress", label)
            if time.monotonic() - moved > (self.stall_s if min(steps) else max(self.stall_s, MEETING_S)):
                raise self.hung(steps)

    def _pull(self) -> bool:
        """Set the dead link down once its time has come."""
        dead = self.lab.dead_link
        assert dead is not None
        if time.perf_counter() < self.shared.start.value + dead.after_s:
            return False
        batch("ip", [f"link set nic{dead.nic} down"], fabric_net.node_space(dead.node))
        return True

    def down(self) -> str:
        """The NICs that are down, in words; empty where none is."""
        found = []
        for node in range(self.lab.nodes):
            said = subprocess.run(
                ["ip", "-j", "-n", fabric_net.node_space(node), "link", "show"], capture_output=True, check=False
            ).stdout
            for device in json.loads(said or b"[]"):
                name = str(device.get("ifname", ""))
                if name.startswith("nic") and not ("UP" in device["flags"] and "LOWER_UP" in device["flags"]):
                    number = int(name.removeprefix("nic"))
                    ranks = [
                        str(rank) for rank in range(self.lab.ranks)
                        if rank // self.lab.ranks_per_node == node and self.lab.nic(rank) == number
                    ]  # fmt: skip
                    found.append(f"{name} of node {node} is down (rank {', '.join(ranks)})")
        return "; ".join(found)

    def hung(self, steps: Sequence[int]) -> CheckFailed:
        """The error of a run without progress."""
        rank = int(np.argmin(steps))
        where = f"rank {rank} (node {rank // self.lab.ranks_per_node})"
        what = self.down() or f"{where} hangs"
        return CheckFailed(
            f"{what}: {self.stall_s:g} s without progress while {self.shared.label(min(steps))}", where=WHERE,
            mend="nothing was recorded; raise --stall-limit if the machine is only slow",
        )  # fmt: skip

    def cause(self) -> CheckFailed:
        """Why a run ended in which a rank failed: a killed one, one that ended itself (SIGABRT), one that said why."""
        for rank, code in sorted(
            self.codes.items(), key=lambda item: (item[1] > 0, item[1] == -signal.SIGABRT, item[0])
        ):
            if code == 0:
                continue
            who = f"rank {rank} (node {rank // self.lab.ranks_per_node})"
            doing = self.shared.label(self.shared.steps[rank])
            if code < 0:
                what = f"{who} was killed by {signal.Signals(-code).name} while {doing}"
            else:
                path = HOME / f"{rank}.error"
                said = path.read_text(encoding="utf-8") if path.is_file() else "it said nothing"
                down = self.down()
                what = f"{down}: {who} failed while {doing}" if down else f"{who} failed while {doing}: {said[:300]}"
            return CheckFailed(what, where=WHERE, mend="nothing was recorded")
        raise AssertionError("no rank failed")


# Of the kernel's counters of TCP, those that tell of loss or late timers (/proc/net/netstat and /proc/net/snmp).
COUNTERS = ("RetransSegs", "TCPTimeouts", "TCPLossProbes", "TCPSpuriousRTOs", "DelayedACKs", "TCPRcvCollapsed")


def counters(lab: LabSpec) -> dict[str, int]:
    """Counters of TCP over all nodes, packets that queues have dropped, and those that went as acknowledgements."""
    found = dict.fromkeys(COUNTERS, 0)
    for node in range(lab.nodes):
        line = ["ip", "netns", "exec", fabric_net.node_space(node), "cat", "/proc/net/netstat", "/proc/net/snmp"]
        rows = subprocess.run(line, capture_output=True, text=True, check=False).stdout.splitlines()
        for names, values in zip(rows[::2], rows[1::2], strict=False):
            for name, value in zip(names.split()[1:], values.split()[1:], strict=False):
                if name in found:
                    found[name] += int(value)
    dropped = acks = 0
    for name in fabric_net.namespaces(lab):
        said = subprocess.run(["tc", "-j", "-s", "-n", name, "qdisc"], capture_output=True, check=False).stdout
        queues = json.loads(said or b"[]")
        dropped += sum(int(one.get("drops", 0)) for one in queues)
        acks += sum(int(one["packets"]) for one in queues if one["handle"] == f"{fabric_net.ACKS}0:")
    return found | {"dropped": dropped, "acknowledgements": acks}


def run(job: CellJob) -> dict[str, Any]:
    """Build, run and measure. Raises MissingPart, CheckFailed."""
    private_run()
    tell("progress", "building the network")
    plans = make_plans(job.lab, job.cases)
    how = build(job.lab)
    import torch
    import torch.distributed  # once, before the ranks are forked

    torch.set_num_threads(1)
    shared = Shared(mp.get_context("fork"), job.lab, job.cases)
    watch = Watch(job.lab, shared, job.stall_s)
    watch.start(job.cases, plans)
    watch.run()
    seconds, stages = shared.read()
    return {
        "seconds": seconds.tolist(), "first_stage": stages.tolist(), "delay": how, "busy": shared.busy(),
        "by_rank": shared.by_rank().tolist(),
        "counters": counters(job.lab),
    }  # fmt: skip


def main() -> int:
    """Be process 1 of a lab."""
    try:
        tell("result", run(CellJob.read(sys.stdin.read())))
    except MoesimError as error:
        tell("error", {"kind": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend})
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # and with it every rank that is left
