"""Builds corpora with the irregularities of real ones: unusable rows, spans, missing files, varying column names."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_pipeline.core.schema import load
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import Discovered
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.plan_file import WorkUnit
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.shards.records import DoneRecord, done_records, finished_units
from tests.support.sounds import sound, write_corpus


def jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Writes a JSON-lines manifest; rows that are texts are written unchanged."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def one_recording(folder: Path, rows: Iterable[Mapping[str, Any] | str], seconds: float = 20.0) -> Path:
    """Writes long.flac and a manifest whose rows refer to it by `audio_filepath`; returns the manifest."""
    write_corpus(folder, {"long.flac": seconds})
    named = (row if isinstance(row, str) else {"audio_filepath": "long.flac", **row} for row in rows)
    return jsonl(folder / "set.jsonl", named)


def two_people(path: Path, seconds: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Writes a stereo recording with one person per channel; returns the channels."""
    left, right = sound("left", seconds), sound("right", seconds)
    soundfile.write(path, np.stack([left, right], axis=1), SAMPLE_RATE)
    return left, right


def read_rows(path: Path, **config: Any) -> Discovered:
    """Returns the result of discovery on a manifest."""
    return discover(load(ManifestCorpus, {"name": "manifest", "path": str(path), **config}))


def reasons(found: Discovered) -> list[tuple[int, str]]:
    """Returns (row, reason) of each reject, by row."""
    return sorted((reject.row, reject.reason) for reject in found.rejects)


def samples_of(out: Path, corpus: Mapping[str, Any], **config: Any) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Processes a corpus as one unit; returns the JSON and the audio of each sample, by recording and start."""
    made: PreprocessConfig = load(PreprocessConfig, {"out": str(out), "corpus": dict(corpus), **config})
    process_unit(WorkUnit("0" * 16, tuple(discover(made.corpus).files)), made)
    found = []
    for record in done_records(str(out)) if any(unit.shard for unit in finished_units(str(out))) else ():
        with tarfile.open(out / record.shard) as tar:
            members = [tar.extractfile(info).read() for info in tar]  # type: ignore[union-attr]
        for audio, described in zip(members[::2], members[1::2], strict=True):
            found.append((json.loads(described), soundfile.read(io.BytesIO(audio), dtype="float32")[0]))
    return sorted(found, key=lambda sample: (sample[0]["file_id"], sample[0]["start"], sample[0]["n_samples"]))


def record_of(out: Path) -> DoneRecord:
    """Returns the record of a data set of one unit."""
    [record] = finished_units(str(out))
    return record


def common_voice(folder: Path, clips: Iterable[str], rows: Iterable[tuple[str, str]]) -> Path:
    """Writes a locale with these clips and one table, train.tsv, of (path, sentence); returns its folder."""
    write_corpus(folder / "clips", dict.fromkeys(clips, 0.2))
    lines = ["client_id\tpath\tsentence\tlocale", *(f"x\t{path}\t{text}\tde" for path, text in rows)]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def gigaspeech(folder: Path, audios: Iterable[Mapping[str, Any]], seconds: Mapping[str, float]) -> Path:
    """Writes a GigaSpeech folder with these recordings and a table of `audios`; returns it."""
    write_corpus(folder, seconds)
    (folder / "GigaSpeech.json").write_text(json.dumps({"language": "EN", "audios": list(audios)}))
    return folder


def giga_segment(begin: float, end: float, text: str = "WORDS", subsets: Iterable[str] = ("{S}",)) -> dict[str, Any]:
    """Returns a segment in the format of GigaSpeech's table."""
    return {"sid": f"s{begin}", "begin_time": begin, "end_time": end, "text_tn": text, "subsets": list(subsets)}
