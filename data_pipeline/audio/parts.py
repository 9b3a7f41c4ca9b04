"""A part of a recording's file that a decoder can read as a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.audio.byte_source import Piece


@dataclass(frozen=True)
class Part:
    """One part of a recording; most files have one."""

    pieces: tuple[Piece, ...] = ()
    """Bytes that the decoder reads; empty: the whole file unchanged."""
    frames: int | None = None
    """Samples per channel according to the file's structure; None: the number that the decoder reads from the header.
    """
    tolerance: int = 0
    """Frames by which a decoder may fall short, for padding that encoders add."""
    read_to_end: bool = False
    """Whether to decode to the end, because the decoder only estimates the length."""
    silence: float = 0.0
    """Seconds of audio missing before this part, replaced by silence."""
    may_continue: bool = False
    """Whether further parts may follow where the decoder stops reading."""
    md5: bytes = b""
    """MD5 of the samples (FLAC); empty if the file has none."""
    format: str = ""
    """Format of a stream without a header ("gsm"); empty: detected by the decoder."""
