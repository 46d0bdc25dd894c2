"""A rank of a command that comes to harm at a given phase, in place of the command's own `python -m MODULE`.

Its first arguments are that module, what happens to rank 1, and at the first label with which word; the others are the
rank's. Under torchrun (RANK is set) the module is a command's own, `moesim.cli`.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def spin() -> None:
    while True:
        pass


def short_of_memory() -> None:
    """From here on this process gets 64 MiB more address space and no more."""
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))


def numpy_allocation() -> None:
    import numpy as np

    short_of_memory()
    np.ones(2**28)


def torch_allocation() -> None:
    import torch

    short_of_memory()
    torch.ones(2**28)


def other_gradients() -> None:
    """From here on this rank's gradients of norms and gates are not what they should be."""
    from validate.training import step

    right = step.Stepper._reduce

    def reduce(stepper: step.Stepper) -> None:
        stepper.weights.gradients["whole"] *= 1.01
        right(stepper)

    step.Stepper._reduce = reduce  # type: ignore[method-assign]


HARM: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "spinning": spin,
    "sleeping": lambda: time.sleep(3600.0),
    "numpy": numpy_allocation,
    "torch": torch_allocation,
    "aborted": os.abort,
    "other_gradients": other_gradients,
}


def main() -> int:
    from validate.hardware import group

    module, what, phase, *rest = sys.argv[1:]
    rank = os.environ["RANK"] if "RANK" in os.environ else rest[rest.index("--rank") + 1]
    if rank == "1":
        at = group.Beat.at

        def harmed(beat: group.Beat, label: str) -> None:
            at(beat, label)
            if phase in label:
                HARM[what]()

        group.Beat.at = harmed  # type: ignore[method-assign,assignment]
    found = importlib.import_module(module)
    return int(found.run(rest) if module == "moesim.cli" else found.main(rest))


if __name__ == "__main__":
    sys.exit(main())
