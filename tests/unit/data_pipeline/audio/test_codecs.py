"""Decoding, resampling and encoding."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.audio import codecs, ffmpeg
from data_pipeline.audio.segmentation import cut
from tests.support.sounds import sound


def decoded(path: Path) -> np.ndarray:
    return np.concatenate(list(codecs.decode(str(path), 16_000)))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_16_bit_audio_is_preserved_bit_exactly(tmp_path: Path, subtype: str) -> None:
    pcm = codecs.to_int16(sound("bits", 1.0))
    soundfile.write(tmp_path / "a.wav", pcm.astype(np.float64) / 32768, 16_000, subtype=subtype)
    again = codecs.to_int16(decoded(tmp_path / "a.wav"))
    np.testing.assert_array_equal(again, pcm)
    flac, _ = soundfile.read(io.BytesIO(codecs.encode(again, 16_000, "flac")), dtype="int16")
    np.testing.assert_array_equal(flac, pcm)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_blockwise_resampling_equals_resampling_at_once(tmp_path: Path, rate: int) -> None:
    wave = sound("rate", 5.0, rate)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    whole = soxr.resample(wave, rate, 16_000, quality="HQ")
    mine = decoded(tmp_path / "a.wav")
    assert abs(len(mine) - 80_000) <= 1
    np.testing.assert_allclose(mine[: len(whole)], whole[: len(mine)], atol=2e-5)


def test_channels_are_averaged_unless_they_cancel(tmp_path: Path) -> None:
    left, right = sound("left", 1.0), sound("right", 1.0)
    soundfile.write(tmp_path / "mix.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "anti.wav", np.stack([left, -left], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decoded(tmp_path / "mix.wav"), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(decoded(tmp_path / "anti.wav"), left, atol=1e-7)


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    assert codecs.to_int16(np.array([1.5, -1.5, 1.0, -1.0, 0.5], np.float32)).tolist() == [
        32767,
        -32768,
        32767,
        -32768,
        16384,
    ]


def test_opus_encoding_is_deterministic_and_page_checksums_are_valid() -> None:
    pcm = codecs.to_int16(sound("opus", 3.0))
    first, second = codecs.encode(pcm, 16_000, "opus"), codecs.encode(pcm, 16_000, "opus")
    assert first == second
    wave, _ = soundfile.read(io.BytesIO(first))  # libogg drops pages with a wrong checksum
    assert len(wave) >= 48_000
    assert np.corrcoef(wave[:48_000], pcm)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>" * 50, "unreadable"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "unreadable"),
        (bytes(range(256)) * 64, "unreadable"),
    ],
)
def test_files_without_audio_are_rejected_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(codecs.AudioError) as caught:
        decoded(tmp_path / "a.wav")
    assert caught.value.reason == reason


def test_missing_truncated_and_implausible_files_are_rejected_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(codecs.AudioError) as vanished:
        decoded(path)
    soundfile.write(path, sound("cut", 2.0), 16_000)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(codecs.AudioError) as truncated:
        decoded(path)
    soundfile.write(path, np.zeros(10), 100)
    with pytest.raises(codecs.AudioError) as slow:
        decoded(path)
    soundfile.write(path, np.array([0.1, np.nan] * 100), 16_000, subtype="FLOAT")
    with pytest.raises(codecs.AudioError) as not_a_number:
        decoded(path)
    reasons = [caught.value.reason for caught in (vanished, truncated, slow, not_a_number)]
    assert reasons == ["vanished", "truncated", "sample_rate", "not_finite"]


def test_missing_ffmpeg_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(2000))
    monkeypatch.setattr(ffmpeg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(codecs.AudioError, match="pip install av"):
        decoded(tmp_path / "a.m4a")


@pytest.mark.real_speech
def test_every_unusual_format_decodes_or_fails_as_its_manifest_expects(real_speech: Path) -> None:
    pytest.importorskip("av", reason="needs the extra media")
    folder = real_speech / "odd_formats"
    if not folder.is_dir():
        pytest.skip(f"needs a folder odd_formats in AURICLE_SPEECH={real_speech}")
    with (folder / "odd_manifest.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wrong = []
    for row in rows:
        try:
            seconds = len(decoded(folder / row["path"])) / 16_000
            happened = "decode" if abs(seconds - float(row["duration_s"])) < 0.1 else f"{seconds} s"
        except codecs.AudioError as error:
            happened = "error"
            if error.reason == "not_finite":
                happened = "decode"  # rejecting NaN is allowed
        if row["expect"] != "either" and happened != row["expect"]:
            wrong.append((row["path"], row["expect"], happened))
    assert len(rows) == 73
    assert not wrong


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=30), st.integers(1, 300))
def test_segmentation_neither_drops_nor_repeats_samples(sizes: list[int], longest: int) -> None:
    wave = np.arange(sum(sizes), dtype=np.float32)
    ends = np.cumsum(sizes)
    blocks = [wave[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    pieces = list(cut(blocks, longest))
    joined = np.concatenate([piece for _, piece, _ in pieces]) if pieces else np.zeros(0)
    np.testing.assert_array_equal(joined, wave)
    assert all(start == int(piece[0]) and 0 < len(piece) <= longest for start, piece, _ in pieces)
    assert [whole for _, _, whole in pieces].count(True) == (1 if 0 < len(wave) <= longest else 0)
    if len(wave) > longest:
        assert min(len(piece) for _, piece, _ in pieces) >= longest // 2


def test_flac_that_needs_no_conversion_is_copied_without_its_tags(tmp_path: Path) -> None:
    path, pcm = tmp_path / "a.flac", codecs.to_int16(sound("kept", 2.0))
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        file.title = "a private note"
        file.write(pcm)
    kept = codecs.stored_flac(str(path), pcm, 16_000)
    assert kept is not None
    assert b"private" in path.read_bytes()
    assert b"private" not in kept
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(kept), dtype="int16")[0], pcm)
    assert codecs.stored_flac(str(path), pcm + np.int16(1), 16_000) is None, "different samples"
    assert codecs.stored_flac(str(path), pcm[:-1], 16_000) is None, "only part of the file"
    assert codecs.stored_flac(str(path), pcm, 8_000) is None, "a different sample rate"
    soundfile.write(tmp_path / "a.wav", pcm, 16_000)
    assert codecs.stored_flac(str(tmp_path / "a.wav"), pcm, 16_000) is None
