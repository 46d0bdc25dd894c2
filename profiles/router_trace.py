"""A routing trace of a router that was really trained: a small byte-level MoE language model on the standard library.

`python -m profiles.router_trace --out trace.parquet` trains on the Python files that come with the interpreter (some
minutes on one CPU thread), then routes files that it never saw and writes the experts of each token, layer by layer, as
the columns step, request_id, token_id, layer_id, experts. Same seed, same Python and torch: same trace. Needs torch.

The model is a plain pre-norm transformer whose every feed-forward part is a mixture of experts: softmax router, top-k
with weights scaled to sum 1, no capacity, and the load-balance loss of Switch Transformers (Fedus, Zoph and Shazeer,
arXiv:2101.03961, equation 4) over all k picks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, MissingPart, MoesimError
from moesim.files import whole_file, write_json

Ids = NDArray[np.int64]
BYTES = 256
LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "__pycache__")
"""Folders of the standard library that are no part of it, or mostly data."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, of its training and of the trace; sequence: tokens (bytes) of one request."""

    layers: int = 5
    experts: int = 64
    top_k: int = 4
    width: int = 128
    heads: int = 4
    expert_width: int = 128
    sequence: int = 128
    batch: int = 24
    steps: int = 900
    learning_rate: float = 2e-3
    balance_loss: float = 0.01
    traced_requests: int = 256
    requests_per_step: int = 4
    seed: int = 0


