"""List and show the named systems of the literature, which are presets of `policies`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(
    help="List and show the named systems of the literature.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_systems(as_json: AsJson = False) -> None:
    """List the named systems."""
    from moesim.systems.load import systems

    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "systems": [_facts(name) for name in systems()]}))
        return
    width = max(len(name) for name in systems())
    for name, system in systems().items():
        typer.echo(f"{name:<{width}}  {system.title}")


@app.command("show")
def show_system(
    name: Annotated[str, typer.Argument(help="A name that `moesim systems list` prints.")], as_json: AsJson = False
) -> None:
    """Show one system: its source and the policies it stands for, as a scenario writes them."""
    import yaml

    facts = _facts(name)
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, **facts}))
        return
    typer.echo(f"# {facts['title']}\n# {facts['source']}")
    if facts["notes"]:
        typer.echo(f"# {facts['notes']}")
    typer.echo(yaml.safe_dump({"policies": facts["policies"]}, sort_keys=False), nl=False)


def _facts(name: str) -> dict[str, object]:
    from moesim.systems.load import load_system

    return load_system(name, where="moesim systems show").model_dump(mode="json")
