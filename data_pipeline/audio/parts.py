"""The record of a stretch of a recording's file that a decoder can read as a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.audio.byte_source import Piece


@dataclass(frozen=True)
class Part:
    """One part of a recording; most files have one."""

    pieces: tuple[Piece, ...] = ()
    """What the decoder reads; empty: the whole file as it is."""
    frames: int | None = None
    """Samples per channel that the file's structure promises; None: as many as the decoder's header reports."""
    tolerance: int = 0
    """Frames by which a decoder may fall short: what encoders add as padding."""
    read_to_end: bool = False
    """The decoder's own idea of the length is a guess: everything is decoded."""
    silence: float = 0.0
    """Seconds of audio missing before this part; they become silence."""
    may_continue: bool = False
    """What the decoder leaves unread may hold further parts."""
    md5: bytes = b""
    """Checksum of the samples (FLAC); empty where there is none."""
    format: str = ""
    """Format of a stream without a header ("gsm"); empty: the decoder recognises it."""
