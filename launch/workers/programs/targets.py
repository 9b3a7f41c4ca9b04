"""Makes frame labels of shards: pitch, or k-means on MFCC or on a layer of a checkpoint."""

from __future__ import annotations

import functools
import hashlib

from data_pipeline.core.progress import stages
from data_pipeline.core.storage import FileStore
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.kmeans import KMEANS, make_targets
from data_pipeline.labels.pitch_targets import PITCH, make_pitch_targets
from data_pipeline.labels.store import file_name
from data_pipeline.shards.records import done_records
from launch.cli.tables import show_rows

CONFIG = TargetsConfig


def work(config: TargetsConfig) -> None:
    """Labels the shards without labels. Raises OSError if labels could not be written."""
    from data_pipeline.labels.features import kaldi_mfcc
    from pretrain.evaluate.layer_features import layer_of
    from pretrain.interop.fingerprint import weights_of

    if config.features == PITCH:
        with stages() as begin:
            pitch = make_pitch_targets(config, begin)
        show_rows(pitch.rows())
        return
    extractor = functools.partial(layer_of, config.features, config.layer)
    if config.features == "mfcc":
        extractor = functools.partial(kaldi_mfcc, config.rate_hz, config.silence_db)
    with stages() as begin:
        summary = make_targets(config, extractor, weights_of(config), begin)
    show_rows(summary.rows())


def made_from(config: TargetsConfig) -> dict[str, str]:
    """Returns fingerprints of the shards, and of the checkpoint that features are computed with."""
    from pretrain.interop.fingerprint import COMPUTED, checkpoint_fingerprint

    shards = hashlib.sha256("".join(record.sha256 for record in done_records(config.shards)).encode()).hexdigest()
    return {"shards": shards, **({} if config.features in COMPUTED else checkpoint_fingerprint(config.features))}


def made(config: TargetsConfig) -> dict[str, str]:
    """Returns fingerprints of the k-means centres and of the labels of every shard."""
    store = FileStore(config.out)
    centres = [] if config.features == PITCH else [KMEANS]
    names = [*centres, *(file_name(record.shard) for record in done_records(config.shards))]
    if not all(store.exists(name) for name in names):
        return {}
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in names}


def preview(config: TargetsConfig) -> None:
    """Prints nothing: the command contains all information."""
