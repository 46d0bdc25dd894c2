"""The error tree: one line that says what, where, and what would be right.

MoesimError
├── BadInput          exit 2: a file, a key, a shape or an argument is wrong
│   └── OutsideProfile    the cost store holds no measurement there, and extrapolation is refused
├── Infeasible        exit 1: the input is well formed, but no such deployment can run
├── CheckFailed       exit 1: a check that the user asked for did not hold
├── MissingPart       exit 3: a part that is not there (a GPU, an optional extra)
└── Interrupted       exit 130: Ctrl-C came before the end; what was found is written
"""

from __future__ import annotations


class MoesimError(Exception):
    """Base of all errors that moesim raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error on one line: what, in which place, and how to mend it."""
        text = self.what
        if self.where:
            text = f"{self.where}: {text}"
        if self.mend:
            text = f"{text}; {self.mend}"
        return " ".join(text.split())

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors back by pickling; keyword-only arguments need this.
        return (_rebuild, (type(self), self.what, self.where, self.mend))


def _rebuild(kind: type[MoesimError], what: str, where: str, mend: str) -> MoesimError:
    return kind(what, where=where, mend=mend)


class BadInput(MoesimError):
    """A file, a key, a shape or an argument is wrong."""

    exit_code = 2


class OutsideProfile(BadInput):
    """The cost store holds no measurement at this point, and extrapolation is refused."""


class Infeasible(MoesimError):
    """The input is well formed, but no such deployment can run; `reason` is its short counted name.

    over: by what share of the memory a plan needs more than there is, where that is the reason.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", mend: str = "", reason: str = "infeasible", over: float | None = None
    ) -> None:
        self.reason = reason
        self.over = over
        super().__init__(what, where=where, mend=mend)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_infeasible, (self.what, self.where, self.mend, self.reason, self.over))


def _rebuild_infeasible(what: str, where: str, mend: str, reason: str, over: float | None) -> Infeasible:
    return Infeasible(what, where=where, mend=mend, reason=reason, over=over)


class CheckFailed(MoesimError):
    """A check that the user asked for did not hold."""

    exit_code = 1


class MissingPart(MoesimError):
    """A part that is not there: a GPU, an optional extra; the mend names the command that brings it."""

    exit_code = 3


class Interrupted(MoesimError):
    """Ctrl-C ended the command before its time; what it had found is written, and the error says where."""

    exit_code = 130
