"""Labels in WebDataset tars of other writers: JSON and text members, and other writers' names of our labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

MOST_LABEL_BYTES: Final = 1 << 20
"""Size limit of JSON and text members, in bytes."""
ALIASES: Final = {
    "text": ("text", "transcript", "transcription", "sentence", "txt"),
    "speaker": ("speaker", "speaker_id", "spk", "client_id"),
    "language": ("language", "lang", "locale"),
    "corpus": ("corpus", "dataset"),
    "file_id": ("file_id", "audio_filepath", "id"),
}
"""Label of our shards -> names of JSON fields, of which the first that exists is used."""


class UnusableError(ValueError):
    """Raised for a member or sample that cannot be used; `reason` is a short code for reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def member_labels(documents: Mapping[str, bytes], key: str, stem: str) -> dict[str, str]:
    """Returns the labels of one audio member: scalars of its JSON and the text of its .txt, under our names.

    Args:
        documents: the JSON and text members of the sample by name.
        key: the sample's key; members `<key>.json` and `<key>.txt` describe all of its audio.
        stem: name of the audio member without its ending; members with this name take precedence.

    Raises:
        UnusableError: a member is not a JSON object or not UTF-8.
    """
    labels: dict[str, str] = {}
    for name in (f"{key}.json", f"{stem}.json"):
        if name in documents:
            labels |= _flat(parse_member(name, documents[name]))
    for name in (f"{key}.txt", f"{stem}.txt"):
        if name in documents:
            try:
                labels["text"] = documents[name].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UnusableError("labels", f"{name} is not UTF-8 ({error.reason})") from None
    for label, names in ALIASES.items():
        value = next((labels[name] for name in names if labels.get(name)), "")
        if value:
            labels[label] = value
    return labels


def parse_member(name: str, content: bytes) -> dict[str, Any]:
    """Returns the JSON object in a member or line called `name`. Raises UnusableError."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableError("labels", f"{name} cannot be parsed ({error})") from None
    if not isinstance(document, dict):
        raise UnusableError("labels", f"{name} is a {type(document).__name__}, not an object")
    return document


def _flat(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the scalars of a JSON object and of its field `labels`, as text."""
    nested = document.get("labels")
    values = {**(nested if isinstance(nested, dict) else {}), **document}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if isinstance(value, str | int | float | bool) and name not in ("key", "__key__", "__url__")
    }
