"""auricle targets: frame labels over shards, by k-means on MFCC or on a layer of a checkpoint."""

from __future__ import annotations

import functools
import hashlib

from data_pipeline.core.storage import FileStore
from data_pipeline.labels.features import kaldi_mfcc
from data_pipeline.labels.kmeans import KMEANS, TargetsConfig, make_targets
from data_pipeline.labels.store import file_name
from data_pipeline.shards.records import done_records
from launch.cli.tables import show_rows
from launch.config import TargetsJob
from launch.workflows import submit
from pretrain.evaluate.layer_features import layer_of
from pretrain.interop.fingerprint import checkpoint_fingerprint, weights_of

KIND = TargetsConfig


def run(arguments: list[str]) -> int:
    """Exit code 0 where all shards are labelled, or the job is queued."""
    return submit.run("targets", TargetsJob, arguments)


def work(config: TargetsConfig) -> None:
    """Labels what is not labelled. Raises OSError where something could not be written."""
    extractor = kaldi_mfcc if config.features == "mfcc" else functools.partial(layer_of, config.features, config.layer)
    show_rows(make_targets(config, extractor, weights_of(config)).rows())


def made_from(config: TargetsConfig) -> dict[str, str]:
    """The shards, and the checkpoint whose layer is taken."""
    shards = hashlib.sha256("".join(record.sha256 for record in done_records(config.shards)).encode()).hexdigest()
    return {"shards": shards, **({} if config.features == "mfcc" else checkpoint_fingerprint(config.features))}


def made(config: TargetsConfig) -> dict[str, str]:
    """Centres and labels of every shard."""
    store = FileStore(config.out)
    names = [KMEANS, *(file_name(record.shard) for record in done_records(config.shards))]
    if not all(store.exists(name) for name in names):
        return {}
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in names}
