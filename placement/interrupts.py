"""Ctrl-C while a plan is sought: the first ends the search, what it found is still judged and written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Patience:
    """How often Ctrl-C was pressed, and whether the search is over."""

    def __init__(self) -> None:
        self.pressed = 0
        self.finishing = False

    def hear(self, *_: Any) -> None:
        """The first Ctrl-C while the answer is being written lets it be written; any other raises."""
        self.pressed += 1
        if self.pressed > 1 or not self.finishing:
            raise KeyboardInterrupt
        sys.stderr.write("writing the answer; Ctrl-C again leaves without it\n")


@contextmanager
def patience() -> Iterator[Patience]:
    """Listen to Ctrl-C in this way, as before afterwards."""
    heard = Patience()
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGINT, heard.hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def unbroken() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: what it stores is stored and known to be."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        signal.raise_signal(signal.SIGINT)
