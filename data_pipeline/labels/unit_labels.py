"""Frame labels of single recordings, by the k-means centres that labelled a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.json_object import parse_object
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.labels.features import Extractor, Matrix, kaldi_mfcc
from data_pipeline.labels.kmeans import KMEANS, assign
from data_pipeline.labels.store import LabelMetadata


@dataclass(frozen=True)
class UnitLabeller:
    """Labels recordings by their nearest centres."""

    extractor: Extractor
    centres: Matrix

    def __call__(self, wave_T: Wave) -> npt.NDArray[np.int64]:
        """Returns the label of each frame, (F,), of a recording at 16 kHz."""
        return assign(self.extractor.compute(wave_T), self.centres)[0]


def open_labeller(folder: str) -> UnitLabeller:
    """Opens the centres of a folder that `auricle targets features=mfcc` wrote.

    Raises:
        ConfigError: the folder has no labels, none by k-means of MFCC, or centres that are not those of its labels.
        DamagedFileError: its labels.json cannot be read.
    """
    store, metadata = FileStore(folder), LabelMetadata.read(folder)
    try:
        settings = parse_object(store.read("targets.json"))
        content = store.read(KMEANS)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{folder}: its centres cannot be read ({error}); give `auricle targets` again") from None
    if (features := settings.get("features")) != "mfcc":
        raise ConfigError(f"{folder}: holds labels of features={features}; recordings are labelled by mfcc alone")
    if hashlib.sha256(content).hexdigest() != metadata.artefact:
        raise ConfigError(f"{folder}: {KMEANS} is not that of its labels; give `auricle targets` again")
    extractor = kaldi_mfcc(metadata.rate_hz, float(settings.get("silence_db") or 0.0))
    return UnitLabeller(extractor, load_tensors(content)["centres"])
