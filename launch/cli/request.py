"""What the verbs with a composed config have in common: their switches, help, and the config itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from data_pipeline.core.schema import REQUIRED, ConfigError, FieldDoc, document, load, suggest
from launch.cli.compose import compose, groups, to_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """A verb's command line, read."""

    config: T
    values: dict[str, Any]
    """The composed config as plain values."""
    switches: frozenset[str]


def read(verb: str, kind: type[T], arguments: list[str], switches: tuple[str, ...] = ()) -> Job[T] | None:
    """Composes conf/<verb>.yaml and the overrides to a `kind`. None: --help or --cfg was answered.

    Raises ConfigError naming every wrong field.
    """
    known = ("--help", "-h", "--cfg", *switches)
    given = [argument for argument in arguments if argument.startswith("-")]
    for switch in given:
        if switch not in known:
            near = suggest(switch, known)
            hint = f"did you mean {near}? " if near else ""
            raise ConfigError(f"there is no switch {switch}; {hint}there are: {', '.join(known)}")
    overrides = [argument for argument in arguments if argument not in given]
    values = compose(verb, overrides)
    _keep_texts(kind, values, overrides)
    if "--help" in given or "-h" in given:
        show_help(verb, kind, values, switches)
        return None
    if "--cfg" in given:
        print(to_yaml(values), end="")
        return None
    return Job(load(kind, values), values, frozenset(given))


def _keep_texts(kind: type[Any], values: dict[str, Any], overrides: list[str]) -> None:
    """Where a field is a text, `name=007` and `after=12` are texts, not the numbers that Hydra takes them for."""
    given = {path.lstrip("+"): text for path, equals, text in (line.partition("=") for line in overrides) if equals}
    for path in given.keys() & {row.path for row in document(kind, "", values) if row.type == "text"}:
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        if isinstance(section.get(name), (int, float)):
            section[name] = given[path]


def show_help(verb: str, kind: type[Any], values: dict[str, Any], switches: tuple[str, ...]) -> None:
    """Every field of `kind`, grouped by its path, with meaning, default and limits."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]auricle {verb}[/] \\[field=value | group=choice] ...", "\n")
    for name, choices in groups().items():
        if choices and (name in values or name == "experiment"):
            sign = "+" if name == "experiment" else ""
            console.print(f"  [cyan]{sign}{name}=[/]{' | '.join(choices)}")
    console.print("  switches: " + ", ".join(("--cfg", *switches)), "\n")
    section = None
    for row in document(kind, "", values):
        parent = row.path.rpartition(".")[0]
        if parent != section:
            section = parent
            console.print(f"[bold]{parent or 'the run'}[/]")
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
