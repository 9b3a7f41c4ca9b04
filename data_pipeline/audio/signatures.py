"""Signatures of eight bytes and more, by which the start of another file is found in audio of unknown length."""

from __future__ import annotations

from typing import Final

from data_pipeline.audio.byte_source import ByteSource

W64_RIFF: Final = bytes.fromhex("726966662e91cf11a5d628db04c10000")
ASF_HEADER: Final = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
EBML: Final = b"\x1aE\xdf\xa3"
_SIGNATURES: Final = (
    *((name, b"WAVE") for name in (b"RIFF", b"RIFX", b"RF64", b"BW64")),
    (b"RIFF", b"AVI "),
    (b"FORM", b"AIFF"),
    (b"FORM", b"AIFC"),
    (b"fLaC\0\0\0\x22", b""),
    (b"fLaC\x80\0\0\x22", b""),
    (b"OggS\0\x02" + bytes(8), b""),
    (b"ID3\x03\0\0\0\0", b""),
    (b"ID3\x04\0\0\0\0", b""),
    (W64_RIFF, b""),
    (ASF_HEADER, b""),
    (EBML, b"webm"),
    (EBML, b"matroska"),
    (b"caff\0\1\0\0", b""),
    (b".snd\0\0\0", b""),
    (b"NIST_1A\n", b""),
    (b"Creative Voice File\x1a", b""),
    (b"#!AMR", b"\n"),
    (b"FLV\x01", b"\0\0\0\x09\0\0\0\0"),
    (b"wvpk", b"\x10\x04\0\0"),
    (b"TTA1\1\0", b""),
    *((b"\0\0\0" + size + b"ftyp", b"") for size in (b"\x14", b"\x18", b"\x1c", b"\x20")),
)
"""First bytes of a file, and bytes that its first 64 contain."""


def next_file(source: ByteSource, at: int, end: int) -> int:
    """Returns where the first file with one of these signatures begins in [at, end); `end` if none does."""
    for name, content in _SIGNATURES:
        found = source.find(name, at, end)
        while found >= 0 and content not in source.read(found, 64):
            found = source.find(name, found + 1, end)
        end = found if found >= 0 else end
    return end
