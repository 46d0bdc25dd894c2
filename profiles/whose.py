"""Whose measurements a profile holds: its GPU against the cluster's, and which shipped profile `default` means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.presets import load_cluster, near_preset, presets
from moesim.spec.scenario import ClusterChoice
from profiles.store import Profile, open_profile, shipped_systems

# The word of a device's name that tells the chip: H100 of "NVIDIA H100 80GB HBM3", A100 of "NVIDIA A100-SXM4-80GB".
_CHIP = re.compile(r"\b(?:(?:GB|GH|B|H|A|L|V|T)\d{1,4}S?|MI\d{2,3}[A-Z]?)\b")
_MAKERS = ("NVIDIA", "TESLA", "AMD INSTINCT")
UNKNOWN = "unknown"
NEAR = 0.8  # likeness from which another name is taken for a slip of the pen
OTHER_LINK = 1.1  # link rates further apart than this are other links


def chip(device: str) -> str:
    """The chip that a device's name tells, in capitals; empty for a processor's name and for none."""
    name = device.strip().upper()
    found = _CHIP.search(name)
    if found:
        return found[0]
    return name if name.startswith(_MAKERS) else ""


def contradict(one: str, other: str) -> bool:
    """Whether two devices' names tell different chips; a name that tells none contradicts nothing."""
    own, more = chip(one), chip(other)
    if not own or not more or own == more:
        return False
    short, long = sorted((own, more), key=len)  # "NVIDIA RTX PRO 6000" with and without its edition
    return not (short.startswith(_MAKERS) and long.startswith(short))


def preset_of(system: str) -> ClusterSpec | None:
    """The preset of this name; None where there is none."""
    return load_cluster(ClusterChoice(system=system)) if system in presets() else None


def preset_with(device: str) -> str:
    """The preset whose GPU is of the device's chip, the shortest name first; empty where there is none."""
    wanted = chip(device)
    named = [name for name in presets() if wanted and chip(load_cluster(ClusterChoice(system=name)).gpu.name) == wanted]
    return min(named, key=lambda name: (name.split("_")[0].upper() != wanted, len(name)), default="")


@dataclass(frozen=True)
class System:
    """What `--system` says: the name that rows carry, and the GPU; empty where no preset or cluster file tells it."""

    name: str
    gpu: str = ""

    def told(self) -> dict[str, str]:
        """For profile.json."""
        return {"system": self.name, **({"gpu": self.gpu} if self.gpu else {})}

    def refuse_other(self, device: str, place: str) -> None:
        """Raises BadInput where `device`, as what was read names it, is another chip than the system's."""
        if contradict(device, self.gpu):
            near = preset_with(device)
            raise BadInput(
                f"measured on {device}, but {self.name} has {self.gpu}",
                where=place,
                mend=f"give --system {near}" if near else "give --system the name of what ran, or its cluster file",
            )


def asked_system(text: str) -> System:
    """The system that `--system` means: a preset, the path of a cluster file, or a name that is near to no preset's.

    Raises BadInput where it is blank, a slip of the pen, or a cluster file that cannot be read.
    """
    name = text.strip()
    if not name:
        raise BadInput("the system has no name", where="--system", mend="name it as scenarios do: h200_sxm")
    if name.endswith((".yaml", ".yml")):
        cluster = load_cluster(Path(name))
        return System(cluster.name, cluster.gpu.name)
    preset = preset_of(name)
    if preset is not None:
        return System(name, preset.gpu.name)
    near = near_preset(name, NEAR)
    if near:
        raise BadInput(
            f"unknown system {name!r}",
            where="--system",
            mend=f"did you mean {near}? For a system of your own give the path of its cluster file",
        )
    return System(name)


