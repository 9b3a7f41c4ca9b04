"""Files skipped in a folder are counted, and audio files with unusual names are found."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.config import SOUND_ENDINGS, PathCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import Discovered
from tests.support.sounds import write_corpus

ISSUED = ("3gp", "m4b", "mka", "weba", "mp2", "m4r", "mpga", "ts", "gsm")


def found_in(root: Path, **config: object) -> Discovered:
    return discover(PathCorpus(path=str(root), **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [*ISSUED, "3g2", "m4v", "ogv", "mpg", "spx", "WAV"])
def test_audio_extensions_are_recognised(tmp_path: Path, ending: str) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    shutil.copy(tmp_path / "a.wav", tmp_path / f"b.{ending}")
    assert f"b.{ending}" in [file.file_id for file in found_in(tmp_path).files]
    assert ending.lower() in SOUND_ENDINGS


def test_skipped_files_are_counted_by_extension(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2, "b/c.wav": 0.2})
    for name in ("notes.txt", "b/more.TXT", "cover.jpg", "README", "take.dat", ".hidden"):
        (tmp_path / name).write_text("no audio")
    found = found_in(tmp_path)
    assert dict(found.skipped) == {".txt": 2, ".jpg": 1, "": 2, ".dat": 1}
    assert len(found.files) == 2
    with pytest.raises(ConfigError, match=r"files not taken: .*2 of \.wav"):
        found_in(tmp_path / "b" / "..", extensions=("flac",))


def test_probing_finds_audio_with_any_extension(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.wav": 0.2})
    for name in ("take.dat", "no_ending", "deeper.recording.bin"):
        shutil.copy(tmp_path / "a.wav", tmp_path / name)
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "empty.bin").touch()
    assert len(found_in(tmp_path).files) == 1
    found = found_in(tmp_path, probe=True)
    assert [file.file_id for file in found.files] == ["a.wav", "deeper.recording.bin", "no_ending", "take.dat"]
    assert dict(found.skipped) == {".txt": 1, ".bin": 1}


def test_files_that_are_not_regular_are_rejects(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"good.wav": 0.2})
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # socket paths have a short maximum length
        try:
            listening.bind("socket.wav")
        finally:
            os.chdir(here)
        found = found_in(tmp_path)
    assert {reject.file_id: (reject.reason, reject.error) for reject in found.rejects} == {
        "pipe.wav": ("not_a_file", "is a FIFO, not a file"),
        "zero.wav": ("not_a_file", "is a link to a character device, not a file"),
        "socket.wav": ("not_a_file", "is a socket, not a file"),
        "dangling.wav": ("broken_link", "is a link to nothing"),
    }
    assert all(reject.recording for reject in found.rejects)


def test_a_pattern_that_matches_no_file_is_an_error_and_a_partial_match_a_warning(tmp_path: Path) -> None:
    root = write_corpus(tmp_path, {"ann/1.wav": 0.2, "bob/1.wav": 0.2, "loose.wav": 0.2})
    found = found_in(root, pattern="^(?P<speaker>[^/]+)/")
    assert [file.speaker for file in found.files] == ["ann", "bob", ""]
    assert "2 of 3" in found.warnings[0]
    assert "loose.wav" in found.warnings[0]
    assert not found_in(root, pattern="(?P<text>.*)").warnings
    for pattern in ("^/(?P<speaker>[^/]+)", "speaker_(?P<speaker>.+)", r"(?P<speaker>\d{9})"):
        with pytest.raises(ConfigError, match="matches 0 of 3"):
            found_in(root, pattern=pattern)
