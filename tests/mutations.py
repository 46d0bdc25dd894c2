"""Ways to damage a file, drawn from a seed: its bytes, the values of its document, the arrays in it, its encoding."""

from __future__ import annotations

import codecs
import copy
import gzip
import json
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

JUNK = [
    b"", b"null", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"1e999", b"NaN", b"Infinity", b"\x00", b"\xff\xfe",
    b"9" * 40, b"9" * 5000, b"true", b"[]", b"{}", b"&a", b"*a", b"!!python/object:os.system x", b"\n", b"\t", b"- ",
    b"[" * 5000, b'{"a":' * 3000, b"0.5", b"1_0", b"0x1", b"-0",
]  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, -1, 3.5, -0.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, 2**63, "", "x", "1", [], {},
    [[]], [1], {"a": 1}, 0, 1, 7, 15, 16, 99,
]  # fmt: skip


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three damages: cut out, cut short, swapped, junk put in or over, bits flipped, a stretch repeated."""
    for _ in range(rng.randint(1, 3)):
        first, last = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        kind = rng.randrange(8)
        if kind == 0:
            content = content[:first] + content[last:]
        elif kind == 1:
            content = content[:first]
        elif kind == 2:
            content = content[:last] + content[first:]
        elif kind == 3:
            content = content[:first] + rng.choice(JUNK) + content[first:]
        elif kind == 4:
            end = min(first + rng.randint(1, 4), len(content))
            content = content[:first] + rng.choice(JUNK) + content[end:]
        else:
            flipped = bytearray(content)
            for _ in range(rng.randint(1, 3) if flipped else 0):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            content = bytes(flipped)
    return content


def of_document(data: Any, rng: random.Random) -> Any:
    """One or two values somewhere inside become something else, are left out, doubled, or get a neighbour."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 2])):
        data = _deeper(data, rng)
    return data


def _deeper(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.12:
        return copy.deepcopy(rng.choice(STRANGE))
    action = rng.random()
    if isinstance(value, dict):
        name = rng.choice(list(value))
        if action < 0.1:
            value.pop(name)
        elif action < 0.2:
            value[rng.choice(["x", f"{name}_", "layers", "5"])] = copy.deepcopy(rng.choice(STRANGE))
        else:
            value[name] = _deeper(value[name], rng)
        return value
    index = rng.randrange(len(value))
    if action < 0.1:
        value.pop(index)
    elif action < 0.2:
        value.insert(index, copy.deepcopy(value[index]))
    elif action < 0.3:
        other = rng.randrange(len(value))
        value[index], value[other] = value[other], value[index]
    else:
        value[index] = _deeper(value[index], rng)
    return value


def of_encoding(content: bytes, rng: random.Random) -> bytes:
    """The same text in another encoding, packed, nothing, or only white space."""
    text = content.decode()
    return rng.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-32"),
            codecs.BOM_UTF8 + content,
            gzip.compress(content),
            b"",
            b" \n",
            text.replace("e", "\u00e9").encode("latin-1"),
            text.replace("\n", "\r\n").encode(),
        ]
    )


def of_text(content: bytes, rng: random.Random) -> bytes:
    """A damage of a text file: mostly of its bytes; where it is JSON, also of its document."""
    way = rng.random()
    if way < 0.06:
        return of_encoding(content, rng)
    try:
        document = json.loads(content)
    except ValueError:
        return of_bytes(content, rng)
    return json.dumps(of_document(document, rng)).encode() if way < 0.6 else of_bytes(content, rng)


def of_array(array: NDArray[Any], rng: random.Random) -> NDArray[Any]:
    """Another value, dtype or shape of an array of numbers."""
    array = array.copy()
    way = rng.randrange(9)
    place = tuple(rng.randrange(length) for length in array.shape)
    if way == 0:
        array[place] = -1
    elif way in (1, 2, 3):
        array = array.astype(np.float64)
        array[place] = (np.nan, np.inf, 1e300)[way - 1]
    elif way == 4:
        array = array[..., :0]
    elif way == 5:
        array = array[0] if rng.random() < 0.5 else array[None, None]
    elif way == 6:
        array = array.astype(rng.choice([np.bool_, np.complex64, np.uint8, np.float16]))
    elif way == 7:
        array = array[..., : max(1, array.shape[-1] - 1)]
    else:
        array = array.astype(np.int64)
        array[place] = 10**17
    return array
