"""Reads files that hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """Raised for a file whose content is damaged, unlike one with a wrong value: copy or write it again, then retry."""


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose content is an object.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it is missing.
        ValueError: it is not UTF-8 or JSON, is nested too deeply, or is not an object.
    """
    return parse_object(path.read_bytes())


def read_optional(path: Path, remedy: str) -> dict[str, Any] | None:
    """Reads a JSON file whose content is an object; None if the file is missing.

    Raises:
        DamagedFileError: it cannot be read, or is not a JSON object; the message ends with `remedy`.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: cannot be read as JSON ({error}); {remedy}") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Returns the object in the content of a JSON file. Raises ValueError as in `read_object`."""
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"must contain a JSON object, not {json.dumps(values)[:40]}")
    return values
