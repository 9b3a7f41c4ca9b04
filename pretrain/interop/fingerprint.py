"""Fingerprints of the weights of checkpoints."""

from __future__ import annotations

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.labels.config import TargetsConfig

COMPUTED = ("mfcc", "pitch")
"""Features that need no checkpoint."""


def weights_of(config: TargetsConfig) -> str:
    """Returns the checksums of the weight files from which `config.features` are computed; "" for MFCC and pitch."""
    return "" if config.features in COMPUTED else " ".join(checkpoint_fingerprint(config.features).values())


def checkpoint_fingerprint(checkpoints: str) -> dict[str, str]:
    """Returns the sha256 of each weight file, by path, of a comma-separated list of checkpoints."""
    from pretrain.checkpointing.locate import find_checkpoint
    from pretrain.interop.hf_folder import weight_files

    found = {}
    for given in filter(None, map(str.strip, checkpoints.split(","))):
        for weights in weight_files(find_checkpoint(given)):
            found[str(weights)] = sha256_of(weights)
    return found
