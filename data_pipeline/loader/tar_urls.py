"""The tars that `data.shards` names for `data.reader=webdataset`: folders, URLs, and names with braces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import fsspec

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_url

PROTOCOLS: Final = ("file", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "hf", "memory")
"""Protocols of shard URLs. webdataset's own opener, which runs commands (`pipe:`, curl, gsutil), is not used."""


def shard_urls(shards: Sequence[str]) -> list[str]:
    """Returns the tars that `data.shards` names.

    Args:
        shards: folders or URLs of tars, or paths and URLs of tars with braces (`part-{000..127}.tar`), separated by
            spaces.

    Raises:
        ConfigError: there are no tars, or a URL has a refused protocol, such as `pipe:`.
    """
    return [url for place in shards for url in _tars_of(place)]


def _tars_of(place: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        urls = [url for part in place.split() for url in braceexpand(part)]
    except ValueError as error:
        raise ConfigError(f"data.shards={place}: {error}") from None
    for url in urls:
        protocol, colon, _ = url.partition("://" if "://" in url else ":")
        if "::" in url or "|" in url or (colon and protocol not in PROTOCOLS):
            raise ConfigError(
                f"data.shards={url}: shards are read from paths and {', '.join(PROTOCOLS)} URLs; commands (pipe:) and "
                "chained URLs are refused"
            )
    if len(urls) == 1 and not urls[0].endswith(".tar"):
        store = FileStore(urls[0])
        urls = [f"{store.root}/{name}" for name in store.names("", ".tar")]
    if not urls:
        raise ConfigError(f"data.shards={place}: names no .tar files")
    return urls


def open_tar(url: str) -> IO[bytes]:
    """Opens a tar on a local path or behind an fsspec URL."""
    path = url if is_url(url) else str(Path(url.removeprefix("file://")).expanduser())
    file: IO[bytes] = fsspec.open(path, "rb").open()
    return file
