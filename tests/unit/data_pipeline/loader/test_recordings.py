"""Recordings of files, folders, shards and standard input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.audio.errors import AudioError
from data_pipeline.core.schema import ConfigError
from data_pipeline.loader.recordings import Recording, Unusable, sources


def noise(seconds: float, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def read(recording: Recording | Unusable) -> np.ndarray:
    assert isinstance(recording, Recording)
    return np.concatenate(list(recording.blocks()))


def wav(wave: np.ndarray, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "a.wav", noise(0.5), 16_000)
    soundfile.write(folder / "deep" / "b.flac", noise(0.25, 1), 8_000)
    (folder / "notes.txt").write_text("no sound")
    (folder / "gone.wav").symlink_to("nowhere.wav")
    found = sources([str(folder / "a.wav"), str(folder)])
    assert [source.count for source in found] == [1, 3]
    [one] = found[0].recordings()
    assert read(one) == pytest.approx(noise(0.5), abs=1e-4)
    unusable, a, b = found[1].recordings()
    assert isinstance(unusable, Unusable)
    assert unusable.reason == "broken_link"
    assert [a.name, b.name] == ["a.wav", "deep/b.flac"]
    assert len(read(b)) == pytest.approx(8_000, abs=2)


def test_a_place_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meeting.wav").touch()
    with pytest.raises(ConfigError, match=r"no such file or folder \(did you mean .*/meeting\.wav\?\)"):
        sources([str(tmp_path / "meting.wav")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"files=.*empty: holds no sound files"):
        sources([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="once only"):
        sources(["-", "-"])


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_raw_pcm_of_standard_input(rate: int) -> None:
    wave = noise(9.0, rate=rate)
    content = (wave * 32768).astype("<i2").tobytes()
    [source] = sources(["-"], rate, io.BytesIO(content))
    [recording] = source.recordings()
    found = read(recording)
    assert len(found) == pytest.approx(9 * 16_000, abs=2)
    if rate == 16_000:
        assert found == pytest.approx(wave, abs=1e-4)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sound_file_of_standard_input(streamed: bool) -> None:
    content = wav(noise(1.0))
    if streamed:  # as a program writes that cannot seek back to fill in the length
        content = content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:]
    [source] = sources(["-"], 16_000, io.BytesIO(content))
    [recording] = source.recordings()
    assert read(recording) == pytest.approx(noise(1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"\0" * 999, "not_pcm"), (b"one two\n" * 50, "not_pcm")]
)
def test_standard_input_that_is_no_audio(content: bytes, reason: str) -> None:
    [source] = sources(["-"], 16_000, io.BytesIO(content))
    [recording] = source.recordings()
    with pytest.raises(AudioError) as caught:
        read(recording)
    assert caught.value.reason == reason
