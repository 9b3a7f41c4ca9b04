"""Opens the shard files of a data set: local, remote or cached."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.cache import CachedShards
from data_pipeline.shards.local import ShardFiles
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.remote import RemoteShards


def open_files(config: DataConfig, records: Sequence[DoneRecord]) -> ShardFiles:
    """The right way to read `config.shards`. Raises ConfigError for settings that contradict each other."""
    keep = 2 * config.shuffle_window
    if not is_url(config.shards):
        return ShardFiles(FileStore(config.shards).root, records, keep, config.verify)
    if config.cache_gigabytes:
        folder = Path(config.cache or Path(tempfile.gettempdir()) / f"auricle-{os.getuid()}").expanduser()
        limit = int(config.cache_gigabytes * 1e9)
        return CachedShards(config.shards, records, keep, config.verify, folder, limit)
    if config.verify:
        raise ConfigError(
            "data.verify=true needs whole shards, but data.cache_gigabytes=0 reads only ranges of remote ones; "
            "set data.cache_gigabytes to the room for local copies"
        )
    return RemoteShards(config.shards, records, keep, verify=False)
