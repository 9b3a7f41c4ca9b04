"""What must not land in a run folder, which people share: addresses with passwords, signed addresses, keys, tokens."""

from __future__ import annotations

import os
import re
from typing import Any

from data_pipeline.schema import ConfigError

NAME = re.compile(r"(token|secret|passw|credential|api_?key|private_?key|access_?key)", re.IGNORECASE)
"""Variables and fields that hold one."""
ADDRESS = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|[?&][\w-]*(token|secret|passw|credential|sig|key)[\w-]*=[^&\s]", re.IGNORECASE
)
"""A password before the host, or a signature behind the path."""
KEY = re.compile(r"\b((AKIA|ASIA)[0-9A-Z]{16}|hf_\w{30,}|gh[pousr]_\w{30,}|sk-[\w-]{30,})\b")
"""Keys by the shape that their issuers give them: Amazon, Hugging Face, GitHub, OpenAI."""
SHORTEST = 8
"""Letters of a variable's value that is looked for elsewhere."""


def holds_secret(text: str) -> bool:
    """Whether `text` holds an address with a password, a key, or what a variable of this process keeps secret."""
    if ADDRESS.search(text) or KEY.search(text):
        return True
    return any(value in text for name, value in os.environ.items() if NAME.search(name) and _is_secret(value))


def _is_secret(value: str) -> bool:
    return len(value) >= SHORTEST and not value.startswith("/")  # a path to a file of credentials is none


def without_secrets(lines: list[str]) -> list[str]:
    """Those lines (or words) that neither hold a secret nor name one."""
    return [line for line in lines if not NAME.search(line) and not holds_secret(line)]


def refuse_secrets(values: Any, path: str = "") -> None:
    """Raises ConfigError naming the field of a config that holds a secret: configs are kept in run folders."""
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_secrets(value, f"{path}.{name}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(value, path)
    elif isinstance(values, str) and holds_secret(values):
        raise ConfigError(
            f"{path}: holds an address with a password or a key, which would land in the run folder; give credentials "
            "by the environment (AWS_ACCESS_KEY_ID … or the storage's own config file)"
        )
