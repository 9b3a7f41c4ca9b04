"""The plan of episodes of a data set: reads the classes and speakers of all its segments."""

from __future__ import annotations

from data_pipeline.loader.fetch import check_labels, texts_of_shard
from data_pipeline.sampling.catalog import Catalogue
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.episodes import EpisodePlan, make_episode_plan
from data_pipeline.shards.local import ShardFiles


def read_episode_plan(
    files: ShardFiles, catalogue: Catalogue, config: DataConfig, seed: int, least_samples: int
) -> EpisodePlan:
    """Returns the plan of the episodes of shards, see `make_episode_plan`.

    Raises:
        ConfigError: no segment has the label, or there are too few classes, recordings or speakers.
        ShardError: a shard cannot be used.
        StorageReadError: the storage does not answer.
    """
    check_labels(files, (config.episodes.label,))

    def values(label: str) -> list[str]:
        return [value for number in range(len(files.records)) for value in texts_of_shard(files, number, label)]

    classes, speakers = values(config.episodes.label), values("speaker")
    return make_episode_plan(catalogue, config, seed, classes, speakers, least_samples)
