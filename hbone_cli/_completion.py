"""``hbone completion``: scripts that let a shell complete our commands and options."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(*, shell: str) -> None:
    """Print the script that lets a shell complete hbone's commands and options.

    \b
    bash, for this shell:   eval "$(hbone completion bash)"
    zsh, for this shell:    eval "$(hbone completion zsh)"
    fish, for good:         hbone completion fish > ~/.config/fish/completions/hbone.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, "hbone", "_HBONE_COMPLETE").source())
