"""The command line: lazy subcommands from entry points, one-line errors, the contract's exit codes."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from moesim import plugins
from moesim.errors import MissingPart, MoesimError

HELP = "Simulate, place and tune mixture-of-experts deployments."


class LazyGroup(TyperGroup):
    """A group whose commands are entry points: listed from source text, imported only when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all installed commands."""
        return list(plugins.available(plugins.COMMANDS))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the help line while help is being written, else the command itself."""
        points = plugins.available(plugins.COMMANDS)
        if cmd_name not in points:
            return None
        if getattr(ctx, "listing_only", False):
            return TyperCommand(name=cmd_name, help=plugins.help_line(points[cmd_name]), callback=None)
        return command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands without importing any of them."""
        ctx.listing_only = True
        try:
            super().format_commands(ctx, formatter)
        finally:
            ctx.listing_only = False


def command(name: str) -> Any:
    """Import one subcommand and wrap it for the command line."""
    target = plugins.load(plugins.COMMANDS, name)
    if isinstance(target, typer.Typer):
        app = target
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name)(target)
    app._add_completion = False
    made = typer.main.get_command(app)
    made.name = name
    return made


def application() -> Any:
    """The whole command line as one command."""

    def version(value: bool) -> None:
        if value:
            from moesim import __version__

            typer.echo(f"moesim {__version__}")
            raise typer.Exit

    def root(
        show: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Show the version."),
    ) -> None:
        pass

    app = typer.Typer(cls=LazyGroup, help=HELP, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
    app.callback(help=HELP)(root)
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with the contract's code: 0 done, 1 infeasible, 2 bad input, 3 a part is missing."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; expected errors become one line on stderr."""
    try:
        code = application().main(args=arguments, prog_name="moesim", standalone_mode=False)
    except MoesimError as error:
        return complain(error.line(), error.exit_code)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", 130)
    except BrokenPipeError:
        return 1
    except MemoryError:
        return complain("out of memory; lower the number of steps, draws or requests", 1)
    except ImportError as error:
        missing = MissingPart(f"a part is not installed ({error})", mend="see `moesim doctor`")
        return complain(missing.line(), missing.exit_code)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return 2
        if hasattr(
            error, "format_message"
        ):  # click's usage errors; typer vendors click, so the class has no public name
            return complain(" ".join(str(error.format_message()).split()), 2)
        raise
    return code if isinstance(code, int) else 0


def complain(line: str, code: int) -> int:
    """Write one error line to stderr and hand back the exit code."""
    sys.stderr.write(f"error: {line}\n")
    return code


if __name__ == "__main__":
    main()
