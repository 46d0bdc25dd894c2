"""`moesim profile topology`: how the GPUs of this node, or of a saved matrix, reach each other and the NICs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Option, echo


def topology(
    saved: Annotated[Path | None, Option("--from", help="A saved `nvidia-smi topo -m`; default: run it here.")] = None,
    out: Annotated[
        Path | None, Option("--out", help="Cluster file that `node` is written into; its other keys stay.")
    ] = None,
    system: Annotated[str | None, Option("--system", help="For a new --out: the preset to start from.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Tell NVLink domains, the NIC of each GPU, what is shared and what is far, from nvidia-smi topo -m."""
    from profiles.importers import topo_cluster
    from profiles.importers.printed import read_printed
    from profiles.importers.topo import read_topology
    from profiles.machine import TOPOLOGY_COMMAND, driver_topology

    source = str(saved) if saved is not None else " ".join(TOPOLOGY_COMMAND)
    text = read_printed(saved, "matrix of nvidia-smi") if saved is not None else driver_topology()
    found = read_topology(text, source)
    if out is not None:
        named = saved.name if saved is not None else source
        topo_cluster.write_cluster(found, out, system, f"from {named}")
    if as_json:
        echo(json.dumps({**topo_cluster.as_json(found), "out": None if out is None else str(out)}))
        return
    echo("\n".join(topo_cluster.in_words(found)))
    if out is not None:
        echo(f"wrote node into {out}", err=True)
