"""Broken input files: no crash, no hang, each rejected with a reason, and every valid file kept."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.audio import codecs
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import AudioFile
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.preprocess.job import preprocess
from data_pipeline.preprocess.plan_file import WorkUnit
from data_pipeline.preprocess.unit_worker import process_unit
from tests.support.broken_audio import FORMATS, fuzzed, make_broken
from tests.support.sounds import many, path_config, write_corpus


@pytest.mark.usefixtures("local_ray")
def test_two_hundred_broken_files_are_rejected_and_valid_files_kept(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    broken = make_broken(corpus)
    assert broken >= 200
    write_corpus(corpus / "good", many(12))
    summary = preprocess(path_config(corpus, tmp_path / "out", shard_mb=0.2), progress=False)
    assert summary.exit_code == 0
    listed = [json.loads(line) for line in Path(summary.quarantine).read_text().splitlines()]
    assert all(row["stage"] and row["reason"] and row["path"] for row in listed)
    assert len(listed) == broken
    assert summary.segments == 12, "a broken file was accepted, or a valid one lost"


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=12),
    st.integers(0, 4000),
)
def test_fuzzed_audio_is_decoded_or_rejected_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, ending, flips, cut
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    path.write_bytes(fuzzed(ending, flips, cut))
    with contextlib.suppress(codecs.AudioError):
        for block in codecs.decode(str(path), 16_000):
            assert np.isfinite(block).all()
            assert block.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["tsv", "csv", "jsonl"]))
def test_fuzzed_manifests_are_read_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    header = b"" if ending == "jsonl" else b"path\n"
    path.write_bytes(header + content)
    try:
        found = discover(ManifestCorpus(path=str(path)))
    except ConfigError:
        return
    assert all(reject.reason for reject in found.rejects)


def test_files_that_vanish_or_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"gone.wav": 2.0, "grows.wav": 2.0, "stays.wav": 2.0})
    config = path_config(corpus, tmp_path / "out")
    files = tuple(discover(config.corpus).files)
    real = codecs.decode

    def disturbed(path: str, rate: int):  # type: ignore[no-untyped-def]
        if path.endswith("grows.wav"):
            with Path(path).open("ab") as file:
                file.write(b"more")
        yield from real(path, rate)

    monkeypatch.setattr(codecs, "decode", disturbed)
    (corpus / "gone.wav").unlink()
    record = process_unit(WorkUnit("unit", files), config).record
    assert (record.segments, record.files) == (1, 3)
    assert record.rejects == {"decode/changed": 1, "decode/vanished": 1}


def test_a_named_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    write_corpus(tmp_path, {"good.wav": 1.0})
    config = path_config(tmp_path, tmp_path / "out")
    assert [file.file_id for file in discover(config.corpus).files] == ["good.wav"]
    pipe = tmp_path / "pipe.wav"
    swapped = AudioFile(str(pipe), "pipe.wav", "c", size=0, mtime=str(pipe.stat().st_mtime_ns))
    began = time.monotonic()
    worker = threading.Thread(target=process_unit, args=(WorkUnit("unit", (swapped,)), config), daemon=True)
    worker.start()
    worker.join(timeout=10)
    assert not worker.is_alive(), f"still reading after {time.monotonic() - began:.0f} s"
