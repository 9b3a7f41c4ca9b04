"""Opens the shard files of a data set: local, remote or cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import private_folder
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.cache import CachedShards
from data_pipeline.shards.local import ShardFiles, ShardSet
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.remote import RemoteShards


def open_files(config: DataConfig, records: Sequence[DoneRecord]) -> ShardFiles:
    """Returns the files of `config.shards`.

    Args:
        config: the run's `data`.
        records: the finished shards in `config.shards`.

    Raises:
        ConfigError: settings contradict each other.
        StorageWriteError: the cache folder cannot be used.
    """
    shards = ShardSet(records, 2 * config.shuffle_window, config.verify, config.retry_seconds)
    if not shards.remote:
        return ShardFiles(shards)
    if config.cache_gigabytes:
        return CachedShards(shards, cache_folder(config), limit=int(config.cache_gigabytes * 1e9))
    if config.verify:
        raise ConfigError(
            "data.verify=true needs whole shards, but data.cache_gigabytes=0 reads only ranges of remote ones; "
            "set data.cache_gigabytes to the space for local copies"
        )
    return RemoteShards(shards)


def cache_folder(config: DataConfig) -> Path:
    """Returns `config.cache`, or if it is empty a private folder below the temporary one."""
    return Path(config.cache).expanduser() if config.cache else private_folder()
