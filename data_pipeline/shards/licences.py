"""Licences of the recordings in a data set: `_licences/HASH.json` for each corpus, from `corpus.licence`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from data_pipeline.core.storage import FileStore, StorageError

FOLDER = "_licences"


def record_licence(root: str, corpora: Iterable[str], licence: str) -> None:
    """Writes the licence of corpora beside their shards, in place of an earlier one.

    Args:
        root: folder or URL of the data set.
        corpora: names of the corpora, as in the shards.
        licence: the licence's name.
    """
    for corpus in corpora:
        name = hashlib.sha256(corpus.encode()).hexdigest()[:16]
        text = json.dumps({"corpus": corpus, "licence": licence}, sort_keys=True)
        FileStore(root).replace(f"{FOLDER}/{name}.json", text.encode() + b"\n")


def read_licences(root: str) -> dict[str, str]:
    """Returns the recorded licence of each corpus of a data set; files that cannot be read are left out."""
    store, found = FileStore(root), {}
    try:
        for name in store.names(FOLDER, ".json"):
            row = json.loads(store.read(f"{FOLDER}/{name}"))
            if isinstance(row, dict):
                found[str(row.get("corpus", ""))] = str(row.get("licence", ""))
    except (OSError, StorageError, ValueError, RecursionError):
        pass
    return {corpus: licence for corpus, licence in found.items() if licence}
