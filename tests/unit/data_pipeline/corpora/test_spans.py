"""Spans and labels given by a corpus reach the samples, with their times in the source recording."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_pipeline.audio.segmentation import marked
from data_pipeline.core.schema import load
from data_pipeline.core.types import Span
from data_pipeline.corpora.config import GigaSpeechCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.plan_file import WorkUnit
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.shards.records import done_records
from tests.support.sounds import sound, write_corpus


def samples(config: PreprocessConfig) -> list[tuple[dict[str, Any], np.ndarray]]:
    process_unit(WorkUnit("unit", tuple(discover(config.corpus).files)), config)
    found = []
    for record in done_records(config.out):
        with tarfile.open(Path(config.out, record.shard)) as tar:
            members = [tar.extractfile(info).read() for info in tar]  # type: ignore[union-attr]
        for sounding, described in zip(members[::2], members[1::2], strict=True):
            found.append((json.loads(described), soundfile.read(io.BytesIO(sounding), dtype="float32")[0]))
    return sorted(found, key=lambda sample: (sample[0]["file_id"], sample[0]["start"]))


def test_marked_spans_do_not_depend_on_the_block_size() -> None:
    wave = np.arange(1, 1001, dtype=np.float32)
    spans = [Span(10, 60), Span(40, 90), Span(400, 700), Span(990, 2000), Span(3000, 4000)]
    for size in (1, 7, 100, 1000):
        blocks = (wave[at : at + size] for at in range(0, 1000, size))
        found = [(start, len(piece), piece[0], whole) for _, start, piece, whole in marked(blocks, spans, 200)]
        assert found == [
            (10, 50, 11, True),
            (40, 50, 41, True),
            (400, 150, 401, False),
            (550, 150, 551, False),
            (990, 10, 991, True),
        ]


def test_gigaspeech_segments_become_samples(tmp_path: Path) -> None:
    root = tmp_path / "giga"
    root.mkdir()
    wave = sound("giga", 10.0)
    soundfile.write(root / "p1.flac", wave, 16_000)
    segments = [
        {"begin_time": 6.0, "end_time": 9.5, "text_tn": "SECOND", "speaker": "ben"},
        {"begin_time": 1.25, "end_time": 3.25, "text_tn": "FIRST", "speaker": "ann"},
    ]
    audios = [{"path": "p1.flac", "duration": 10.0, "subsets": ["{XS}"], "segments": segments}]
    (root / "GigaSpeech.json").write_text(json.dumps({"language": "EN", "audios": audios}))
    config = PreprocessConfig(out=str(tmp_path / "out"), corpus=GigaSpeechCorpus(path=str(root)))
    (first, heard), (second, _) = samples(config)
    assert (first["text"], first["speaker"], first["start"], first["n_samples"]) == ("FIRST", "ann", 20_000, 32_000)
    assert (second["text"], second["speaker"], second["start"]) == ("SECOND", "ben", 96_000)
    np.testing.assert_allclose(heard, wave[20_000:52_000], atol=1e-4)
    record = done_records(config.out)[0]
    assert ("gigaspeech", "en", "cut", "not_marked", 1, 160_000 - 32_000 - 56_000) in record.flow


def test_times_and_phones_of_a_manifest_reach_the_samples(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "corpus", {"a.flac": 5.0, "b.flac": 2.0, "long.flac": 3.0})
    (root / "all.tsv").write_text(
        "path\tspeaker\ttext\tbegin_s\tend_s\na.flac\tx\tone\t0.5\t1.5\na.flac\ty\ttwo\t2\t4\nb.flac\tx\tthree\t\t\n"
    )
    (root / "phones.tsv").write_text("path\tphone\tstart_s\nb.flac\tTH\t0.1\nb.flac\tR\t0.2\n")
    corpus = {"name": "manifest", "path": str(root / "all.tsv"), "labels": str(root / "phones.tsv")}
    config = load(PreprocessConfig, {"out": str(tmp_path / "out"), "corpus": corpus})
    one, two, three = (described for described, _ in samples(config))
    assert (one["text"], one["speaker"], one["start"], one["n_samples"]) == ("one", "x", 8_000, 16_000)
    assert (two["text"], two["speaker"], two["start"], two["n_samples"]) == ("two", "y", 32_000, 32_000)
    assert (three["text"], three["labels"]) == ("three", {"phone": "TH R", "start_s": "0.1 0.2"})
    cut = load(PreprocessConfig, {"out": str(tmp_path / "cut"), "corpus": corpus, "cut": {"max_seconds": 1.0}})
    assert not any("labels" in described for described, _ in samples(cut)), (
        "phones of the whole recording do not apply to a part of it"
    )
