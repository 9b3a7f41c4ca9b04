"""auricle targets: frame labels over shards, by k-means on MFCC or on a layer of a checkpoint."""

from __future__ import annotations

import functools

import numpy as np

from data_pipeline.audio import Wave
from data_pipeline.targets import Extractor, Matrix, TargetsConfig, make_targets, mfcc
from launch import job
from launch.verbs.preprocess import show


def run(arguments: list[str]) -> int:
    """Exit code 0 where all shards are labelled."""
    request = job.read("targets", TargetsConfig, arguments)
    if request is None:
        return 0
    config = request.config
    extractor = mfcc if config.features == "mfcc" else functools.partial(layer_of, config.features, config.layer)
    show(make_targets(config, extractor).rows())
    return 0


def layer_of(checkpoint: str, layer: int) -> Extractor:
    """The output of one layer of a frozen encoder. Raises ValueError for a layer that it does not have."""
    import torch

    from pretrain.evaluate.encoders import open_encoder

    encoder = open_encoder(checkpoint)
    torch.set_num_threads(1)

    def compute(wave: Wave) -> Matrix:
        layers = encoder.encode(torch.from_numpy(wave))
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer={layer}: {encoder.name} has the layers 0 to {len(layers) - 1}")
        return np.ascontiguousarray(layers[layer].float().numpy())

    return Extractor(compute, round(encoder.rate_hz))
