"""Files in which data is missing or overwritten: refused, or later audio keeps its time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import edge_case_audio as edge
from tests.support.decoded_audio import decoded, reason, seconds

pytest.importorskip("av", reason="needs the extra media")

FLAC = edge.written(edge.tone(6, 300), form="FLAC")
OPUS = edge.written(edge.tone(5, 300), form="OGG", subtype="OPUS")
NOISE = {name: edge.written(edge.speech_like(20), form="OGG", subtype=name) for name in ("VORBIS", "OPUS")}
TWO_TONES = np.concatenate([edge.tone(3, 300), edge.tone(2, 900)])


def test_missing_data_within_a_file_is_corrupt_and_never_shifts_later_audio(tmp_path: Path) -> None:
    pages = edge.pages(NOISE["VORBIS"])
    lost = b"".join(pages[: len(pages) // 2] + pages[len(pages) // 2 + 1 :])
    damaged = bytearray(OPUS)
    damaged[len(OPUS) // 2] ^= 0xFF
    mp3 = bytearray(edge.mp3(6, header=False))
    mp3[20_000:28_000] = bytes(8_000)
    flac = bytearray(FLAC)
    flac[len(FLAC) // 2 : len(FLAC) // 2 + 400] = bytes(400)
    for content in (lost, bytes(damaged), bytes(mp3), bytes(flac)):
        assert reason(content, tmp_path) == "corrupt"


@pytest.mark.parametrize(
    ("kbps", "begin", "size", "fill"),
    [
        (64, 2_880, 2_592, 0),  # 9 whole frames of 288 bytes
        (64, 5_760, 288, 0),
        (64, 5_800, 1_000, 0),
        (64, 5_760, 2_592, 0x55),
        (64, 5_760, 300, 0xFF),
        (16, 2_890, 2_736, 0x55),  # 38 frames of 72 bytes
        (16, 2_880, 2_880, 0),
        (8, 1_440, 1_440, 0),
    ],
)
def test_a_hole_in_an_mp3_never_shifts_later_audio(kbps: int, begin: int, size: int, fill: int, tmp_path: Path) -> None:
    whole = edge.mp3_without_header(TWO_TONES, kbps=kbps)
    expected = edge.onset(decoded(whole, tmp_path), 900)
    assert expected == pytest.approx(3, abs=0.12)
    found = decoded(edge.with_hole(whole, begin, size, fill), tmp_path)
    assert edge.onset(found, 900) == pytest.approx(expected, abs=0.15)


def test_zeros_over_the_start_of_an_mp3_are_corrupt_and_padding_is_not(tmp_path: Path) -> None:
    whole, tag = edge.mp3_without_header(TWO_TONES), b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)
    lost = edge.with_hole(whole, 0, 20 * 288)
    assert [reason(content, tmp_path) for content in (lost, tag + lost)] == ["corrupt"] * 2
    for padded in (bytes(500) + whole, tag + bytes(500) + whole):
        assert edge.onset(decoded(padded, tmp_path), 900) == pytest.approx(3, abs=0.12)


def test_a_large_hole_in_an_mp3_is_corrupt(tmp_path: Path) -> None:
    for begin, size in ((5_760, 17_280), (5_900, 4_000)):
        assert reason(edge.with_hole(edge.mp3_without_header(TWO_TONES), begin, size), tmp_path) == "corrupt"


def test_a_hole_in_an_mp3_of_variable_bit_rate_is_corrupt(tmp_path: Path) -> None:
    mixed = edge.mp3_without_header(edge.tone(1, 300), kbps=160) + edge.mp3_without_header(edge.tone(4, 900), kbps=8)
    assert reason(edge.with_hole(mixed, len(mixed) - 2_000, 1_000), tmp_path) == "corrupt"


def test_zeros_and_tags_between_joined_mp3_files_are_no_hole(tmp_path: Path) -> None:
    tag = b"TAG" + bytes(125)
    for between in (bytes(500) + tag, tag + bytes(500), bytes(40)):
        joined = edge.mp3(2, header=False) + between + edge.mp3(2, header=False, hertz=900)
        assert seconds(joined, tmp_path) == pytest.approx(4.1, abs=0.15)
    assert seconds(edge.mp3(2, header=False) + bytes(9_000) + edge.mp3(2, hertz=900), tmp_path) == pytest.approx(
        4.1, abs=0.15
    )


def test_timestamp_gaps_become_silence(tmp_path: Path) -> None:
    first, second = edge.tone(2, 500), edge.tone(2, 900)
    for container, codec in (("matroska", "flac"), ("webm", "libopus"), ("mpegts", "aac"), ("matroska", "pcm_s16le")):
        rate = 48_000 if codec == "libopus" else 16_000
        pieces = [(0.0, edge.tone(2, 500, rate)), (5.0, edge.tone(2, 900, rate))]
        found = decoded(edge.encoded(pieces, container, codec, rate), tmp_path)
        assert len(found) / 16_000 == pytest.approx(7, abs=0.15), (container, codec)
        assert edge.tone_level(found[90_000:105_000], 900) == pytest.approx(0.3, abs=0.05)
        assert np.abs(found[40_000:75_000]).max() < 0.01
    assert len(first) == len(second)