def python_text(root: Path, seed: int) -> tuple[bytes, bytes, list[str]]:
    """Bytes of the Python files under `root` to train on, bytes of one file in ten to trace, and the names of those.

    Raises BadInput where there are no files.
    """
    files = sorted(
        path.relative_to(root) for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(LEFT_OUT)
    )
    if len(files) < 10:
        raise BadInput(f"{len(files)} Python files are too few", where=str(root), mend="give a folder of sources")
    order = np.random.default_rng(seed).permutation(len(files))
    held = [files[index] for index in order[: len(files) // 10]]
    shown = [files[index] for index in order[len(files) // 10 :]]
    whole = [b"\n".join((root / path).read_bytes() for path in part) for part in (shown, held)]
    return whole[0], whole[1], [path.as_posix() for path in held]


def sequences(text: bytes, length: int, count: int, rng: np.random.Generator) -> Ids:
    """`count` pieces of the text at random places: int64 [count, length]."""
    array = np.frombuffer(text, dtype=np.uint8)
    first = rng.integers(0, len(array) - length, count)
    return np.asarray(array[first[:, None] + np.arange(length)], dtype=np.int64)


def new_weights(settings: Settings) -> dict[str, Any]:
    """Random weights of the model, by name, as torch tensors that take gradients."""
    import torch

    torch.manual_seed(settings.seed)
    d, h, e = settings.width, settings.expert_width, settings.experts
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "embed": ((BYTES, d), 0.5),
        "place": ((settings.sequence, d), 0.1),
    }
    for layer in range(settings.layers):
        deep = (2 * settings.layers) ** -0.5
        shapes[f"{layer}.qkv"] = ((d, 3 * d), d**-0.5)
        shapes[f"{layer}.out"] = ((d, d), deep * d**-0.5)
        shapes[f"{layer}.router"] = ((d, e), d**-0.5)
        shapes[f"{layer}.up"] = ((e, d, h), d**-0.5)
        shapes[f"{layer}.down"] = ((e, h, d), deep * h**-0.5)
    shapes["head"] = ((d, BYTES), d**-0.5)
    return {name: (scale * torch.randn(shape)).requires_grad_() for name, (shape, scale) in shapes.items()}


def forward(weights: dict[str, Any], tokens: Any, settings: Settings) -> tuple[Any, Any, list[Any]]:
    """Logits [batch, sequence, 256], the mean load-balance loss, and each layer's picks [tokens, top_k]."""
    from torch.nn import functional

    batch, length = tokens.shape
    x = weights["embed"][tokens] + weights["place"][:length]
    uneven, picks = 0.0, []
    for layer in range(settings.layers):
        y = functional.rms_norm(x, (settings.width,))
        qkv = (y @ weights[f"{layer}.qkv"]).view(batch, length, 3, settings.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + seen.transpose(1, 2).reshape(batch, length, -1) @ weights[f"{layer}.out"]
        flat = functional.rms_norm(x, (settings.width,)).reshape(batch * length, -1)
        mixed, loss, ids = _mixture(flat, weights, layer, settings)
        x = x + mixed.view(batch, length, -1)
        uneven = uneven + loss / settings.layers
        picks.append(ids)
    return functional.rms_norm(x, (settings.width,)) @ weights["head"], uneven, picks


def _mixture(x: Any, weights: dict[str, Any], layer: int, settings: Settings) -> tuple[Any, Any, Any]:
    """One layer's experts on x [tokens, width]: output, balance loss, picks; each expert works on its tokens alone."""
    import torch
    from torch.nn import functional

    chance = (x @ weights[f"{layer}.router"]).softmax(dim=-1)
    top, ids = chance.topk(settings.top_k, dim=-1)
    top = top / top.sum(dim=-1, keepdim=True)
    count = torch.bincount(ids.flatten(), minlength=settings.experts)
    loss = settings.experts * (count / ids.numel() * chance.mean(dim=0)).sum()
    order = ids.flatten().argsort(stable=True)
    token = order // settings.top_k
    parts = x[token].split(count.tolist())
    up, down = weights[f"{layer}.up"].unbind(), weights[f"{layer}.down"].unbind()
    done = torch.cat([functional.gelu(part @ up[e]) @ down[e] for e, part in enumerate(parts)])
    return torch.zeros_like(x).index_add(0, token, done * top.flatten()[order, None]), loss, ids


def train(weights: dict[str, Any], text: bytes, settings: Settings, *, say: Any = None) -> float:
    """Adam with a linear warm-up and a cosine to a tenth; returns the last 50 steps' mean loss in bits a byte."""
    import torch
    from torch.nn import functional

    rng = np.random.default_rng([settings.seed, 1])
    optimiser = torch.optim.Adam(list(weights.values()), lr=settings.learning_rate, betas=(0.9, 0.98))
    last: list[float] = []
    for step in range(settings.steps):
        warm, part = min(1.0, (step + 1) / 50), step / settings.steps
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * (0.55 + 0.45 * float(np.cos(np.pi * part)))
        block = torch.from_numpy(sequences(text, settings.sequence + 1, settings.batch, rng))
        logits, uneven, _ = forward(weights, block[:, :-1], settings)
        loss = functional.cross_entropy(logits.reshape(-1, BYTES), block[:, 1:].reshape(-1))
        optimiser.zero_grad(set_to_none=True)
        (loss + settings.balance_loss * uneven).backward()
        optimiser.step()
        last = [*last[-49:], loss.item() / float(np.log(2.0))]
        if say is not None and step % 50 == 49:
            say(f"step {step + 1}: {np.mean(last):.3f} bits a byte, balance loss {uneven.item():.3f}")
    return float(np.mean(last)) if last else float("nan")


def trace(weights: dict[str, Any], text: bytes, settings: Settings) -> NDArray[np.uint8]:
    """Experts that the tokens of held-out text pick: uint8 [requests, sequence, layers, top_k]."""
    import torch

    pieces = sequences(text, settings.sequence, settings.traced_requests, np.random.default_rng([settings.seed, 2]))
    out = np.empty((*pieces.shape, settings.layers, settings.top_k), dtype=np.uint8)
    with torch.no_grad():
        for first in range(0, len(pieces), settings.batch):
            part = torch.from_numpy(pieces[first : first + settings.batch])
            _, _, picks = forward(weights, part, settings)
            for layer, ids in enumerate(picks):
                out[first : first + len(part), :, layer] = ids.numpy().reshape(*part.shape, -1)
    return out


def write_trace(path: Path, picks: NDArray[np.uint8], requests_per_step: int) -> None:
    """Write picks [requests, sequence, layers, top_k] as `.parquet`, whole or not at all."""
    import polars as pl

    requests, length, layers, top_k = picks.shape
    request, token, layer = (axis.ravel() for axis in np.indices((requests, length, layers)))
    frame = pl.DataFrame(
        {
            "step": (request // requests_per_step).astype(np.int32),
            "request_id": request.astype(np.int32),
            "token_id": ((request % requests_per_step) * length + token).astype(np.int32),
            "layer_id": layer.astype(np.int16),
            "experts": picks.reshape(-1, top_k),
        },
        schema_overrides={"experts": pl.Array(pl.UInt8, top_k)},
    ).sort("layer_id", "step", "token_id")
    with whole_file(path) as temporary:
        frame.with_columns(pl.col("experts").arr.to_list()).write_parquet(temporary, compression_level=19)


def main(arguments: list[str] | None = None) -> int:
    """Train, trace, and write the trace with its provenance (`.json` beside it)."""
    parser = argparse.ArgumentParser(prog="python -m profiles.router_trace", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the .parquet to write; its provenance goes beside it")
    parser.add_argument("--text", type=Path, default=Path(os.__file__).parent, help="folder of Python files")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    out, root = given.pop("out"), given.pop("text")
    settings = Settings(**given)
    try:
        told = make(out, root, settings)
    except MoesimError as error:
        sys.stderr.write(f"error: {error.line()}\n")
        return error.exit_code
    print(json.dumps(told))
    return 0


def make(out: Path, root: Path, settings: Settings) -> dict[str, Any]:
    """Train on the text under `root` with one thread, and write the trace `out` and its provenance; what came of it.

    Raises BadInput where there is too little text, MissingPart without torch.
    """
    try:
        import torch
    except ImportError:
        raise MissingPart("training needs torch", mend="pip install '.[hardware]'") from None
    torch.set_num_threads(1)
    shown, held, names = python_text(root, settings.seed)
    start = time.process_time()
    weights = new_weights(settings)
    bits = train(weights, shown, settings, say=lambda line: print(line, file=sys.stderr))
    trained_s = time.process_time() - start
    write_trace(out, trace(weights, held, settings), settings.requests_per_step)
    provenance = {
        "command": "python -m profiles.router_trace",
        "settings": asdict(settings),
        "text": f"{len(shown)} bytes of the standard library of Python {sys.version.split()[0]}",
        "traced_files": names,
        "torch": torch.__version__,
        "train_bits_per_byte": bits,
        "train_cpu_s": trained_s,
    }
    write_json(out.with_suffix(".json"), provenance)
    return {"out": str(out), "bytes": out.stat().st_size, "bits_per_byte": bits, "cpu_s": trained_s}


if __name__ == "__main__":
    sys.exit(main())
