"""Plants faults in shards: members whose content is damaged or shorter than stated."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

from data_pipeline.core.types import SAMPLE_RATE


def overwrite_member(tar: Path, name: str, content: bytes) -> None:
    """Overwrites the first bytes of a member with `content`; its size and position do not change."""
    with tarfile.open(tar) as opened:
        info = opened.getmember(name)
    with tar.open("rb+") as file:
        file.seek(info.offset_data)
        file.write(content[: info.size].ljust(info.size, b"\0"))


def silent_flac(seconds: int) -> bytes:
    """Returns digital silence as FLAC, a few bytes per second."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        block = np.zeros(60 * SAMPLE_RATE, np.int16)
        for _ in range(seconds // 60):
            file.write(block)
    return buffer.getvalue()


def replace_audio(root: Path, shard: str, audio: bytes, n_samples: int = SAMPLE_RATE) -> None:
    """Makes `audio` the only sample of a shard of one sample; index and record state `n_samples`."""
    tar = root / f"{shard}.tar"
    table = pq.read_table(root / f"{shard}.parquet")
    [row] = table.to_pylist()
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as out:
        info = tarfile.TarInfo(f"{row['key']}.{row['suffix']}")
        info.size = len(audio)
        out.addfile(info, io.BytesIO(audio))
    values = table.to_pydict() | {"payload_size": [len(audio)], "size": [tar.stat().st_size], "n_samples": [n_samples]}
    pq.write_table(type(table).from_pydict(values, schema=table.schema), root / f"{shard}.parquet")
    path = root / "_done" / f"{shard}.json"
    record = json.loads(path.read_text()) | {"bytes": tar.stat().st_size, "samples": n_samples}
    record["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    record["index_sha256"] = hashlib.sha256((root / f"{shard}.parquet").read_bytes()).hexdigest()
    path.write_text(json.dumps(record))
