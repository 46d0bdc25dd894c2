"""What a machine is made of, for the manifest of a bundle: cards, driver, network, versions; nothing that names it."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import subprocess
from pathlib import Path
from typing import Any

from moesim import __version__
from profiles.device import conditions, device_name, readings

TOPOLOGY_S = 30.0
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
    if shutil.which("nvidia-smi") is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=TOPOLOGY_S, check=False
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
