"""The ranks that a run has, and how they go through its phases: started for each, or joined once under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moesim.files import write_json
from profiles.device import device_name
from profiles.groups import find_hosts
from validate.hardware import ranks as processes
from validate.hardware.group import Group, need_torch
from validate.hardware.join import NEVER
from validate.training.job import WHERE, TrainingJob
from validate.training.predict import Machine
from validate.training.rank import RESULT_FILE, phase, route
from validate.training.ways import Made

Say = Callable[[str], None]
TOLD = processes.Told(WHERE, "use fewer sequences of fewer tokens, or layouts of fewer ranks")


class Company(Protocol):
    """The ranks of a run. device: what one of them computes on."""

    machine: Machine
    device: Any

    def phase(self, content: dict[str, Any]) -> Any:
        """Run a phase on the first `ranks` ranks, see `rank.phase`; what rank 0 found. Raises CheckFailed."""
        ...

    def at(self, label: str) -> None:
        """Say what is done between phases."""
        ...


def machine_of(device: Any, hosts: tuple[int, ...]) -> Machine:
    """What a run's cluster files say of the machine, told from this rank's device."""
    torch = need_torch()
    name = device_name(torch, str(device))
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        return Machine(name, float(told.total_memory), hosts, int(told.multi_processor_count))
    return Machine(name, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), hosts)


class Started:
    """Ranks that the command starts on this machine, for each phase anew, as many as it needs."""

    def __init__(self, job: TrainingJob, say: Say) -> None:
        torch = need_torch()
        torch.set_num_threads(1)
        self.job, self._say = job, say
        self.device = torch.device("cpu") if job.backend == "gloo" else torch.device("cuda", 0)
        self.machine = machine_of(self.device, (0,) * max(layout.ranks for layout in job.layouts))

    def phase(self, content: dict[str, Any]) -> Any:
        """As `Company.phase`; a batch that is routed on a CPU needs no process of its own."""
        if content["phase"] == "route" and self.job.backend == "gloo":
            return route(self.job, Made(0))
        return started_ranks(self.job, content, self._say)

    def at(self, label: str) -> None:
        """Say it."""
        self._say(label)


class Joined:
    """Ranks that something else started; rank 0 tells the others each phase over the store that they share."""

    def __init__(self, job: TrainingJob, group: Group, store: Any, say: Say) -> None:
        torch = need_torch()
        self.job, self.device, self._say = job, group.device, say
        self._group, self._store, self._number = group, store, 0
        self._made = Made(group.rank, group.beat, group.device, group.ranks)
        name = device_name(torch, str(group.device))
        hosts = group.wait(lambda: find_hosts(torch, group.rank, group.ranks, group.device, name, where=WHERE))
        self.machine = machine_of(group.device, hosts)

    def phase(self, content: dict[str, Any]) -> Any:
        """As `Company.phase`; on rank 0."""
        self._tell(content)
        return self._run(content)

    def at(self, label: str) -> None:
        """Say it, and count it as progress."""
        self._group.beat.at(label)
        self._say(label)

    def follow(self) -> None:
        """Be another rank than the first: run what it tells until it says that there is nothing more."""
        beat = self._group.beat
        while True:
            beat.at("waiting for rank 0 to say what comes next")
            beat.waiting = True
            key = self._next()
            self._store.wait([key], NEVER)
            content = json.loads(self._store.get(key))
            beat.waiting = False
            if content is None:
                return
            self._run(content)

    def dismiss(self) -> None:
        """Tell the other ranks that there is nothing more; on rank 0."""
        self._tell(None)

    def _run(self, content: dict[str, Any]) -> Any:
        return phase(content, self.job, self._made, self.machine.hosts)

    def _tell(self, content: dict[str, Any] | None) -> None:
        self._store.set(self._next(), json.dumps(content))

    def _next(self) -> str:
        self._number += 1
        return f"phase{self._number}"


def started_ranks(job: TrainingJob, content: dict[str, Any], say: Say) -> Any:
    """Run local ranks on one phase of the job; what rank 0 found. Raises CheckFailed that names a rank that failed."""
    folder = Path(tempfile.mkdtemp(prefix="moesim-ranks-"))
    last = ""

    def tell(label: str) -> None:
        nonlocal last
        doing = label.partition(":")[0]
        if doing != last:
            say(label)
            last = doing

    try:
        write_json(folder / "job.json", {"job": job.model_dump(mode="json"), **content})
        lines = processes.commands(folder / "job.json", folder, int(content["ranks"]), "validate.training.rank")
        silence_s = processes.silence_of(job.backend)
        processes.launch(lines, folder, stall_limit_s=job.stall_s, tell=tell, told=TOLD, silence_s=silence_s)
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
