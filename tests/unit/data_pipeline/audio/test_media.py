"""Compressed audio and video, encoded with FFmpeg (PyAV): the same speech is decoded from each container."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from data_pipeline.audio import codecs
from tests.support.sounds import sound

av = pytest.importorskip("av", reason="needs the extra media")

SECONDS = 3.0


def write_media(path: Path, codec: str, rate: int, layout: str, picture: bool = False) -> None:
    """Writes the same three seconds of speech to any container, optionally with a video stream."""
    wave = soxr.resample(sound("media", SECONDS), 16_000, rate)
    channels = 2 if layout == "stereo" else 1
    pcm = np.tile(codecs.to_int16(wave.astype(np.float32))[:, None], (1, channels)).reshape(1, -1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if picture:
            video = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for number in range(int(10 * SECONDS)):
                image = np.full((48, 64, 3), 8 * number % 256, np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        converted = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or None)
        for piece in (*converted.resample(frame), *converted.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("a.m4a", "aac", 48_000, "stereo"),
        ("a.aac", "aac", 22_050, "mono"),
        ("a.opus", "libopus", 48_000, "mono"),
        ("a.g722", "g722", 16_000, "mono"),
        ("a.webm", "libopus", 48_000, "stereo"),
        ("film.mp4", "aac", 44_100, "stereo"),
        ("film.mkv", "flac", 16_000, "mono"),
    ],
)
def test_the_same_speech_is_decoded_from_every_container(
    tmp_path: Path, name: str, codec: str, rate: int, layout: str
) -> None:
    write_media(tmp_path / name, codec, rate, layout, picture=name.startswith("film"))
    found = np.concatenate(list(codecs.decode(str(tmp_path / name), 16_000)))
    expected = sound("media", SECONDS)
    assert len(found) / 16_000 == pytest.approx(SECONDS, abs=0.15), "codecs may pad"
    size = 1 << 17
    spectra = np.fft.rfft(found, size), np.fft.rfft(expected, size)
    correlation = np.fft.irfft(spectra[0] * spectra[1].conj(), size).max()
    assert correlation / np.linalg.norm(found) / np.linalg.norm(expected) > 0.9


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_8_bit_and_multichannel_audio_is_decoded(tmp_path: Path, channels: int) -> None:
    wave = sound("eight", 1.0)
    soundfile.write(tmp_path / "a.wav", np.tile(wave[:, None], (1, channels)), 16_000, subtype="PCM_U8")
    found = np.concatenate(list(codecs.decode(str(tmp_path / "a.wav"), 16_000)))
    np.testing.assert_allclose(found, wave, atol=1 / 100)
