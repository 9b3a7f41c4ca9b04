"""Writes small shards of synthetic audio in the documented format, independently of the shard writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import SAMPLE_RATE


@dataclass(frozen=True)
class Sound:
    """One segment to write."""

    key: str
    length: int
    corpus: str = "a"
    language: str = "en"
    speaker: str = "s"
    broken: bool = False
    """Whether one sample is NaN; needs a shard of floating-point WAV."""


def wave_of(sound: Sound) -> np.ndarray:
    """Returns the int16 noise of a key."""
    return keyed_rng(0, sound.key).integers(-8000, 8000, sound.length).astype(np.int16)


def sounds(lengths: list[float], **fields: str) -> list[Sound]:
    """Returns segments of the given seconds."""
    return [
        Sound(f"{fields.get('corpus', 'a')}-{i:04d}", round(s * SAMPLE_RATE), **fields) for i, s in enumerate(lengths)
    ]


def write_shards(root: Path, shards: list[list[Sound]], codec: str = "flac") -> Path:
    """Writes one tar, index and record per list."""
    (root / "_done").mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(shards):
        _write_shard(root, f"shard-{number:04d}", content, codec)
    return root


def _write_shard(root: Path, name: str, content: list[Sound], codec: str) -> None:
    rows = []
    tar = root / f"{name}.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as out:
        for sound in content:
            offset = out.offset
            buffer = io.BytesIO()
            wave, subtype = wave_of(sound), "PCM_16"
            if sound.broken:
                wave, subtype = (wave / 2.0**15).astype(np.float32), "FLOAT"
                wave[sound.length // 2] = np.nan
            soundfile.write(buffer, wave, SAMPLE_RATE, format=codec.upper(), subtype=subtype)
            meta = {"speaker": sound.speaker, "text": f"words of {sound.key}", "labels": {"mood": "calm"}}
            for suffix, data in ((codec, buffer.getvalue()), ("json", json.dumps(meta).encode())):
                info = tarfile.TarInfo(f"{sound.key}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
            rows.append({
                "key": sound.key, "offset": offset, "size": out.offset - offset, "payload_offset": offset + 512,
                "payload_size": len(buffer.getvalue()), "suffix": codec, "n_samples": sound.length,
                "corpus": sound.corpus, "language": sound.language, "speaker": sound.speaker,
                "file_id": sound.key, "start": 0, "text_length": len(str(meta["text"])),
            })  # fmt: skip
        end = out.offset
    np.array([row["offset"] for row in rows] + [end], "<u8").tofile(f"{tar}.idx")
    pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tar, root / f"{name}.parquet")]
    record = {
        "unit": name, "shard": tar.name, "sha256": digests[0], "bytes": tar.stat().st_size, "index_sha256": digests[1],
        "segments": len(content), "samples": sum(sound.length for sound in content), "rejects": {},
    }  # fmt: skip
    (root / "_done" / f"{name}.json").write_text(json.dumps(record))
