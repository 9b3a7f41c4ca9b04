"""auricle completion: prints the completion script for bash or zsh."""

from __future__ import annotations

from launch.cli.command_table import COMMANDS, SUBCOMMANDS
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode


def run(arguments: list[str]) -> int:
    """Prints the script; returns 0."""
    parser = Parser(
        "auricle completion",
        description="the completion script of a shell: commands, config groups with their choices, field names. "
        'Put  eval "$(auricle completion bash)"  into ~/.bashrc, or the same with zsh into ~/.zshrc after compinit.',
    )
    parser.add_argument("shell", choices=tuple(SUBCOMMANDS["completion"]))
    shell = parser.parse_args(arguments).shell

    from launch.cli import completion
    from launch.cli.groups import groups

    print(completion.script(shell, completion.words(COMMANDS, groups())), end="")
    return ExitCode.DONE
