"""Reads the command line of a command with a composed config: switches, help, and the config itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from data_pipeline.core.schema import REQUIRED, ConfigError, FieldDoc, document, hint, load
from launch.cli.compose import compose, is_sweep, to_yaml
from launch.cli.groups import EXPERIMENT, HEAD, groups
from pretrain.config import Config

T = TypeVar("T")
MULTIRUN = "--multirun"
"""Switch of commands that run every combination of listed values."""


@dataclass(frozen=True)
class ParsedCommand(Generic[T]):
    """A parsed command line."""

    config: T
    values: dict[str, Any]
    """The composed config as plain values."""
    switches: frozenset[str]


def read(
    command: str, kind: type[T], arguments: list[str], switches: tuple[str, ...] = (), usage: str = ""
) -> ParsedCommand[T] | None:
    """Composes conf/COMMAND.yaml and the overrides to a config.

    Args:
        command: the command.
        kind: the config's class.
        arguments: overrides (field=value, group=choice) and switches.
        switches: switches of this command besides --help and --cfg.
        usage: first lines of the help of another command that takes the fields of `command`.

    Returns:
        The request; None after --help or --cfg, whose output has been printed.

    Raises:
        ConfigError: a switch or field is wrong; the message names every wrong field.
    """
    known = ("--help", "-h", "--cfg", *switches)
    given = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if argument not in given]
    for switch in given:
        if switch not in known:
            raise ConfigError(_unknown_switch(switch, arguments, known, kind))
    if "--help" in given or "-h" in given:
        show_help(command, kind, compose(command, overrides), switches, usage)
        return None
    values = compose(command, overrides)
    _keep_texts(kind, values, overrides)
    if "--cfg" in given:
        print(to_yaml(values), end="")
        return None
    try:
        return ParsedCommand(load(kind, values), values, frozenset(given))
    except ConfigError as error:
        listed = [
            line for line in overrides if is_sweep(line) and f"{line.partition('=')[0].lstrip('+')}=" in str(error)
        ]
        if listed and MULTIRUN in switches:
            raise ConfigError(f"{error}\n{listed[0]} lists several values: add {MULTIRUN} for one run each") from None
        raise


def print_cautions(*configs: Config) -> None:
    """Prints the warnings of configs about valid but probably unintended values to stderr, each once."""
    for caution in dict.fromkeys(caution for config in configs for caution in config.cautions()):
        print(f"note: {caution}", file=sys.stderr, flush=True)


def shell_line(command: str, arguments: Sequence[str]) -> str:
    """Returns a command line of `auricle`, quoted for a shell."""
    return shlex.join(["auricle", command, *arguments])


def config_of(command: str, kind: type[T], arguments: Sequence[str]) -> T:
    """Returns the config of a command line without switches. Raises ConfigError, see `read`."""
    given = read(command, kind, list(arguments))
    assert given is not None  # only --help and --cfg give no config
    return given.config


def _unknown_switch(switch: str, arguments: list[str], known: tuple[str, ...], kind: type[Any]) -> str:
    """Returns the message about an unknown switch, which may be a field as `--field value` or `--field=value`."""
    name, _, value = switch.lstrip("-").partition("=")
    field = name.replace("-", "_")
    fields = {row.path for row in document(kind)}
    tops = {path.partition(".")[0] for path in fields} | groups().keys()
    if field in fields or field.partition(".")[0] in tops:
        after = arguments[arguments.index(switch) + 1 :]
        shown = value or (after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "VALUE")
        return f"{switch}: fields have no dashes; write {field}={shown}"
    return f"there is no switch {switch}{hint(switch, known)}; there are: {', '.join(known)}"


def _keep_texts(kind: type[Any], values: dict[str, Any], overrides: list[str]) -> None:
    """Restores text fields that Hydra read as numbers, such as `name=007` and `after=12`."""
    given = {path.lstrip("+"): text for path, equals, text in (line.partition("=") for line in overrides) if equals}
    for path in given.keys() & {row.path for row in document(kind, "", values) if row.type == "text"}:
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        if isinstance(section.get(name), (int, float)):
            section[name] = given[path]


HELP_WIDTH = 100
"""Columns of help, at most; also where its output is piped."""


def show_help(
    command: str, kind: type[Any], values: dict[str, Any], switches: tuple[str, ...], usage: str = ""
) -> None:
    """Prints every field of `kind`, grouped by section, with meaning, default and limits.

    Args:
        command: its name.
        kind: its config.
        values: the composed values, shown as defaults.
        switches: those of the command beside --help and --cfg.
        usage: first lines, of another command that takes these fields; "": a title.
    """
    from rich.text import Text

    from launch.cli import tables

    console = tables.console()
    console.width = min(console.width, HELP_WIDTH)
    title = Text.assemble((f"auricle {command}", "bold"), " [field=value | group=choice] ...")
    console.print(Text(f"{usage}\n\nFields and choices of `auricle {command}`:") if usage else title, "\n")
    for name, choices in groups().items():
        if name == HEAD and "heads" in values:
            console.print(Text.assemble("  ", (f"{HEAD}@heads.NAME=", "cyan"), " | ".join(choices)))
        elif choices and name != HEAD and (name in values or (name == EXPERIMENT and command == "pretrain")):
            sign = "+" if name == EXPERIMENT else ""
            console.print(Text.assemble("  ", (f"{sign}{name}=", "cyan"), " | ".join(choices)))
    console.print("" if usage else "  switches: " + ", ".join(("--cfg", *switches)) + " \n")
    section = None
    for row in document(kind, "", values):
        parent = row.path.rpartition(".")[0]
        if parent != section:
            section = parent
            console.print(Text(parent or "the job", style="bold"))
        _print_field(console, row)


def _print_field(console: Any, row: FieldDoc) -> None:
    from rich.padding import Padding
    from rich.text import Text

    default = "required" if row.default == REQUIRED else f"= {row.default}"
    head = Text.assemble((row.path, "cyan"), "  ", (default, "green"), "  ", (row.type, "dim"))
    body = ". ".join(filter(None, (row.description, row.limits)))
    console.print(Padding(head, (0, 0, 0, 2), expand=False))
    if body:
        console.print(Padding(Text(body), (0, 0, 0, 6), expand=False))
