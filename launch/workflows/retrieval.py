"""Embeds recordings, texts and images with a run, and searches among them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.schema import ConfigError
from data_pipeline.loader.pieces import Piece, find_piece, is_image_file, pieces
from data_pipeline.loader.recordings import Unusable
from launch.cli.tables import show, table, warn
from launch.exit_codes import ExitCode
from pretrain.retrieval import gallery
from pretrain.retrieval.config import EmbedConfig, EmbedderConfig, SearchConfig
from pretrain.retrieval.embedder import Embedder, open_embedder
from pretrain.retrieval.vectors import VectorTable, read_vectors


def embed(config: EmbedConfig) -> ExitCode:
    """Writes the vectors of files and texts; what cannot be embedded is listed on standard error.

    Returns:
        DONE, or FAILED if something was left out.

    Raises:
        ConfigError: a file, the checkpoint or the head does not exist, or nothing could be embedded.
        ValueError: the checkpoint or shards are damaged.
        OSError: the output cannot be written.
    """
    embedder = open_embedder(config.checkpoint, config.head, config.device)
    made, rejects = _vectors(embedder, config, config.files, config.texts)
    if not len(made):
        raise ConfigError(f"files={list(config.files)}: nothing could be embedded ({_counted(rejects)})")
    made.write(Path(config.out).expanduser())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(made.kinds).items()))
    left_out = f"; left out {rejects.total():,} ({_counted(rejects)})" if rejects else ""
    warn(f"{config.out}: {len(made):,} vectors ({kinds}) of {made.vectors_NE.shape[1]} numbers{left_out}")
    return ExitCode.FAILED if rejects else ExitCode.DONE


def search(config: SearchConfig) -> ExitCode:
    """Prints what is nearest to a query, and writes a gallery of it.

    Raises:
        ConfigError: a file, the checkpoint or the head does not exist, the index is of another model, or the query
            cannot be embedded.
        ValueError: the checkpoint or shards are damaged.
        OSError: the gallery cannot be written.
    """
    embedder = open_embedder(config.checkpoint, config.head, config.device)
    query = _query(config)
    rejected: list[Unusable] = []
    asked = embedder.table([query], 1, rejected.append, lambda: None)
    if rejected:
        raise ConfigError(f"query={config.query}: {rejected[0].error}")
    index = _index(embedder, config)
    found = index.search(asked.vectors_NE[0], config.top, config.kinds)
    if not found:
        raise ConfigError(f"kinds={list(config.kinds)}: the index has none of them, only {sorted(set(index.kinds))}")
    rows = [(rank, score, index.kinds[row], index.names[row]) for rank, (row, score) in enumerate(found, start=1)]
    if config.format == "json":
        listed = [
            {"rank": rank, "score": round(score, 6), "kind": kind, "name": name, "place": index.places[row]}
            for (rank, score, kind, name), (row, _) in zip(rows, found, strict=True)
        ]
        print(json.dumps(listed, ensure_ascii=False, indent=1))
    else:
        listed_rows = [(r, f"{s:.3f}", k, n) for r, s, k, n in rows]
        show(table(("rank", "cosine", "kind", "name"), listed_rows, keep={3}))
    if config.gallery:
        results = [
            gallery.SearchResult(rank, score, kind, name, find_piece(kind, name, index.places[row]))  # type: ignore[arg-type]
            for (rank, score, kind, name), (row, _) in zip(rows, found, strict=True)
        ]
        path = Path(config.gallery).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gallery.page(query, results))
        warn(f"gallery: {config.gallery}")
    return ExitCode.DONE


def _index(embedder: Embedder, config: SearchConfig) -> VectorTable:
    tables = [place for place in config.index if place.endswith(".parquet")]
    if not tables:
        try:
            return _vectors(embedder, config, config.index, ())[0]
        except ConfigError as error:
            raise ConfigError(str(error).replace("files=", "index=", 1)) from None
    if len(config.index) > 1:
        raise ConfigError(f"index={list(config.index)}: give one table of vectors, or files and folders")
    made = read_vectors(Path(tables[0]).expanduser())
    if made.model != embedder.name:
        raise ConfigError(
            f"index={tables[0]}: its vectors are of another model or head than checkpoint={config.checkpoint}; make it "
            f"again with `auricle embed checkpoint={config.checkpoint} files=… out={tables[0]}`"
        )
    return made


def _query(config: SearchConfig) -> Piece:
    kind, path = config.query_kind, Path(config.query).expanduser()
    if kind == "auto":
        is_file = path.is_file()
        kind = "image" if is_file and is_image_file(path.name) else "speech" if is_file else "text"
    if kind == "text":
        return Piece("text", config.query, text=config.query)
    if not path.is_file():
        raise ConfigError(f"query={config.query}: there is no such file; a text needs query_kind=text")
    found = next(iter(pieces([config.query])))
    if not isinstance(found, Piece):
        raise ConfigError(f"query={config.query}: {found.error}")
    if found.kind != kind:
        raise ConfigError(f"query={config.query}: query_kind={kind}, but its ending is that of another kind")
    return found


def _vectors(
    embedder: Embedder, config: EmbedderConfig, places: Sequence[str], texts: Sequence[str]
) -> tuple[VectorTable, Counter[str]]:
    """Embeds with a progress bar; reports what is left out, and returns its number by reason."""
    rejects: Counter[str] = Counter()

    def reject(unusable: Unusable) -> None:
        rejects[unusable.reason] += 1
        warn(f"left out {unusable.name}: {unusable.error}")

    columns = (TextColumn("embedding"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn())
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        made = embedder.table(pieces(places, texts), config.batch, reject, lambda: bar.update(task, advance=1))
    return made, rejects


def _counted(rejects: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in rejects.most_common()) or "there is nothing"
