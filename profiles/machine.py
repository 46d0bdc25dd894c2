"""What a machine is made of, for the manifest of a bundle: cards, driver, network, versions; nothing that names it."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import subprocess
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.errors import MissingPart
from profiles.device import conditions, device_name, readings

TOPOLOGY_COMMAND = ("nvidia-smi", "topo", "-m")
TOPOLOGY_LIMIT_S = 60.0  # the driver answers in about a second; without persistence it first wakes every GPU
SYSTEM = Path("/sys/class")


def describe(torch: Any, device: str) -> dict[str, Any]:
    """Device, how many, driver, versions and network cards of this host."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "moesim": __version__,
        "device": device_name(torch, device),
        "conditions": conditions(torch, device),
        "network_cards": network_cards(),
    }
    if device.startswith("cuda"):
        found |= {"gpus": torch.cuda.device_count(), "readings": readings(device)}
    return found


def network_cards(folder: Path = SYSTEM) -> list[dict[str, str]]:
    """InfiniBand and RoCE ports with their rates, and Ethernet cards with theirs; as the kernel tells them."""
    found = []
    for port in sorted(folder.glob("infiniband/*/ports/*")):
        rate = _text(port / "rate")
        if rate:
            found.append({"card": port.parts[-3], "port": port.name, "rate": rate})
    for card in sorted(folder.glob("net/*")):
        speed = _text(card / "speed")
        if (card / "device").exists() and speed.isdecimal():
            found.append({"card": card.name, "rate": f"{speed} Mb/sec"})
    return found


def topology() -> str:
    """What `nvidia-smi topo -m` says; empty where there is none."""
    with contextlib.suppress(MissingPart):
        return driver_topology()
    return ""


def driver_topology() -> str:
    """What `nvidia-smi topo -m` prints here. Raises MissingPart where it is not there or fails."""
    mend = "run `nvidia-smi topo -m > topo.txt` where the GPUs are, then give --from topo.txt"
    if shutil.which(TOPOLOGY_COMMAND[0]) is None:
        raise MissingPart("nvidia-smi is not on this machine", mend=mend)
    try:
        done = subprocess.run(TOPOLOGY_COMMAND, capture_output=True, timeout=TOPOLOGY_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingPart(f"nvidia-smi topo -m did not run ({type(error).__name__})", mend=mend) from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", errors="replace").strip().split("\n")[0][:100]
        raise MissingPart(f"nvidia-smi topo -m failed ({said or done.returncode})", mend=mend)
    return done.stdout.decode("utf-8", errors="replace")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
