"""Ranges of long recordings, found by seeking, are the audio that decoding from the start gives."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.audio import codecs
from data_pipeline.audio.time_ranges import decode_part, decode_range, exact_length
from tests.support.sounds import sound

SECONDS = 5.3
KINDS = (
    ("wav", 16_000, 1, "PCM_16"),
    ("flac", 16_000, 1, "PCM_16"),
    ("flac", 44_100, 2, "PCM_24"),
    ("wav", 48_000, 2, "FLOAT"),
    ("aiff", 8_000, 1, "PCM_16"),
    ("w64", 22_050, 1, "PCM_16"),
)


def written(folder: Path, ending: str, rate: int, channels: int, subtype: str) -> str:
    path = folder / f"{rate}_{channels}.{ending}"
    if not path.exists():
        wave = np.stack([sound(f"{ending}{number}", SECONDS, rate) for number in range(channels)], 1)
        soundfile.write(path, wave, rate, subtype=subtype)
    return str(path)


@functools.cache
def read_whole(path: str) -> codecs.Wave:
    return codecs.read_mono(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


def joined(path: str, begin: int, end: int | None) -> codecs.Wave:
    return np.concatenate(list(decode_range(path, begin, end)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(begin=st.integers(0, 80_000), length=st.none() | st.integers(1, 60_000))
def test_a_range_is_the_audio_of_the_whole_recording(
    folder: Path, kind: tuple[str, int, int, str], begin: int, length: int | None
) -> None:
    path = written(folder, *kind)
    assert exact_length(path) == pytest.approx(SECONDS, abs=1e-4)
    whole = read_whole(path)
    end = None if length is None else begin + length
    found = joined(path, begin, end)
    assert len(found) == len(whole[begin:end])
    if kind[1:3] == (16_000, 1):
        np.testing.assert_array_equal(found, whole[begin:end])
    np.testing.assert_allclose(found, whole[begin:end], atol=2e-6)
    longer = joined(path, begin, None)
    np.testing.assert_array_equal(found, longer[: len(found)], "the end does not change what is before it")


def test_a_single_channel_can_be_taken(folder: Path) -> None:
    path = written(folder, *KINDS[2])
    right = np.concatenate(list(decode_part(path, (3, 5), channel=1)))
    np.testing.assert_allclose(right, codecs.read_mono(path, channel=1)[48_000:80_000], atol=2e-6)


def test_other_codecs_short_and_small_joined_files_have_no_exact_length(tmp_path: Path, folder: Path) -> None:
    wave = sound("s", 3.0)
    for name in ("a.ogg", "a.mp3"):
        soundfile.write(tmp_path / name, wave, 16_000)
        assert exact_length(str(tmp_path / name)) == 0
    flac = Path(written(folder, *KINDS[1]))
    assert exact_length(str(flac), least=10) == 0
    (tmp_path / "two.flac").write_bytes(flac.read_bytes() * 2)
    short = tmp_path / "short.flac"
    soundfile.write(short, wave, 16_000)
    (tmp_path / "two_short.flac").write_bytes(short.read_bytes() * 2)
    assert exact_length(str(tmp_path / "two_short.flac")) == 0
    with pytest.raises(codecs.AudioError, match="can no longer be read"):
        list(decode_range(str(tmp_path / "two_short.flac"), 16_000, None))
    (tmp_path / "text.wav").write_text("no audio")
    assert exact_length(str(tmp_path / "text.wav")) == 0


def test_what_is_joined_to_a_large_flac_file_belongs_to_its_last_range(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "two.flac"
    path.write_bytes(Path(written(folder, *KINDS[1])).read_bytes() * 4)
    whole = codecs.read_mono(str(path))
    assert len(whole) == round(4 * SECONDS * 16_000)
    np.testing.assert_array_equal(joined(str(path), 64_000, None), whole[64_000:])


def test_audio_that_is_missing_is_an_error(tmp_path: Path, folder: Path) -> None:
    flac = Path(written(folder, *KINDS[1])).read_bytes()
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) * 2 // 3])
    assert len(joined(str(tmp_path / "cut.flac"), 16_000, 32_000)) == 16_000
    with pytest.raises(codecs.AudioError, match=r"contains|decoding fails"):
        joined(str(tmp_path / "cut.flac"), 70_000, None)
    with pytest.raises(codecs.AudioError, match="ends before"):
        joined(written(folder, *KINDS[0]), 20 * 16_000, None)
