"""Licences of the recordings in a data set: `_licences/HASH.json` for each corpus."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping

from data_pipeline.core.json_object import parse_object
from data_pipeline.core.storage import FileStore

FOLDER = "_licences"


def record_licences(root: str, licences: Mapping[str, str]) -> None:
    """Writes the licences of corpora beside their shards, in place of earlier ones.

    Args:
        root: folder or URL of the data set.
        licences: name of the licence by corpus.
    """
    for corpus, licence in licences.items():
        name = hashlib.sha256(corpus.encode()).hexdigest()[:16]
        text = json.dumps({"corpus": corpus, "licence": licence}, sort_keys=True)
        FileStore(root).replace(f"{FOLDER}/{name}.json", text.encode() + b"\n")


def read_licences(root: str) -> dict[str, str]:
    """Returns the recorded licence of each corpus of a data set; files that cannot be read are left out."""
    store, found = FileStore(root), {}
    with contextlib.suppress(OSError):
        for name in store.names(FOLDER, ".json"):
            with contextlib.suppress(OSError, ValueError):
                row = parse_object(store.read(f"{FOLDER}/{name}"))
                found[str(row.get("corpus", ""))] = str(row.get("licence", ""))
    return {corpus: licence for corpus, licence in found.items() if licence}
