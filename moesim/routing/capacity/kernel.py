"""Rows that a grouped kernel adds to each expert's tokens in dropless routing."""

from __future__ import annotations

import numpy as np

from moesim.routing.gates.routed import Floats

# DeepGEMM's contiguous layout starts each expert at a multiple of its tile of rows
# (deep_gemm, get_m_alignment_for_contiguous_layout); its masked layout (low-latency) computes whole tiles but keeps no
# extra rows, and the fused Triton kernel sorts ids in blocks whose size follows from the batch.
CONTIGUOUS_ROWS = 128


def aligned_rows(slot_tokens: Floats, alignment: int = CONTIGUOUS_ROWS) -> Floats:
    """Rows of each local expert [...] after padding to a multiple of `alignment`; an expert without tokens has none."""
    return np.asarray(np.ceil(slot_tokens / alignment - 1e-9) * alignment)
