"""Features of one layer of a checkpoint, as input of `auricle targets`."""

from __future__ import annotations

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.labels.features import Extractor, Matrix


def layer_of(checkpoint: str, layer: int) -> Extractor:
    """Returns an extractor of one layer of a frozen encoder; it raises ValueError if the encoder lacks the layer."""
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
