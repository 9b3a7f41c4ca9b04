"""Fingerprint of the weights of a checkpoint."""

from __future__ import annotations

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.labels.kmeans import TargetsConfig


def weights_of(config: TargetsConfig) -> str:
    """What tells the checkpoint from another at the same place; empty for MFCC."""
    return "" if config.features == "mfcc" else " ".join(checkpoint_fingerprint(config.features).values())


def checkpoint_fingerprint(checkpoints: str) -> dict[str, str]:
    """sha256 of the weights of each checkpoint of a comma-separated list."""
    from pretrain.checkpointing.locate import find_checkpoint
    from pretrain.interop.init_weights import weight_files

    found = {}
    for text in checkpoints.split(","):
        for weights in weight_files(find_checkpoint(text.strip())):
            found[str(weights)] = sha256_of(weights)
    return found
