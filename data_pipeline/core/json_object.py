"""Reads a file that holds one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose content is an object.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it is missing.
        ValueError: it is not UTF-8 or JSON, is nested too deeply, or is not an object.
    """
    try:
        values = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"must contain a JSON object, not {json.dumps(values)[:40]}")
    return values
