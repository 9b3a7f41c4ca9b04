"""Builds recordings that are valid but unusual, or damaged in a known way, from raw samples; returns their bytes."""

from __future__ import annotations

import functools
import io
import struct
from fractions import Fraction

import numpy as np
import soundfile

from data_pipeline.audio.ogg import with_checksum
from tests.support.sounds import sound


def tone(seconds: float, hertz: float, rate: int = 16_000, level: float = 0.3) -> np.ndarray:
    """Returns a sine, float32."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def tone_level(wave: np.ndarray, hertz: float, rate: int = 16_000) -> float:
    """Returns the amplitude of a sine of this frequency in a piece of audio."""
    window = np.hanning(len(wave))
    turns = np.exp(-2j * np.pi * hertz * np.arange(len(wave)) / rate)
    return float(2 * np.abs((wave * window * turns).sum()) / window.sum())


def written(
    wave: np.ndarray, rate: int = 16_000, form: str = "WAV", subtype: str = "PCM_16", endian: str = ""
) -> bytes:
    """Encodes with libsndfile; returns the file's bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype, endian=endian or None)
    return buffer.getvalue()


def encoded(
    pieces: list[tuple[float, np.ndarray]],
    container: str,
    codec: str,
    rate: int = 16_000,
    bit_rate: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """Encodes pieces of audio that begin at the given seconds with FFmpeg; returns the file's bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as out:
        layout = "stereo" if pieces[0][1].ndim > 1 else "mono"
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if bit_rate:
            stream.bit_rate = bit_rate
        for start, wave in pieces:
            size = stream.frame_size or 1_024
            converted = av.AudioResampler(stream.format, layout, rate, frame_size=size)
            pcm = np.clip(np.rint(wave * 32_768), -32_768, 32_767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            made = 0
            for part in (*converted.resample(frame), *converted.resample(None)):
                part.pts, part.time_base = round(start * rate) + made, Fraction(1, rate)
                made += part.samples
                out.mux(stream.encode(part))
        out.mux(stream.encode())
    return buffer.getvalue()


def mp3(seconds: float, rate: int = 16_000, kbps: int = 64, header: bool = True, hertz: float = 440) -> bytes:
    """Returns an MP3 file, with or without a Xing/Info frame."""
    options = {"write_xing": str(int(header)), "id3v2_version": "0"}
    return encoded([(0, tone(seconds, hertz, rate))], "mp3", "libmp3lame", rate, 1_000 * kbps, options)


_BY_LIBSNDFILE = {"wav": "WAV", "flac": "FLAC", "aiff": "AIFF", "w64": "W64", "au": "AU", "caf": "CAF", "nist": "NIST",
                  "rf64": "RF64"}  # fmt: skip
_BY_FFMPEG = {
    "tta": ("tta", "tta", 16_000, 0),
    "voc": ("voc", "pcm_u8", 16_000, 0),
    "wavpack": ("wv", "wavpack", 16_000, 0),
    "avi": ("avi", "pcm_s16le", 16_000, 0),
    "flv": ("flv", "aac", 44_100, 0),
    "adts": ("adts", "aac", 16_000, 0),
    "ac3": ("ac3", "ac3", 48_000, 96_000),
    "mp4": ("mp4", "aac", 16_000, 0),
    "matroska": ("matroska", "flac", 16_000, 0),
    "mpeg-ts": ("mpegts", "aac", 16_000, 0),
    "mpeg-ps": ("mpeg", "mp2", 48_000, 0),
    "asf": ("asf", "wmav2", 44_100, 64_000),
    "amr": ("amr", "libopencore_amrnb", 8_000, 12_200),
}
FORMATS = (*_BY_LIBSNDFILE, *_BY_FFMPEG, "ogg", "opus", "gsm", "mp3", "bare mp3")
"""Formats that `in_format` writes."""


@functools.cache
def in_format(name: str, seconds: float, hertz: float) -> bytes:
    """Returns a file of one format with a tone of amplitude 0.3."""
    if name in _BY_LIBSNDFILE:
        return written(tone(seconds, hertz), form=_BY_LIBSNDFILE[name])
    if name in ("ogg", "opus"):
        return written(tone(seconds, hertz), form="OGG", subtype="VORBIS" if name == "ogg" else "OPUS")
    if name == "gsm":
        return written(tone(seconds, hertz, 8_000), 8_000, "RAW", "GSM610")
    if name.endswith("mp3"):
        return mp3(seconds, header=name == "mp3", hertz=hertz)
    container, codec, rate, bit_rate = _BY_FFMPEG[name]
    return encoded([(0, tone(seconds, hertz, rate))], container, codec, rate, bit_rate)


def mp3_without_header(wave: np.ndarray, rate: int = 16_000, kbps: int = 64) -> bytes:
    """Returns MP3 frames of constant bit rate, without a Xing/Info frame and tags."""
    options = {"write_xing": "0", "id3v2_version": "0"}
    return encoded([(0, wave)], "mp3", "libmp3lame", rate, 1_000 * kbps, options)


def with_hole(content: bytes, begin: int, size: int, fill: int = 0) -> bytes:
    """Returns the content with `size` bytes from `begin` on overwritten by one value."""
    return content[:begin] + bytes([fill]) * size + content[begin + size :]


def onset(wave: np.ndarray, hertz: float, rate: int = 16_000) -> float:
    """Returns the second at which a tone of amplitude 0.3 begins, to 10 ms; infinity without one."""
    window, step = rate // 40, rate // 100
    for start in range(0, len(wave) - window, step):
        if tone_level(wave[start : start + window], hertz, rate) > 0.15:
            return start / rate
    return float("inf")


def wav_with_size(wave: np.ndarray, size: int, riff_size: int | None = None) -> bytes:
    """Returns a WAV file whose data chunk states `size` bytes, like that of a program that cannot seek back."""
    good = bytearray(written(wave))
    good[40:44] = struct.pack("<I", size)
    good[4:8] = struct.pack("<I", (size + 36 if riff_size is None else riff_size) & 0xFFFFFFFF)
    return bytes(good)


def pages(ogg: bytes) -> list[bytes]:
    """Returns the pages of an Ogg file."""
    found, at = [], 0
    while at < len(ogg):
        end = at + 27 + ogg[at + 26] + sum(ogg[at + 27 : at + 27 + ogg[at + 26]])
        found.append(ogg[at:end])
        at = end
    return found


def opus_with_rate(ogg: bytes, rate: int) -> bytes:
    """Returns the Ogg Opus file with another rate in its OpusHead."""
    first, *rest = pages(ogg)
    at = first.index(b"OpusHead") + 12
    return b"".join([with_checksum(first[:at] + struct.pack("<I", rate) + first[at + 4 :]), *rest])


def flac_with_total(flac: bytes, total: int) -> bytes:
    """Returns the FLAC file with another number of samples in its STREAMINFO."""
    fields = int.from_bytes(flac[18:26], "big") >> 36 << 36 | total
    return flac[:18] + fields.to_bytes(8, "big") + flac[26:]


def flac_frames(flac: bytes) -> list[int]:
    """Returns the offsets of the frames of a FLAC file, found by sync code and frame number."""
    at, last = 4, False
    while not last:
        last = bool(flac[at] & 0x80)
        at += 4 + int.from_bytes(flac[at + 1 : at + 4], "big")
    starts = [at]
    while (at := flac.find(flac[starts[0] : starts[0] + 2], at + 2)) >= 0:
        if flac[at + 4] == len(starts):  # valid for up to 127 frames
            starts.append(at)
    return starts


def flac_with_junk(flac: bytes) -> bytes:
    """Inserts bytes between two frames of a FLAC file: libFLAC loses sync and stops, FFmpeg continues."""
    starts = flac_frames(flac)
    middle = starts[len(starts) // 2]
    return flac[:middle] + b"\x00\x01\x02\x03" * 3 + flac[middle:]


def speech_like(seconds: float, name: str = "odd") -> np.ndarray:
    """Returns bursts of noise, float32 at 16 kHz."""
    return sound(name, seconds)
