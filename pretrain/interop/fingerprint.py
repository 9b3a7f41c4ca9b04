"""Fingerprint of the weights of a checkpoint."""

from __future__ import annotations

import hashlib

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
            with weights.open("rb") as file:
                found[str(weights)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
