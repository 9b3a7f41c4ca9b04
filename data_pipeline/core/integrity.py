"""`checksums.json`: the sha256 of those files of a folder that no other record names, for `verify` to hold them to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from data_pipeline.core.storage import FileStore

CHECKSUMS: Final = "checksums.json"
REPORT: Final = "report.html"
"""In the data set: the report of its preprocessing, sealed with the other files."""


def with_check(values: dict[str, Any]) -> bytes:
    """These values as JSON, with a checksum of them in the field `check`."""
    plain = {key: value for key, value in values.items() if key != "check"}
    check = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, "check": check}, indent=1, sort_keys=True).encode() + b"\n"


def write_checksums(store: FileStore, names: Iterable[str]) -> None:
    """Notes what these files of a folder hold now."""
    sums = {name: hashlib.sha256(store.read(name)).hexdigest() for name in sorted(names)}
    store.replace(CHECKSUMS, with_check({"sha256": sums}))


def altered_files(store: FileStore) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it); nothing where there are no checksums."""
    if not store.exists(CHECKSUMS):
        return
    content = store.read(CHECKSUMS)
    try:
        values = json.loads(content)
        if with_check(values) != content:
            raise ValueError("its checksum is another")
        sums = dict(values["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield CHECKSUMS, f"is not as it was written ({error})"
        return
    for name, sha256 in sums.items():
        if not store.exists(name):
            yield name, "is missing"
        elif hashlib.sha256(store.read(name)).hexdigest() != sha256:
            yield name, "is not what the last job that ended left; the same command again writes it anew"


def sealed(page: str) -> bytes:
    """An HTML page with the sha256 of all before as a comment at its end."""
    content = page.encode("utf-8", "replace")
    return content + f"<!-- sha256 {hashlib.sha256(content).hexdigest()} -->\n".encode()


def is_sealed(content: bytes) -> bool:
    """Whether a page is as `sealed` wrote it."""
    page, mark, _ = content.rpartition(b"<!-- sha256 ")
    return bool(mark) and sealed(page.decode("utf-8", "replace")) == content
