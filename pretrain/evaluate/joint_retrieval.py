"""Retrieval by a joint embedding: how often what belongs to a query is among the nearest candidates of another kind.

Kinds are speech, text and image. Every row of the manifest that has both kinds asks for its counterpart among those of
all rows (recall at rank k, as in CLIP, arXiv 2103.00020, §3.1). Equal texts, and one image of several rows, are one
candidate, and every recording of a text is right for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.core.schema import ConfigError
from data_pipeline.loader.pieces import Kind, Piece, image_piece
from data_pipeline.loader.recordings import Unusable
from pretrain.evaluate.config import EvaluateConfig, items
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import Utterance, corpora_in_words, thinned
from pretrain.evaluate.metrics import Interval95, bootstrap
from pretrain.retrieval.embedder import Embedder
from pretrain.retrieval.vectors import Vectors

RANKS = (1, 5, 10)
BATCH = 16
"""Pieces of one kind that are computed together."""
Asked = list[tuple[Utterance, dict[Kind, str]]]
"""Rows with the key of each kind that they have; the same key is the same candidate."""
Pair = tuple[str, str, str]
"""Keys of query and candidate, and the speaker of their row."""


def report(
    config: EvaluateConfig,
    embedder: Embedder,
    utterances: Sequence[Utterance],
    waves: Waves,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Interval95]]:
    """Yields (measure, recall with its 95 % interval over speakers) of every direction between two kinds.

    Args:
        config: split, corpora and number of utterances.
        embedder: gives the vectors.
        utterances: the manifest.
        waves: decoded audio.
        say: receives a line per direction, and one for what cannot be embedded.

    Raises:
        ConfigError: no two kinds have a candidate of their own.
    """
    asked = _asked(config, utterances)
    vectors, rejects = _vectors(embedder, asked, waves)
    if rejects:
        say(f"retrieval: cannot be embedded: {len(rejects)}, such as {rejects[0].name} ({rejects[0].error})")
    pairs = {(a, b): _pairs(a, b, asked, vectors) for a, b in itertools.permutations(vectors, 2)}
    if not any(pairs.values()):
        raise ConfigError(
            f"task=retrieval: in split ask={config.ask} no row has two of {', '.join(embedder.kinds)} that can be "
            "embedded; the manifest needs the columns text or image, as the shards of the training"
        )
    for (query, candidate), asking in pairs.items():
        if not asking:
            continue
        found = ranks(asking, vectors[query], vectors[candidate])
        for most in RANKS:
            tally: dict[str, tuple[float, float]] = {}
            for rank, (_, _, speaker) in zip(found, asking, strict=True):
                hits, count = tally.get(speaker, (0.0, 0.0))
                tally[speaker] = (hits + (rank <= most), count + 1.0)
            yield f"recall@{most}, {query} → {candidate}", bootstrap([tally], config.bootstrap)
        candidates = len(vectors[candidate])
        say(
            f"retrieval, {query} → {candidate}: {len(asking)} queries, {candidates} candidates (chance at rank 1 about "
            f"{1 / candidates:.1%}), recall@1 {np.mean(found <= 1):.1%}, median rank {np.median(found):g}"
        )


def _asked(config: EvaluateConfig, utterances: Sequence[Utterance]) -> Asked:
    """Returns the rows of the split and corpora that the config names, at most `max_utterances`."""
    corpora = items(config.corpora)
    chosen = [u for u in utterances if u.part == config.ask and (not corpora or u.corpus in corpora)]
    if not chosen:
        raise ConfigError(
            f"task=retrieval: no row in split ask={config.ask} of {corpora_in_words(corpora, utterances)}"
        )
    found: Asked = []
    for u in thinned(chosen, config.max_utterances):
        keys: dict[Kind, str] = {"speech": u.name}
        if u.text.strip():
            keys["text"] = " ".join(u.text.split())
        if u.image:
            keys["image"] = u.image
        found.append((u, keys))
    return found


def _vectors(embedder: Embedder, asked: Asked, waves: Waves) -> tuple[dict[Kind, dict[str, Vectors]], list[Unusable]]:
    """Returns the unit vectors by kind and key, and what has none; kinds without a tower are left out."""
    rejects: list[Unusable] = []

    def pieces() -> Iterator[Piece | Unusable]:
        seen: set[tuple[Kind, str]] = set()
        for utterance, keys in asked:
            for kind, key in keys.items():
                if kind in embedder.kinds and (kind, key) not in seen:
                    seen.add((kind, key))
                    yield _piece(kind, key, utterance, waves)

    table = embedder.table(pieces(), BATCH, rejects.append, lambda: None)
    found: dict[Kind, dict[str, Vectors]] = {}
    for kind, key, vector in zip(table.kinds, table.names, table.vectors_NE, strict=True):
        found.setdefault(kind, {})[key] = vector  # type: ignore[arg-type]  # the kinds of the pieces
    return found, rejects


def _piece(kind: Kind, key: str, utterance: Utterance, waves: Waves) -> Piece | Unusable:
    if kind == "speech":
        return Piece("speech", key, wave=waves(utterance).numpy())
    if kind == "text":
        return Piece("text", key, text=key)
    return image_piece(key, key)


def _pairs(query: Kind, candidate: Kind, asked: Asked, vectors: dict[Kind, dict[str, Vectors]]) -> list[Pair]:
    """Returns the rows that have both kinds."""
    return [
        (keys[query], keys[candidate], utterance.speaker)
        for utterance, keys in asked
        if keys.get(query) in vectors[query] and keys.get(candidate) in vectors[candidate]
    ]


def ranks(asking: Sequence[Pair], queries: dict[str, Vectors], candidates: dict[str, Vectors]) -> npt.NDArray[np.int64]:
    """Returns the rank of the nearest right candidate of each pair, from 1; equally near wrong ones come before it.

    Args:
        asking: pairs of keys; every candidate that a pair has with a query's key is right for the query.
        queries: unit vectors (E,) by key.
        candidates: likewise.
    """
    names = list(candidates)
    places = {name: place for place, name in enumerate(names)}
    candidates_NE = np.stack([candidates[name] for name in names])
    right: dict[str, set[str]] = {}
    for query, candidate, _ in asking:
        right.setdefault(query, set()).add(candidate)
    found = []
    for query, _, _ in asking:
        similar_N = candidates_NE @ queries[query]
        is_right_N = np.zeros(len(names), bool)
        is_right_N[[places[name] for name in right[query]]] = True
        found.append(1 + int((similar_N[~is_right_N] >= similar_N[is_right_N].max()).sum()))
    return np.array(found)
