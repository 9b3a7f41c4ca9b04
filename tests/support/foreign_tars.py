"""WebDataset tars as other tools write them: audio of several codecs with JSON labels."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
import webdataset


def wave(seed: int, seconds: float = 0.7, rate: int = 16_000) -> np.ndarray:
    """Returns int16 noise that no other seed gives."""
    return np.random.default_rng(seed).integers(-8000, 8000, round(seconds * rate)).astype(np.int16)


def encoded(samples: np.ndarray, suffix: str = "flac", rate: int = 16_000) -> bytes:
    """Returns a sound file by its ending."""
    forms = {"flac": "FLAC", "wav": "WAV", "opus": "OGG", "ogg": "OGG", "mp3": "MP3"}
    subtypes = {"opus": "OPUS", "ogg": "VORBIS"}
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=forms[suffix], subtype=subtypes.get(suffix))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_foreign(root: Path, tars: int = 3, per_tar: int = 20) -> Path:
    """Writes tars with webdataset's own writer."""
    root.mkdir(parents=True, exist_ok=True)
    for t in range(tars):
        with webdataset.TarWriter(str(root / f"part-{t:03d}.tar")) as writer:
            for i in range(per_tar):
                n, suffix = t * per_tar + i, ("flac", "wav", "opus", "mp3", "ogg")[i % 5]
                about = {"transcript": f"words {n}", "speaker_id": n % 7, "lang": "de", "mood": "calm", "align": [1, 2]}
                writer.write({"__key__": f"utt{n:04d}", suffix: encoded(wave(n), suffix), "json": about})
    return root
