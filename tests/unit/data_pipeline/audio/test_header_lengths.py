"""Files whose header gives a wrong length or rate, or none: truncated, streamed, with audio after the stated end."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support import edge_case_audio as edge
from tests.support.decoded_audio import decoded, reason, seconds

pytest.importorskip("av", reason="needs the extra media")

FLAC = edge.written(edge.tone(6, 300), form="FLAC")
VORBIS = edge.written(edge.tone(5, 300), form="OGG", subtype="VORBIS")
OPUS = edge.written(edge.tone(5, 300), form="OGG", subtype="OPUS")
NOISE = {name: edge.written(edge.speech_like(20), form="OGG", subtype=name) for name in ("VORBIS", "OPUS")}


def cut(content: bytes, share: float) -> bytes:
    return content[: round(share * len(content))]


@pytest.mark.parametrize("rates", [(192, 32), (32, 192), (64, 320)])
def test_variable_bit_rate_mp3_without_a_header_is_decoded_to_its_end(rates: tuple[int, int], tmp_path: Path) -> None:
    content = b"".join(edge.mp3(6, 44_100, kbps, header=False) for kbps in rates)
    assert seconds(content, tmp_path) == pytest.approx(12.1, abs=0.1)


def test_files_shorter_than_the_length_in_their_header_are_rejected(tmp_path: Path) -> None:
    inputs = [
        VORBIS,
        OPUS,
        FLAC,
        edge.mp3(6),
        edge.written(edge.tone(6, 300), form="AIFF"),
        edge.written(edge.tone(6, 300), form="CAF"),
    ]
    inputs += [
        edge.encoded([(0, edge.tone(6, 300))], "mp4", "aac"),
        edge.encoded([(0, edge.tone(6, 300))], "matroska", "flac"),
    ]
    assert [reason(cut(content, 0.6), tmp_path) for content in inputs[:2]] == ["truncated"] * 2
    assert {reason(cut(content, 0.6), tmp_path) for content in inputs} <= {"truncated", "corrupt", "unreadable"}


def test_a_truncated_mp3_without_a_frame_count_yields_its_remaining_audio(tmp_path: Path) -> None:
    assert seconds(cut(edge.mp3(6, header=False), 0.5), tmp_path) == pytest.approx(3.0, abs=0.1)


def test_an_ogg_cut_at_a_page_boundary_yields_its_remaining_audio(tmp_path: Path) -> None:
    for content in NOISE.values():
        pages = edge.pages(content)
        found, whole = decoded(b"".join(pages[: len(pages) // 2]), tmp_path), decoded(content, tmp_path)
        assert 5 < len(found) / 16_000 < 15
        np.testing.assert_allclose(found[:64_000], whole[:64_000], atol=1e-4)


def test_a_flac_header_with_too_few_or_no_samples_does_not_shorten_it(tmp_path: Path) -> None:
    for total in (0, 16_000, 80_000):
        assert seconds(edge.flac_with_total(FLAC, total), tmp_path) == 6.0


@pytest.mark.parametrize("total", [96_001, 1 << 30, (1 << 36) - 1])
def test_a_flac_header_with_too_many_samples_is_accepted_only_with_a_matching_checksum(
    total: int, tmp_path: Path
) -> None:
    lying = edge.flac_with_total(FLAC, total)
    assert seconds(lying, tmp_path) == 6.0, "the checksum matches"
    assert reason(lying[:26] + bytes(16) + lying[42:], tmp_path) == "truncated"


def test_a_second_data_chunk_is_decoded(tmp_path: Path) -> None:
    wave = edge.written(edge.tone(2, 300))
    more = edge.written(edge.tone(1, 900))[36:]
    assert seconds(wave + b"LIST\x04\x00\x00\x00abcd" + more, tmp_path) == 3.0


def test_audio_beyond_the_length_in_the_header_is_rejected_as_trailing_data(tmp_path: Path) -> None:
    assert reason(edge.wav_with_size(edge.tone(5, 300), 32_000, 32_036), tmp_path) == "trailing_data"
    assert seconds(edge.written(edge.tone(2, 300)) + bytes(9_000), tmp_path) == 2.0
    assert seconds(edge.written(edge.tone(2, 300)) + b"\x01\x02" * 1_000, tmp_path) == 2.0


@pytest.mark.parametrize(
    "size", [0, 0x7FFFF000, 0x7FFFF000 - 36, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF - 36]
)
def test_wav_with_a_placeholder_length_is_read_to_the_end_of_the_file(size: int, tmp_path: Path) -> None:
    wave = edge.tone(3, 300)
    found = decoded(edge.wav_with_size(wave, size), tmp_path)
    np.testing.assert_allclose(found, wave, atol=1e-4)
    assert seconds(edge.wav_with_size(wave, size, 0), tmp_path) == 3.0


def test_placeholder_lengths_of_other_containers_are_read_to_the_end(tmp_path: Path) -> None:
    wave = edge.tone(3, 300)
    rf64 = edge.written(wave, form="RF64")
    data = rf64.index(b"data")
    for size in (0, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1):
        changed = rf64[: data + 4] + b"\xff" * 4 + rf64[data + 8 :]
        assert seconds(changed[:28] + struct.pack("<Q", size) + changed[36:], tmp_path) == 3.0, size
    w64 = edge.written(wave, form="W64")
    at = w64.index(b"data\xf3\xac") + 16
    for size in (0, 24, (1 << 63) - 1, (1 << 64) - 1):
        assert seconds(w64[:at] + struct.pack("<Q", size) + w64[at + 8 :], tmp_path) == 3.0, size
    au = edge.written(wave, form="AU", endian="BIG")
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert seconds(au[:8] + struct.pack(">I", size) + au[12:], tmp_path) == 3.0, size
    caf = edge.written(wave, form="CAF")
    at = caf.index(b"data") + 4
    assert seconds(caf[:at] + struct.pack(">q", -1) + caf[at + 8 :], tmp_path) == 3.0
    aiff = edge.written(wave, form="AIFF")
    ssnd, comm = aiff.index(b"SSND") + 4, aiff.index(b"COMM") + 10
    for size in (0, 0x7F000000, 0x7F000008, 0xFFFFFFFF):
        changed = aiff[:ssnd] + struct.pack(">I", size) + aiff[ssnd + 4 :]
        changed = changed[:comm] + struct.pack(">I", size // 2) + changed[comm + 4 :]
        assert seconds(changed[:4] + struct.pack(">I", size) + changed[8:], tmp_path) == 3.0, size
    rifx = edge.written(wave, endian="BIG")
    assert rifx[:4] == b"RIFX"
    at = rifx.index(b"data") + 4
    assert seconds(rifx[:at] + b"\xff" * 4 + rifx[at + 4 :], tmp_path) == 3.0
    nist = edge.written(wave, form="NIST")
    assert seconds(nist.replace(b"sample_count -i 48000", b"sample_count -i 0    "), tmp_path) == 3.0


def test_an_empty_data_chunk_before_other_chunks_is_empty(tmp_path: Path) -> None:
    wave = edge.written(np.zeros(0, np.float32))
    assert reason(wave[:4] + struct.pack("<I", 48) + wave[8:] + b"LIST\x04\x00\x00\x00abcd", tmp_path) == "no_samples"


def test_compressed_wav_subtypes_with_a_placeholder_length_are_decoded(tmp_path: Path) -> None:
    for subtype, padding in (("ULAW", 0), ("FLOAT", 0), ("PCM_24", 0), ("IMA_ADPCM", 0.06), ("GSM610", 0.05)):
        rate = 8_000 if subtype == "GSM610" else 16_000
        good = edge.written(edge.tone(3, 300, rate), rate, subtype=subtype)
        at = good.index(b"data") + 4
        assert seconds(good[:at] + b"\xff" * 4 + good[at + 4 :], tmp_path) == pytest.approx(3, abs=padding + 1e-9)


@pytest.mark.parametrize("rate", [0, 8_000, 11_025, 12_000, 44_100, 192_000])
def test_opus_is_decoded_at_full_bandwidth(rate: int, tmp_path: Path) -> None:
    wave = edge.tone(3, 7_000, 48_000)
    found = decoded(edge.opus_with_rate(edge.written(wave, 48_000, "OGG", "OPUS"), rate), tmp_path)
    assert len(found) / 16_000 == pytest.approx(3, abs=0.05)
    assert edge.tone_level(found[8_000:40_000], 7_000) == pytest.approx(0.3, abs=0.05)
