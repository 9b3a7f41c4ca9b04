"""Unreadable inputs are quarantined by name and retried by the next job; only output errors end a job."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from data_pipeline.audio import codecs
from data_pipeline.core.schema import load
from data_pipeline.core.storage import FileStore
from data_pipeline.corpora.discovery import discover
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.job import plan_units, preprocess
from data_pipeline.preprocess.plan_file import WorkUnit
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.preprocess.verify import verify
from data_pipeline.preprocess.work_plan import freeze_plan
from tests.support.edge_case_manifests import jsonl
from tests.support.flaky_files import denied, flaky, web_server
from tests.support.sounds import many, path_config, sound, write_corpus


def rejects_of(config: PreprocessConfig) -> dict[str, tuple[str, str]]:
    """Processes all recordings as one work unit; returns (reason, error) of each that could not be read."""
    unit = WorkUnit("0" * 16, tuple(discover(config.corpus).files))
    record = process_unit(unit, config).record
    listed = Path(config.out, "_rejects", f"{record.unit}.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()] if record.rejects_sha256 else []
    assert record.segments == len(unit.files) - len(rows), "the other recordings are written"
    return {row["file_id"]: (row["reason"], row["error"]) for row in rows}


@pytest.mark.parametrize(
    "error",
    [
        denied(),
        OSError(errno.EIO, "Input/output error"),
        ConnectionResetError(),
        TimeoutError(),
        RuntimeError("SlowDown"),
    ],
)
def test_one_unreadable_object_of_six_is_listed(tmp_path: Path, error: BaseException) -> None:
    corpus = write_corpus(tmp_path / "corpus", {f"{name}.wav": 1.0 for name in "abcdef"})
    values: dict[str, Any] = {"out": str(tmp_path / "out"), "corpus": {"name": "path", "path": f"flaky://{corpus}"}}
    with flaky(c=error):
        assert {name: reason for name, (reason, _) in rejects_of(load(PreprocessConfig, values)).items()} == {
            "c.wav": "read_error"
        }


def test_http_errors_and_broken_connections_name_the_file(tmp_path: Path) -> None:
    names = ("good.wav", "403.wav", "500.wav", "short.wav")
    corpus = write_corpus(tmp_path / "corpus", dict.fromkeys(names, 1.0))
    with web_server(corpus) as url:
        manifest = jsonl(tmp_path / "web.jsonl", [{"path": f"{url}/{name}"} for name in (*names, "gone.wav")])
        corpus_values = {"name": "manifest", "path": str(manifest), "root": url}
        config = load(PreprocessConfig, {"out": str(tmp_path / "out"), "corpus": corpus_values})
        found = discover(config.corpus)
        reasons = {reject.file_id: reject.reason for reject in found.rejects}
        reasons |= {name: reason for name, (reason, _) in rejects_of(config).items()}
    assert reasons == {
        "403.wav": "read_error",
        "500.wav": "read_error",
        "short.wav": "read_error",
        "gone.wav": "vanished",
    }


def test_a_full_disk_for_local_copies_ends_the_job_and_rejects_no_file(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"a.wav": 1.0})
    values = {"out": str(tmp_path / "out"), "corpus": {"name": "path", "path": f"flaky://{corpus}"}}
    with flaky(a=OSError(errno.ENOSPC, "No space left on device")), pytest.raises(OSError, match="no space in"):
        rejects_of(load(PreprocessConfig, values))


def test_a_recording_that_fails_while_it_is_copied_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = path_config(write_corpus(tmp_path / "corpus", {"a.flac": 1.0, "b.flac": 1.0}), tmp_path / "out")

    def failing(path: str, *rest: Any) -> bytes | None:
        if path.endswith("a.flac"):
            raise OSError(errno.EIO, "Input/output error")
        return None

    monkeypatch.setattr(codecs, "stored_flac", failing)
    assert {name: reason for name, (reason, _) in rejects_of(config).items()} == {"a.flac": "read_error"}


@pytest.mark.usefixtures("local_ray")
def test_a_repaired_recording_is_processed_by_the_next_job(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(4))
    whole = (corpus / "speaker0" / "clip000.flac").read_bytes()
    (corpus / "speaker0" / "clip000.flac").write_bytes(whole[: len(whole) // 3])
    config = path_config(corpus, tmp_path / "out")
    first = preprocess(config, progress=False)
    assert (first.files, first.segments, first.quarantined) == (4, 3, 1)
    assert preprocess(config, progress=False).units_done == 0, "the same broken file is not read again"
    (corpus / "speaker0" / "clip000.flac").write_bytes(whole)
    assert plan_units(config).files == 1
    second = preprocess(config, progress=False)
    assert (second.files, second.files_used, second.segments, second.quarantined) == (4, 4, 4, 0)
    assert (second.units_done, second.changed_files, second.imbalances) == (1, 0, ())
    assert second.hours_in == pytest.approx(second.hours_out)
    assert not any(reason.startswith("decode") for reason in second.rejects)
    assert preprocess(config, progress=False).units_done == 0
    assert not list(verify(str(tmp_path / "out")))


@pytest.mark.usefixtures("local_ray")
def test_transient_failures_are_retried_although_the_file_is_unchanged(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(3))
    gone = corpus / "speaker1" / "clip001.flac"
    config = path_config(corpus, tmp_path / "out")
    recordings = discover(config.corpus).recordings
    hidden = gone.rename(tmp_path / "hidden.flac")
    # the recording vanishes after it was planned and before it is read
    for unit in freeze_plan(FileStore(config.out), recordings, config).work_units():
        process_unit(unit, config)
    assert preprocess(config, progress=False).quarantined == 1
    hidden.rename(gone)
    again = preprocess(config, progress=False)
    assert (again.segments, again.quarantined, again.imbalances) == (3, 0, ())


@pytest.mark.usefixtures("local_ray")
def test_a_persistent_failure_stays_one_unit_over_all_retries(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"a.wav": 1.0, "b.wav": 1.0})
    with web_server(corpus) as url:
        (corpus / "b.wav").rename(corpus / "500.wav")
        manifest = jsonl(tmp_path / "web.jsonl", [{"path": f"{url}/{name}"} for name in ("a.wav", "500.wav")])
        values = {"corpus": {"name": "manifest", "path": str(manifest), "root": url}, "out": str(tmp_path / "out")}
        config = load(PreprocessConfig, values)
        summaries = [preprocess(config, progress=False) for _ in range(3)]
        (corpus / "500.wav").rename(corpus / "b.wav")
    assert [(s.files, s.segments, s.quarantined, s.imbalances) for s in summaries] == [(2, 1, 1, ())] * 3
    assert [s.units_done for s in summaries] == [1, 1, 1], "retried by each job"
    assert len(list((tmp_path / "out" / "_done").iterdir())) == 2
    assert summaries[0].exit_code == 0


@pytest.mark.usefixtures("local_ray")
def test_an_output_write_error_ends_the_job(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", many(2))
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(OSError, match="out"):
        preprocess(path_config(corpus, tmp_path / "out"), progress=False)


def test_the_size_of_a_copy_is_checked_against_the_listed_size(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    soundfile.write(corpus / "a.wav", sound("a", 1.0), 16_000)
    values = {"out": str(tmp_path / "out"), "corpus": {"name": "path", "path": f"flaky://{corpus}"}}
    with flaky():
        config = load(PreprocessConfig, values)
        [file] = discover(config.corpus).files
        (corpus / "a.wav").write_bytes((corpus / "a.wav").read_bytes()[:9000])
        record = process_unit(WorkUnit("0" * 16, (file,)), config).record
    assert record.rejects == {"decode/read_error": 1}
