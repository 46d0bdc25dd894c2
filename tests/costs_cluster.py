"""The H200 cluster that the cost tests price on."""

from __future__ import annotations

from importlib import resources

import yaml

from moesim.spec.cluster import ClusterSpec


def h200(nodes: int) -> ClusterSpec:
    """The bundled H200 preset with a number of nodes."""
    text = (resources.files("moesim.spec") / "clusters" / "h200_sxm.yaml").read_text(encoding="utf-8")
    return ClusterSpec.model_validate({**yaml.safe_load(text), "nodes": nodes})
