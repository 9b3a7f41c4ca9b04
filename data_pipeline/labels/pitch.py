"""Pitch as frame labels: 0 without a voice, else 1 + steps of 1/24 octave above 50 Hz, 100 a second.

F0 is found by the package swift-f0 (Nieradzik 2025, arXiv 2508.18440; MIT), which contains its network.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE

if TYPE_CHECKING:  # the model needs the definition of the labels alone
    from data_pipeline.audio.codecs import Wave

RATE_HZ: Final = 100
HOP: Final = SAMPLE_RATE // RATE_HZ
LOWEST_HZ: Final = 50.0
STEPS_PER_OCTAVE: Final = 24
CLASSES: Final = 130
"""One for frames without a voice, and 129 steps, up to 2 kHz."""
CONFIDENCE: Final = 0.5
"""Least confidence of a voiced frame, the package's own default."""
Labels = npt.NDArray[np.uint16]


def artefact() -> str:
    """Returns a sha256 of what determines the labels: their definition, and the version of the package.

    Raises:
        ConfigError: the package is missing.
    """
    try:
        version = metadata.version("swift-f0")
    except metadata.PackageNotFoundError:
        raise ConfigError("features=pitch: F0 is found by the package swift-f0: pip install swift-f0") from None
    definition = f"swift-f0 {version}: {CONFIDENCE} {LOWEST_HZ} {STEPS_PER_OCTAVE} {CLASSES} {RATE_HZ}"
    return hashlib.sha256(definition.encode()).hexdigest()


def pitch_labels() -> Callable[[Wave], Labels]:
    """Returns a function from (T,) audio at 16 kHz to the label of each 10 ms that begin in it."""
    detector = _detector()

    def compute(wave: Wave) -> Labels:
        frames = -(-len(wave) // HOP)
        if not frames:
            return np.zeros(0, np.uint16)
        found = detector.detect(wave, SAMPLE_RATE, fmin=LOWEST_HZ, fmax=2_000.0)
        centres = (np.arange(frames) + 0.5) / RATE_HZ
        nearest = np.abs(centres[:, None] - np.asarray(found.timestamps)[None]).argmin(1)
        return labels_from_f0(np.asarray(found.pitch_hz)[nearest], np.asarray(found.confidence)[nearest] >= CONFIDENCE)

    return compute


def labels_from_f0(f0_F: npt.NDArray[Any], voiced_F: npt.NDArray[Any]) -> Labels:
    """Returns the labels of F0 in Hz, (F,); 0 where there is no voice."""
    steps_F = np.round(STEPS_PER_OCTAVE * np.log2(np.maximum(f0_F, LOWEST_HZ) / LOWEST_HZ))
    return np.where(voiced_F, 1 + np.clip(steps_F, 0, CLASSES - 2), 0).astype(np.uint16)


@functools.cache
def _detector() -> Any:
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1, spin=False)
