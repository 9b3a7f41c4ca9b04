"""Clips for `auricle adapt`: a folder for each class; unusable ones are named and the rest is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from data_pipeline.core.schema import ConfigError
from launch.workflows.adapting import read_clips
from tests.support.sounds import sound


def clip(file: Path, seconds: float = 0.5) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, sound(file.stem, seconds), 16_000)


def test_clips_have_the_class_of_their_folder_and_unusable_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    for name in ("yes/a.wav", "yes/deeper/b.wav", "no/c.wav", "alone.wav"):
        clip(tmp_path / name)
    (tmp_path / "no" / "broken.wav").write_bytes(b"RIFF, but no more than that")
    clips, seconds = read_clips(Path(tmp_path.name))
    assert all(Path(each.path).is_absolute() for each in clips)
    assert sorted((Path(each.path).name, each.value("class")) for each in clips) == [
        ("a.wav", "yes"),
        ("b.wav", "yes"),
        ("c.wav", "no"),
    ]
    assert seconds == pytest.approx(1.5)
    said = capsys.readouterr().err
    assert "2 clips cannot be used" in said
    assert "broken.wav" in said
    assert "alone.wav" in said


def test_a_folder_without_two_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder"):
        read_clips(tmp_path / "nowhere")
    clip(tmp_path / "yes" / "a.wav")
    with pytest.raises(ConfigError, match=r"two classes or more; has yes \(1 clips\)"):
        read_clips(tmp_path)
