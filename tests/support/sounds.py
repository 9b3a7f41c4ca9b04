"""Small recordings for the tests of preprocessing: coloured noise with pauses, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import load
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.shards.records import done_records, read_index


def sound(name: str, seconds: float, rate: int = 16_000, level: float = 0.1) -> np.ndarray:
    """Returns noise bursts of 0.4 s with pauses of 0.1 s, float32 in [-1, 1]."""
    length = round(seconds * rate)
    noise = keyed_rng("sound", name).standard_normal(length).astype(np.float32)
    burst = (np.arange(length) % (rate // 2) < 0.8 * (rate // 2)).astype(np.float32)
    return np.clip(level * noise * (burst + 0.001), -1, 1).astype(np.float32)


def write_corpus(root: Path, seconds: Mapping[str, float], **options: Any) -> Path:
    """Writes one file per name ("speaker/clip.flac") with the given number of seconds."""
    for name, duration in seconds.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(name, duration), 16_000, **options)
    return root


def many(count: int, seconds: float = 2.0) -> dict[str, float]:
    """Returns names of `count` clips of five speakers, with their seconds."""
    return {f"speaker{number % 5}/clip{number:03d}.flac": seconds for number in range(count)}


def path_config(corpus: Path, out: Path, **values: Any) -> PreprocessConfig:
    """Returns a config as the command line composes it; the corpus's folders, if any, are its speakers."""
    folders = any(path.is_dir() for path in corpus.iterdir()) if corpus.is_dir() else False
    given = {
        "out": str(out),
        "corpus": {"name": "path", "path": str(corpus), "pattern": "^(?P<speaker>[^/]+)/" if folders else ""},
        "shard_mb": 0.1,
        **values,
    }
    return load(PreprocessConfig, given)


def contents(root: Path) -> dict[str, bytes]:
    """Returns every file of a data set, except scratch files and the report, which contains times."""
    files = (path for path in root.rglob("*") if path.is_file() and ".tmp" not in path.parts)
    files = (path for path in files if path.name != "report.html")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def index_rows(root: Path) -> list[dict[str, Any]]:
    """Returns the index rows of all finished shards of a data set."""
    return [row for record in done_records(str(root)) for row in read_index(str(root), record).to_pylist()]
