"""Typed configs: frozen dataclasses, loaded strictly, with documented fields and errors that name the remedy.

    @config
    class Optimizer:
        lr: Annotated[float, about("peak learning rate", gt=0)] = 5e-4

`load(Optimizer, {"lr": "x"})` raises `ConfigError` listing every bad field with its path, value and limit.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar, dataclass_transform

import annotated_types
from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

T = TypeVar("T")
REQUIRED: Final = "(required)"


class ConfigError(ValueError):
    """Raised for an invalid config; the message is one paragraph for the user. Ends a command with exit code 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Makes a class a frozen, keyword-only dataclass with strict validation by pydantic; unknown fields are refused."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    return made


Resume = Literal["fixed", "free", "path", "data"]
"""Changes that a resumed run may make to a field: none; its value; only how it writes the same path; or the path of its
data set, whose content the hash of the plan proves to be the same."""


def about(description: str, *, resume: Resume | None = None, aliases: tuple[str, ...] = (), **limits: Any) -> Any:
    """Returns the annotation of a config field.

    Args:
        description: meaning of the field, one phrase for `--help`.
        resume: change that a resumed run may make; None: as for the section around the field, outside of all sections
            "fixed". For a section, it applies to the fields below it that have no rule of their own.
        aliases: other names that configs may use for the field.
        limits: pydantic's `gt`, `ge`, `lt`, `le`, `min_length` …
    """
    if aliases:
        limits["validation_alias"] = AliasChoices(*aliases)
    return Field(description=description, json_schema_extra={"resume": resume}, **limits)


def resume_rules(kind: type[Any], prefix: str = "") -> dict[str, Resume]:
    """Returns the fields and sections below `kind` whose rule differs from that around them, by dotted path."""
    return _resume_rules(kind, prefix, "fixed")


def _resume_rules(kind: type[Any], prefix: str, around: Resume) -> dict[str, Resume]:
    found: dict[str, Resume] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, metadata = _unwrap(hints[field.name])
        path = f"{prefix}{field.name}"
        extras = [info.json_schema_extra for info in metadata if isinstance(info, FieldInfo)]
        given = next((extra["resume"] for extra in extras if isinstance(extra, dict) and extra.get("resume")), around)
        rule = typing.cast("Resume", given)
        if rule != around:
            found[path] = rule
        if dataclasses.is_dataclass(hint):
            found |= _resume_rules(typing.cast("type[Any]", hint), f"{path}.", rule)
    return found


def refuse(field: str, value: Any, reason: str) -> NoReturn:
    """Raises an error at `field`, for `__post_init__` of a config whose fields contradict each other.

    `reason` is the limit or the remedy.
    """
    problem = PydanticCustomError("do_not_fit", "{reason}", {"reason": reason})
    raise ValidationError.from_exception_data(field, [InitErrorDetails(type=problem, loc=(field,), input=value)])


def one_or_several(value: Any) -> Any:
    """Returns a single value or a list as a tuple, as strict validation requires; "" as an empty one."""
    if isinstance(value, str | int):
        return () if value == "" else (value,)
    return tuple(value) if isinstance(value, list) else value


Places = Annotated[tuple[str, ...], BeforeValidator(one_or_several)]
"""One path or URL, or several: `a` and `[a,b]`."""


@config
class PluginConfig:
    """Base class of the config of one plug-in, chosen by its name."""

    name: Annotated[str, about("name of the plug-in")]


@dataclasses.dataclass(frozen=True)
class PluginChoice:
    """Annotates a field that holds the config of one of several plug-ins, chosen by its `name`."""

    kind: str
    names: Callable[[], list[str]]
    config_type: Callable[[str], type[PluginConfig]]
    documented_type: Callable[[str], type[PluginConfig]] | None = None
    """Returns a class with the same fields for help texts, where importing that of `config_type` takes seconds."""
    optional: bool = False
    """Whether null is allowed."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, value: Any) -> Any:
        """Returns the plug-in's own config for a mapping with `name`."""
        if dataclasses.is_dataclass(value) or (self.optional and value is None):
            return value
        known = self.names()
        if not isinstance(value, dict):
            raise ValueError(f"is a group of fields with a name, one of: {', '.join(known)}")
        name = value.get("name")
        if name not in known:
            problem = PydanticCustomError(
                "no_such_name",
                "there is no such {kind}{hint}; one of your own needs plugins=FOLDER",
                {"kind": self.kind, "hint": hint(str(name), known)},
            )
            bad = InitErrorDetails(type=problem, loc=("name",), input=name)
            raise ValidationError.from_exception_data(self.kind, [bad])
        return _adapter(self.config_type(value["name"])).validate_json(json.dumps(value))


def suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns the name among `known` nearest to `name`, or "" if none is near.

    Args:
        name: the unknown name.
        known: the valid names.
        cutoff: least similarity of a suggestion, 0 to 1 (difflib's ratio).
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return near[0] if near else ""


def hint(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean …?)" with the name among `known` nearest to `name`, or "" if none is near."""
    return did_you_mean(suggest(name, known))


def did_you_mean(near: str) -> str:
    """Returns " (did you mean …?)" for a suggested name; "" for ""."""
    return f" (did you mean {near}?)" if near else ""


class Absent(enum.Enum):
    """The value of a field that one of two compared configs lacks."""

    ABSENT = "(absent)"

    def __repr__(self) -> str:
        return self.value


ABSENT: Final = Absent.ABSENT


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted path: `{"a": {"b": 1}}` becomes `{"a.b": 1}`; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted path, value before, value after) of each field that differs, sorted by path.

    A field that one side lacks has the value `ABSENT` there. Values of other types differ (1 and True do, 1 and 1.0
    do not).
    """
    old, new = flatten(before), flatten(after)
    rows = ((path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in sorted(old.keys() | new.keys()))
    return [(path, a, b) for path, a, b in rows if a != b or isinstance(a, bool) != isinstance(b, bool)]


LARGEST_INTEGER: Final = 2**31 - 1
LARGEST_SEED: Final = 2**63 - 1
LARGEST_NUMBER: Final = 1e12
"""Limits of numbers; larger sizes, counts and times are useless and would overflow or never end."""


def _numbers(value: Any) -> Iterator[Any]:
    """Yields a value, or the values of nested lists."""
    if not isinstance(value, list):
        yield value
        return
    for part in value:
        yield from _numbers(part)


def _too_large(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields a message for each number above the limits."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _too_large(value, f"{path}.")
            continue
        for number in _numbers(value):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            limit = LARGEST_NUMBER if isinstance(number, float) else LARGEST_INTEGER
            limit = LARGEST_SEED if name == "seed" else limit
            if abs(number) > limit and number not in (
                float("inf"),
                float("-inf"),
            ):  # infinities are refused by the field's type
                yield f"{path}={json.dumps(number)[:40]}: is too large; at most {limit:g}"


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Returns the validator of a config class, made once: that of a whole run takes 0.15 s."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def load(kind: type[T], values: Mapping[str, Any], source: str = "") -> T:
    """Reads nested JSON-like values as a config.

    Args:
        kind: class of the config.
        values: its fields.
        source: begins the message of an error, such as the file that the values are from.

    Raises:
        ConfigError: fields are wrong; the message has a line for each.
    """
    begin = f"{source}: " if source else ""
    if large := list(_too_large(values)):
        raise ConfigError(begin + "\n".join(large))
    try:
        found: T = _adapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(kind, problem, values) for problem in error.errors(include_url=False)]
        raise ConfigError(begin + "\n".join(dict.fromkeys(lines))) from None
    return found


def dump(value: Any) -> dict[str, Any]:
    """Returns a config as plain JSON-like values; `load(type(value), dump(value)) == value`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value)))
    return plain


def base_part(kind: type[T], value: T) -> T:
    """Returns the fields of a config that its base class `kind` has, as a config of that class."""
    names = [field.name for field in dataclasses.fields(typing.cast("type[Any]", kind))]
    return kind(**{name: getattr(value, name) for name in names})


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One line of `--help`."""

    path: str
    type: str
    default: str
    limits: str
    description: str


def document(kind: type[Any], prefix: str = "", chosen: Mapping[str, Any] | None = None) -> Iterator[FieldDoc]:
    """Yields every field below `kind`. `chosen` (composed values) selects the plug-ins, and gives values to show."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name}"
        hint, metadata = _unwrap(hints[field.name])
        value = (chosen or {}).get(field.name, REQUIRED)
        choice = next((m for m in metadata if isinstance(m, PluginChoice)), None)
        inner = value if isinstance(value, dict) else {}
        if choice is not None:
            name = inner.get("name")
            yield FieldDoc(
                f"{path}.name", "text", str(name or REQUIRED), "one of " + ", ".join(choice.names()), choice.kind
            )
            if isinstance(name, str) and name in choice.names():
                rows = document((choice.documented_type or choice.config_type)(name), f"{path}.", inner)
                yield from (row for row in rows if row.path != f"{path}.name")
        elif (below := _section(hint)) and value is not None:
            yield from document(below, f"{path}.", inner)
        else:
            yield FieldDoc(
                path, _type_name(hint), _default(field, value), _limits(hint, metadata), _description(metadata)
            )


