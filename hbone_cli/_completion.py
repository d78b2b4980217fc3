"""``hbone completion``: scripts that let a shell complete our commands and options."""

from __future__ import annotations

import click

from hbone_cli._options import examples

__all__ = ["command"]


@click.command(
    "completion",
    short_help="Completion of commands and options for a shell.",
    epilog=examples(
        'eval "$(hbone completion bash)"',
        'eval "$(hbone completion zsh)"',
        "hbone completion fish > ~/.config/fish/completions/hbone.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(*, shell: str) -> None:
    """Print the script that lets a shell complete hbone's commands and options."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, "hbone", "_HBONE_COMPLETE").source())
