"""The command line: lazy subcommands from entry points, one-line errors, the contract's exit codes."""

from __future__ import annotations
