"""What an engine's map leaves out: of which model it is, and over how many ranks its slots lie."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import BadInput
from moesim.spec.model import ModelSpec


@dataclass(frozen=True)
class MapFrame:
    """The model and the ranks that a map is read for.

    layer_ids: absolute indices of the MoE layers, in order. absolute_layers: all layers of the model, dense ones too.
    ranks: None where they are not known; then only vllm-ascend's map, which lists its devices, can be read.
    mtp_layers: multi-token-prediction layers beside the model's own, which a map may hold rows for.
    """

    experts: int
    layer_ids: tuple[int, ...]
    absolute_layers: int
    ranks: int | None = None
    mtp_layers: int = 0

    @classmethod
    def of(cls, model: ModelSpec, ranks: int | None) -> MapFrame:
        """The frame of a model on `ranks` expert-parallel ranks."""
        return cls(
            experts=model.moe.experts,
            layer_ids=tuple(model.moe.layer_ids),
            absolute_layers=model.layers,
            ranks=ranks,
            mtp_layers=model.mtp_layers,
        )

    def known_ranks(self, engine: str, where: str) -> int:
        """The ranks. Raises BadInput where they are not known and the engine's map does not tell them."""
        if self.ranks is None:
            raise BadInput(
                f"a map of {engine} does not say over how many ranks its slots lie",
                where=where,
                mend="give the expert-parallel ranks with --gpus",
            )
        if self.ranks < 1:
            raise BadInput(f"{self.ranks} ranks", where="--gpus", mend="give a number above 0")
        return self.ranks
