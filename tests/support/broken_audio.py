"""Writes more than two hundred broken recordings: truncated, wrong headers, random bytes, other file types."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import soundfile

from data_pipeline.core.rng import keyed_rng
from tests.support.sounds import sound

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
}


def encoded(ending: str, seconds: float = 1.5) -> bytes:
    """Returns an intact file of a format."""
    buffer = io.BytesIO()
    form, subtype = FORMATS[ending]
    soundfile.write(buffer, sound(ending, seconds), 16_000, format=form, subtype=subtype)
    return buffer.getvalue()


def _header(rate: int, channels: int, bits: int, tag: int = 1, data: bytes = b"") -> bytes:
    data = data or keyed_rng("header").bytes(64_000)
    align = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate & 0xFFFFFFFF, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def make_broken(root: Path) -> int:
    """Writes the files and returns their number. None of them has a second of usable audio."""
    root.mkdir(parents=True)
    files: dict[str, bytes] = {"zero bytes.wav": b"", "zero.flac": b"", "空.opus": b"", "one byte.mp3": b"\xff"}
    good = {ending: encoded(ending) for ending in FORMATS}
    for ending, content in good.items():
        for kept in (4, 12, 20, 28, 36, 43, 44, 60):  # cut within the header
            files[f"cut/{ending} at {kept}.{ending}"] = content[:kept]
        for start in (8, 64):  # the beginning is lost
            files[f"headless/{ending} from {start}.{ending}"] = bytes(start) + content[start : start + 300]
    for ending in ("wav", "aiff", "w64", "flac"):
        for part in range(1, 6):  # the end is lost
            files[f"short/{ending} {part}.{ending}"] = _shortened(good[ending], ending, part / 6)
    files |= {
        f"wrong header/rate {rate}.wav": _header(rate, 1, 16) for rate in (0, 1, 100, 3_999, 400_000, 2**31, 2**32 - 1)
    }
    files |= {f"wrong header/channels {count}.wav": _header(16_000, count, 16) for count in (0, 65, 255, 1_000, 65_535)}
    files |= {f"wrong header/bits {bits}.wav": _header(16_000, 1, bits) for bits in (0, 40, 96, 65_535)}
    files |= {f"wrong header/tag {tag:x}.wav": _header(16_000, 1, 16, tag) for tag in (0, 0x7ABC, 0xFFFF, 0x2000)}
    files |= {f"not a number/{kind}.wav": _float_wav(value) for kind, value in _NOT_FINITE.items()}
    files |= {f"other things/{name}": content for name, content in _OTHER.items()}
    for number in range(48):
        noise = keyed_rng("broken", number).bytes(200 + 97 * number)
        ending = sorted(FORMATS)[number % len(FORMATS)]
        magic = b"" if number % 2 else good[ending][: 4 + number % 24]
        files[f"random/{number:02d}.{ending}"] = magic + noise
    files |= {f"empty/{ending}.{ending}": _without_samples(ending) for ending in ("wav", "flac", "aiff", "au", "w64")}
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "loop.wav").symlink_to(root / "loop.wav")
    (root / "gone.flac").symlink_to(root / "nothing here")
    (root / "round").mkdir()
    (root / "round" / "and round").symlink_to(root / "round")
    return len(files) + 2


def _shortened(content: bytes, ending: str, part: float) -> bytes:
    return content[: 100 + int(part * (len(content) - 200))]


def _float_wav(value: float) -> bytes:
    wave = sound("float", 1.0)
    wave[7_000:7_010] = value
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _without_samples(ending: str) -> bytes:
    buffer = io.BytesIO()
    form, subtype = FORMATS[ending]
    soundfile.write(buffer, np.zeros(0), 16_000, format=form, subtype=subtype)
    return buffer.getvalue()


_NOT_FINITE = {"nan": np.nan, "infinite": np.inf, "minus infinite": -np.inf, "huge": 1e38, "integers": 20_000.0}
_OTHER: dict[str, bytes] = {
    "page.wav": b"<!DOCTYPE html><html>404</html>",
    "pointer.flac": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "list.m4a": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "list.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n",
    "concat.mov": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "text.mp3": b"nur ein wenig Text, kein Ton" * 20,
    "pickle.wav": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "zip.ogg": b"PK\x03\x04" + bytes(500),
    "tar.wav": b"name.wav" + bytes(1016),
    "picture.m4a": b"\x89PNG\r\n\x1a\n" + bytes(300),
    "emoji 🎙️.webm": b"\x1aE\xdf\xa3" + bytes(200),
    "new\nline.wav": b"RIFF",
    "-rf.wav": b"RIFF",
    "; rm -rf ~.wav": b"RIFF",
    "${HOME}.flac": b"fLaC",
    "%s%n.ogg": b"OggS",
}


def fuzzed(ending: str, flips: list[tuple[int, int]], cut: int) -> bytes:
    """Returns an intact file with some bytes overwritten and its end cut off."""
    content = bytearray(encoded(ending, 0.3))
    for position, value in flips:
        content[position % len(content)] = value
    return bytes(content[: len(content) - cut % len(content)])
