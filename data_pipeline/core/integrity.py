"""`checksums.json`: sha256 of the files of a folder that have no other record; `verify` compares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from data_pipeline.core.storage import FileStore

CHECKSUMS: Final = "checksums.json"
REPORT: Final = "report.html"
"""Name of the preprocessing report in a data set; its checksum is at its end."""


def with_check(values: dict[str, Any]) -> bytes:
    """Returns these values as JSON, with their sha256 in the field `check`."""
    plain = {key: value for key, value in values.items() if key != "check"}
    check = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, "check": check}, indent=1, sort_keys=True).encode() + b"\n"


def write_checksums(store: FileStore, names: Iterable[str]) -> None:
    """Records the sha256 of these files of a folder."""
    sums = {name: hashlib.sha256(store.read(name)).hexdigest() for name in sorted(names)}
    store.replace(CHECKSUMS, with_check({"sha256": sums}))


def altered_files(store: FileStore) -> Iterator[tuple[str, str]]:
    """Yields (file, fault) for each file that is missing or altered; nothing if the folder has no checksums."""
    if not store.exists(CHECKSUMS):
        return
    content = store.read(CHECKSUMS)
    try:
        values = json.loads(content)
        if with_check(values) != content:
            raise ValueError("its own checksum differs")
        sums = dict(values["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield CHECKSUMS, f"checksum mismatch ({error})"
        return
    for name, sha256 in sums.items():
        if not store.exists(name):
            yield name, "is missing"
        elif hashlib.sha256(store.read(name)).hexdigest() != sha256:
            yield name, "checksum mismatch; the same command again replaces it"


def sealed(page: str) -> bytes:
    """Returns an HTML page with the sha256 of its content as a comment at its end."""
    content = page.encode("utf-8", "replace")
    return content + f"<!-- sha256 {hashlib.sha256(content).hexdigest()} -->\n".encode()


def is_sealed(content: bytes) -> bool:
    """Returns whether a page matches the sha256 that `sealed` wrote."""
    page, mark, _ = content.rpartition(b"<!-- sha256 ")
    return bool(mark) and sealed(page.decode("utf-8", "replace")) == content
