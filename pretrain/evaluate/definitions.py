"""Definitions in YAML: tasks (conf/task) and sets of frame labels (conf/label_set), also of plug-in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from data_pipeline.core import plugins
from data_pipeline.core.schema import ConfigError, hint, load
from data_pipeline.corpora import tables

CONF = Path(__file__).resolve().parents[2] / "conf"
ENDINGS = (".yaml", ".yml")
"""Endings of files that a user names instead of a definition."""
T = TypeVar("T")


def names(kind: str) -> list[str]:
    """Returns the names of all definitions of a kind, sorted. kind: a folder of conf/, such as task."""
    return sorted({file.stem for folder in _folders(kind) for file in folder.glob("*.yaml")})


def find(kind: str, name: str) -> Path:
    """Returns the file of a definition.

    Args:
        kind: a folder of conf/.
        name: its name, or the path of a YAML file.

    Raises:
        ConfigError: there is no such definition; with the nearest name.
    """
    if name.endswith(ENDINGS):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ConfigError(f"{kind}={name}: there is no such file")
        return file
    for folder in _folders(kind):
        if (file := folder / f"{name}.yaml").is_file():
            return file
    known = names(kind)
    raise ConfigError(f"{kind}={name}: there is no such {kind}{hint(name, known)}; there are: {', '.join(known)}")


def title(name: str) -> str:
    """Returns the name in tables and results: that of a definition, of a YAML file or manifest, or of a folder."""
    place = Path(name).expanduser().absolute()  # so that "." has a name
    return place.stem if name.lower().endswith((*ENDINGS, *(f".{ending}" for ending in tables.ENDINGS))) else place.name


def read(kind: str, name: str, schema: type[T]) -> T:
    """Reads a definition as a config of class `schema`.

    Raises:
        ConfigError: there is no such definition, it is not YAML, or a field is wrong; the message names the file.
    """
    file = find(kind, name)
    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must have fields, as in `kind: utterances`")
    return load(schema, values, str(file))


def _folders(kind: str) -> list[Path]:
    return [CONF / kind, *(source.folder / "conf" / kind for source in plugins.sources())]
