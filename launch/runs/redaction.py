"""What must not land in a run folder, which people share: addresses with passwords, signed addresses, keys, tokens."""

from __future__ import annotations

import os
import re
from typing import Any

from data_pipeline.core.schema import ConfigError

NAME = re.compile(r"(token|secret|passw|credential|api_?key|private_?key|access_?key)", re.IGNORECASE)
"""Variables and fields that hold one."""
ADDRESS = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|[?&][\w-]*(token|secret|passw|credential|sig|key)[\w-]*=[^&\s]", re.IGNORECASE
)
"""A password before the host, or a signature behind the path."""
KEY = re.compile(
    r"\b((AKIA|ASIA)[0-9A-Z]{16}|hf_\w{30,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{16,}|sk-[\w-]{30,}"
    r"|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+|Bearer\s+[\w.~+/-]{16,})"
)
"""Keys by the shape that their issuers give them: Amazon, Hugging Face, GitHub, GitLab, OpenAI, Slack, Google, JWT."""
PWD = re.compile(r"(^|[^a-z])pwd['\"]?\s*[=:]\s*['\"]?[^\s'\"$/~.]", re.IGNORECASE)
"""A password; the working directory, which has the same name, is a path or a variable."""
BEGIN, END = (re.compile(rf"-----{word} [A-Z ]*PRIVATE KEY") for word in ("BEGIN", "END"))
BODY = re.compile(r"[-+ ]?\s*(?=\S*[a-z])(?=\S*[A-Z])[A-Za-z0-9+/]{60,}={0,2}\s*")
"""A whole line of such a key, as a diff may show it without its first line."""
SHORTEST = 8
"""Letters of a variable's value that is looked for elsewhere."""


def holds_secret(text: str) -> bool:
    """Whether `text` holds an address with a password, a key, or what a variable of this process keeps secret."""
    if any(shape.search(text) for shape in (ADDRESS, KEY, PWD, BEGIN)):
        return True
    return any(value in text for name, value in os.environ.items() if NAME.search(name) and _is_secret(value))


def _is_secret(value: str) -> bool:
    return len(value) >= SHORTEST and not value.startswith("/")  # a path to a file of credentials is none


def without_secrets(lines: list[str]) -> list[str]:
    """Those lines (or words) that neither hold a secret of a known shape nor name one, and lie in no private key."""
    kept, inside = [], False
    for line in lines:
        inside = not line.startswith(("@@", "diff ")) and (inside or bool(BEGIN.search(line)))
        if not (inside or BODY.fullmatch(line) or NAME.search(line) or holds_secret(line)):
            kept.append(line)
        inside = inside and not END.search(line)
    return kept


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