def open_for(name: str, cluster: ClusterSpec) -> Profile:
    """A profile by name: `default` is the one shipped for the cluster's GPU, anything else a folder.

    Raises BadInput where there is none, and where its rows or its system are of another GPU.
    """
    if name != "default":
        profile = open_profile(name, "")
        _refuse_other_gpu(profile, name, cluster)
        return profile
    system = shipped_for(cluster.gpu.name)
    if system:
        return open_profile("default", system)
    shipped = ", ".join(f"{name}, {gpu_of_system(name)}" for name in shipped_systems()) or "none"
    preset = preset_with(cluster.gpu.name)
    mend = (
        f"run `moesim profile import aiconfigurator --system {preset} --engine sglang --out DIR` "
        "(pip install '.[silicon]') and name DIR"
        if preset
        else "measure it with `moesim profile kernels --device cuda`"
    )
    raise BadInput(
        f"no profile ships for {cluster.gpu.name} (shipped: {shipped})",
        where="cost.profiles",
        mend=f"{mend}, or set cost.source: roofline",
    )


def shipped_for(gpu: str) -> str:
    """The system of the profile that ships for a GPU of this name; empty where none does."""
    wanted = chip(gpu)
    return next((name for name in shipped_systems() if wanted and chip(gpu_of_system(name)) == wanted), "")


def gpu_of_system(system: str) -> str:
    """The GPU of a preset; empty where no preset has this name."""
    preset = preset_of(system)
    return preset.gpu.name if preset is not None else ""


def devices_of(profile: Profile) -> list[str]:
    """The devices that the profile's rows were measured on, as the rows name them; unknown ones left out."""
    return [device for device in profile.devices if device not in ("", UNKNOWN)]


def _system_of(profile: Profile) -> System:
    """The system that the profile was imported for, with its GPU: as it tells, or as the preset does."""
    name = str(profile.description.get("system", ""))
    return System(name, str(profile.description.get("gpu", "") or gpu_of_system(name)))


def _refuse_other_gpu(profile: Profile, name: str, cluster: ClusterSpec) -> None:
    system = _system_of(profile)
    told = [(device, f"measured on {device}") for device in devices_of(profile)]
    told.append((system.gpu, f"of {system.name}, which has {system.gpu}"))
    for gpu, words in told:
        if contradict(gpu, cluster.gpu.name):
            raise BadInput(
                f"profile {name} is {words}, but the cluster has {cluster.gpu.name}",
                where="cost.profiles",
                mend=f"name a profile imported with --system {preset_with(cluster.gpu.name) or 'CLUSTER.yaml'}, "
                "or set cost.source: roofline",
            )


def notes_on(profile: Profile, name: str, cluster: ClusterSpec) -> list[str]:
    """What a reader of prices must know of this profile on this cluster, a sentence each."""
    found = []
    system, devices = _system_of(profile), devices_of(profile)
    if not any(chip(device) for device in devices) and (devices or not chip(system.gpu)):
        ran = f"was measured on {', '.join(devices)}" if devices else "does not tell which GPU it was measured on"
        found.append(f"Profile {name} {ran}: its times are taken for those of {cluster.gpu.name}.")
    preset = preset_of(system.name)
    if preset is not None and any(family in profile.families() for family in ("collective", "exchange")):
        for words, own, other in (
            ("NVLink", cluster.nvlink_bytes_per_s, preset.nvlink_bytes_per_s),
            ("NIC", cluster.nic_bytes_per_s if cluster.nodes > 1 else preset.nic_bytes_per_s, preset.nic_bytes_per_s),
        ):
            if max(own, other) > min(own, other) * OTHER_LINK:
                found.append(
                    f"Profile {name} holds exchanges measured over the links of {system.name}, and they are priced as "
                    f"measured there: {words} {other / 1e9:.3g} GB/s, the cluster's {own / 1e9:.3g} GB/s."
                )
    return found


def unasked(profile: Profile, name: str) -> str:
    """The note on a profile that answered no price."""
    return f"Profile {name} answered no price (it holds {', '.join(profile.families()) or 'no table'})."
