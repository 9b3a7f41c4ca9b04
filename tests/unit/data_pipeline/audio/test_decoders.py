"""Choice of the decoder: recognition by content, the fallback, checksums; memory while decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio import codecs
from tests.support import edge_case_audio as edge
from tests.support.decoded_audio import decoded, reason, seconds

pytest.importorskip("av", reason="needs the extra media")


def test_a_flac_that_one_decoder_rejects_is_read_by_the_fallback(tmp_path: Path) -> None:
    wave = edge.speech_like(20)
    for subtype, samples in (("PCM_16", wave), ("PCM_24", wave), ("PCM_16", np.stack([wave, wave], 1))):
        good = edge.written(samples, form="FLAC", subtype=subtype)
        expected = decoded(good, tmp_path)
        np.testing.assert_array_equal(decoded(edge.flac_with_junk(good), tmp_path), expected)


def test_flac_without_a_checksum_is_checked_by_its_length(tmp_path: Path) -> None:
    good = bytearray(edge.written(edge.speech_like(20), form="FLAC"))
    good[26:42] = bytes(16)
    assert seconds(edge.flac_with_junk(bytes(good)), tmp_path) == 20.0
    assert reason(edge.flac_with_total(edge.flac_with_junk(bytes(good)), 400_000), tmp_path) in ("corrupt", "truncated")


def test_samples_that_differ_from_the_checksum_are_corrupt(tmp_path: Path) -> None:
    broken = bytearray(edge.flac_with_junk(edge.written(edge.speech_like(20), form="FLAC")))
    broken[30] ^= 1
    assert reason(bytes(broken), tmp_path) == "corrupt"


def test_gsm_is_read(tmp_path: Path) -> None:
    gsm = edge.written(edge.tone(4, 500, 8_000), 8_000, "RAW", "GSM610")
    found = decoded(gsm, tmp_path)
    assert len(found) / 16_000 == pytest.approx(4, abs=0.05)
    assert edge.tone_level(found[8_000:56_000], 500) == pytest.approx(0.3, abs=0.1)
    assert seconds(gsm[:-10], tmp_path) == pytest.approx(4, abs=0.05)


def test_the_audio_format_is_recognised_by_content(tmp_path: Path) -> None:
    contents = {
        "a.3gp": edge.encoded([(0, edge.tone(1, 300, 8_000))], "3gp", "libopencore_amrnb", 8_000, 12_200),
        "b.m4b": edge.encoded([(0, edge.tone(1, 300))], "mp4", "aac"),
        "c.mka": edge.encoded([(0, edge.tone(1, 300))], "matroska", "flac"),
        "d.weba": edge.encoded([(0, edge.tone(1, 300, 48_000))], "webm", "libopus", 48_000),
        "e.mp2": edge.encoded([(0, edge.tone(1, 300))], "mp2", "mp2"),
        "f.ts": edge.encoded([(0, edge.tone(1, 300))], "mpegts", "aac"),
        "g.gsm": edge.written(edge.tone(1, 300, 8_000), 8_000, "RAW", "GSM610"),
        "h.aac": edge.encoded([(0, edge.tone(1, 300))], "adts", "aac"),
        "i.dat": edge.written(edge.tone(1, 300)),
        "j": edge.written(edge.tone(1, 300), form="FLAC"),
        "k.mpga": edge.mp3(1),
        "l": edge.mp3(1, header=False),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = codecs.probe_content(str(tmp_path / name))
        assert found is not None, name
        assert found.channels == 1
        assert sum(len(block) for block in codecs.decode(str(tmp_path / name), 16_000)) == pytest.approx(
            16_000, abs=2_500
        )
    for name, content in {
        "a.txt": b"It was a dark and stormy night. " * 99,
        "b.png": b"\x89PNG\r\n\x1a\n" + bytes(900),
        "c.zip": b"PK\x03\x04" + bytes(300),
        "d.json": b"{}",
        "e": b"",
        "f.bin": bytes(range(256)) * 40,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert codecs.probe_content(str(tmp_path / name)) is None, name
    assert codecs.probe_content(str(tmp_path / "nothing")) is None


def test_a_long_silent_file_is_decoded_in_small_blocks(tmp_path: Path) -> None:
    """A highly compressed hour of silence: no buffer is sized by the header."""
    import soundfile

    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for _ in range(60):
            file.write(np.zeros(16_000 * 60, np.int16))
    largest = total = 0
    for block in codecs.decode(str(path), 16_000):
        largest, total = max(largest, len(block)), total + len(block)
    assert total == 3_600 * 16_000
    assert largest <= 1 << 18
