"""auricle targets: frame labels over shards, by k-means on MFCC or on a layer of a checkpoint."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.storage import FileStore
from data_pipeline.labels.kmeans import KMEANS, Extractor, Matrix, TargetsConfig, make_targets, mfcc
from data_pipeline.labels.store import file_name
from data_pipeline.shards.writer import done_records
from launch.commands.preprocess import show
from launch.config import TargetsJob
from launch.workflows import submit

KIND = TargetsConfig


def run(arguments: list[str]) -> int:
    """Exit code 0 where all shards are labelled, or the job is queued."""
    return submit.run("targets", TargetsJob, arguments)


def work(config: TargetsConfig) -> None:
    """Labels what is not labelled. Raises OSError where something could not be written."""
    extractor = mfcc if config.features == "mfcc" else functools.partial(layer_of, config.features, config.layer)
    show(make_targets(config, extractor, weights_of(config)).rows())


def made_from(config: TargetsConfig) -> dict[str, str]:
    """The shards, and the checkpoint whose layer is taken."""
    shards = hashlib.sha256("".join(record.sha256 for record in done_records(config.shards)).encode()).hexdigest()
    return {"shards": shards, **({} if config.features == "mfcc" else checkpoint_fingerprint(config.features))}


def weights_of(config: TargetsConfig) -> str:
    """What tells the checkpoint from another at the same place; empty for MFCC."""
    return "" if config.features == "mfcc" else " ".join(checkpoint_fingerprint(config.features).values())


def made(config: TargetsConfig) -> dict[str, str]:
    """Centres and labels of every shard."""
    store = FileStore(config.out)
    names = [KMEANS, *(file_name(record.shard) for record in done_records(config.shards))]
    if not all(store.exists(name) for name in names):
        return {}
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in names}


def checkpoint_fingerprint(checkpoints: str) -> dict[str, str]:
    """sha256 of the weights of each checkpoint of a comma-separated list."""
    from pretrain.evaluate.frozen_encoders import find_checkpoint
    from pretrain.interop.init_weights import weight_files

    found = {}
    for text in checkpoints.split(","):
        for weights in weight_files(find_checkpoint(text.strip())):
            with weights.open("rb") as file:
                found[str(weights)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def layer_of(checkpoint: str, layer: int) -> Extractor:
    """The output of one layer of a frozen encoder. Raises ValueError for a layer that it does not have."""
    import torch

    from pretrain.evaluate.frozen_encoders import open_encoder

    encoder = open_encoder(checkpoint)
    torch.set_num_threads(1)

    def compute(wave: Wave) -> Matrix:
        layers = encoder.encode(torch.from_numpy(wave))
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer={layer}: {encoder.name} has the layers 0 to {len(layers) - 1}")
        return np.ascontiguousarray(layers[layer].float().numpy())

    return Extractor(compute, round(encoder.rate_hz))