def _section(hint: Any) -> type[Any] | None:
    """Returns the config class of a field that holds one, or one or null."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)), None)


def _unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        return inner, tuple(metadata)
    return hint, ()


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "choice"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin in (tuple, list):
        return "list of " + _type_name(_unwrap(args[0])[0])
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true/false"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _default(field: dataclasses.Field[Any], value: Any) -> str:
    if value is not REQUIRED:
        return json.dumps(value)
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    return REQUIRED


def _limits(hint: Any, metadata: tuple[Any, ...]) -> str:
    found: list[str] = []
    if typing.get_origin(hint) is typing.Literal:
        found.append("one of " + ", ".join(map(str, typing.get_args(hint))))
    for info in metadata:
        for limit in info.metadata if isinstance(info, FieldInfo) else ():
            signs = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}
            for limit_type, sign in signs.items():
                if isinstance(limit, limit_type):
                    found.append(f"{sign} {getattr(limit, limit_type.__name__.lower()):g}")
            if isinstance(limit, annotated_types.MinLen):
                found.append("not empty" if limit.min_length == 1 else f"at least {limit.min_length} long")
    return ", ".join(found)


def _description(metadata: tuple[Any, ...]) -> str:
    return next((info.description or "" for info in metadata if isinstance(info, FieldInfo)), "")


def _explain(kind: type[Any], problem: Any, values: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "(the whole config)"
    shown = json.dumps(problem["input"], default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if problem["type"] == "unexpected_keyword_argument":
        parent, _, name = path.rpartition(".")
        path, shown = _leaf(path, problem["input"], shown)
        prefix = f"{parent}." if parent else ""
        siblings = sorted(
            {row.path[len(prefix) :].split(".")[0] for row in document(kind, "", values) if row.path.startswith(prefix)}
        )
        everywhere = [row.path for row in document(kind, "", values)]
        sibling = suggest(name, siblings, cutoff=0.5)
        near = suggest(path, everywhere, cutoff=0.8) or (prefix + sibling if sibling else suggest(path, everywhere))
        near = near or next((other for other in everywhere if other.rsplit(".", 1)[-1] == name), "")
        where = parent or "the top level"
        return f"{path}={shown}: there is no such field{did_you_mean(near)}; {where} has: {', '.join(siblings)}"
    if problem["type"] in ("missing", "missing_argument"):
        if isinstance(problem["loc"][-1], int):
            return f"{path.rpartition('.')[0]}={shown}: has too few values"
        required = {row.path: row.description for row in document(kind, "", values) if row.default == REQUIRED}
        missing = [row for row in required if row == path or row.startswith(f"{path}.")] or [path]
        meanings = {row: f" ({required[row]})" if required.get(row) else "" for row in missing}
        return "\n".join(f"{row}: is required; give {row}=VALUE{meanings[row]}" for row in missing)
    doc = next((row for row in document(kind, "", values) if row.path == path), None)
    allowed = f" (allowed: {', '.join(filter(None, (doc.type, doc.limits)))})" if doc else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("dataclass_type", "dict_type"):
        rows = [row for row in document(kind, "", values) if row.path.startswith(f"{path}.")]
        message = _group_message(path, problem["input"], rows) if rows else "is a mapping of names to values"
    near = ""
    if problem["type"] in ("tuple_type", "list_type") and isinstance(problem["input"], str | int | float):
        return f"{path}={shown}: is a list; write {path}=[{problem['input']}]{allowed}"
    if problem["type"] == "literal_error" and doc and isinstance(problem["input"], str):
        near = suggest(problem["input"], doc.limits.removeprefix("one of ").split(", "))
    return f"{path}={shown}: {message}{allowed}{did_you_mean(near)}"


def _group_message(path: str, given: Any, rows: Sequence[FieldDoc]) -> str:
    """Returns the message about a value in the place of a group: the field that may be meant, else the group's own."""
    names = next((row.limits.removeprefix("one of ").split(", ") for row in rows if row.path == f"{path}.name"), [])
    if isinstance(given, str) and (near := suggest(given, names)):
        return f"is a group of fields; write {path}.name={near}"
    own = dict.fromkeys(".".join(row.path.split(".")[: path.count(".") + 2]) for row in rows)
    return f"is a group of fields: {', '.join(own)}"


def _leaf(path: str, value: Any, shown: str) -> tuple[str, str]:
    """Returns `filter={"a": 1}` as the user wrote it: `filter.a=1`."""
    while isinstance(value, dict) and len(value) == 1:
        [(name, value)] = value.items()
        path, shown = f"{path}.{name}", json.dumps(value, default=str)
    return path, shown
