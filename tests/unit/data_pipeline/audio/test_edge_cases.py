"""Files whose header gives a wrong length, rate or channel count, or none: truncated, concatenated, streamed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio import codecs
from data_pipeline.audio.codecs import AudioError
from tests.support import edge_case_audio as edge

pytest.importorskip("av", reason="needs the extra media")


def decoded(content: bytes, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    from_file = np.concatenate(list(codecs.decode(str(path), 16_000)))
    np.testing.assert_array_equal(np.concatenate(list(codecs.decode(content, 16_000))), from_file)
    return from_file


def seconds(content: bytes, tmp_path: Path) -> float:
    return len(decoded(content, tmp_path)) / 16_000


def reason(content: bytes, tmp_path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        decoded(content, tmp_path)
    return caught.value.reason


def cut(content: bytes, share: float) -> bytes:
    return content[: round(share * len(content))]


FLAC = edge.written(edge.tone(6, 300), form="FLAC")
NOISE = {name: edge.written(edge.speech_like(20), form="OGG", subtype=name) for name in ("VORBIS", "OPUS")}
VORBIS = edge.written(edge.tone(5, 300), form="OGG", subtype="VORBIS")
OPUS = edge.written(edge.tone(5, 300), form="OGG", subtype="OPUS")


# headers with a wrong or missing length


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


TWO_TONES = np.concatenate([edge.tone(3, 300), edge.tone(2, 900)])


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


# concatenated files and streams


def test_every_stream_of_a_chained_ogg_is_decoded(tmp_path: Path) -> None:
    for subtype in ("VORBIS", "OPUS"):
        links = [
            edge.written(edge.tone(length, hertz), form="OGG", subtype=subtype)
            for length, hertz in ((5, 400), (7, 900))
        ]
        found = decoded(b"".join(links), tmp_path)
        assert len(found) / 16_000 == pytest.approx(12, abs=0.1)
        assert edge.tone_level(found[-48_000:-16_000], 900) == pytest.approx(0.3, abs=0.05)


def test_chained_streams_of_different_rates_codecs_and_channels_are_decoded(tmp_path: Path) -> None:
    stereo = np.stack([edge.tone(3, 900, 44_100)] * 2, axis=1)
    mixed = VORBIS + edge.written(stereo, 44_100, "OGG", "VORBIS") + OPUS
    found = decoded(mixed, tmp_path)
    assert len(found) / 16_000 == pytest.approx(13, abs=0.1)
    assert edge.tone_level(found[90_000:120_000], 900) == pytest.approx(0.3, abs=0.05)
    assert edge.tone_level(found[-60_000:-20_000], 300) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("headers", [(True, True), (True, False), (False, True)])
def test_concatenated_mp3_is_decoded_to_its_end(headers: tuple[bool, bool], tmp_path: Path) -> None:
    joined = edge.mp3(5, header=headers[0]) + edge.mp3(7, header=headers[1], hertz=900)
    found = decoded(joined, tmp_path)
    assert len(found) / 16_000 == pytest.approx(12.1, abs=0.15)
    assert edge.tone_level(found[-48_000:-16_000], 900) == pytest.approx(0.3, abs=0.05)


def test_concatenated_mp3_with_different_rates_and_tags_between_is_decoded(tmp_path: Path) -> None:
    tag = b"TAG" + bytes(125)
    id3 = b"ID3\x04\x00\x00\x00\x00\x07\x76" + b"\xff\xfb" * 507
    found = decoded(
        edge.mp3(3) + tag + id3 + edge.mp3(3, 44_100, 128) + edge.mp3(3, 22_050, header=False, hertz=900), tmp_path
    )
    assert len(found) / 16_000 == pytest.approx(9.1, abs=0.15)
    assert edge.tone_level(found[-40_000:-8_000], 900) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("FLAC", "PCM_16"),
        ("WAV", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("W64", "FLOAT"),
        ("AU", "PCM_16"),
        ("CAF", "PCM_16"),
        ("NIST", "PCM_16"),
    ],
)
def test_concatenated_files_are_decoded_to_the_end(form: str, subtype: str, tmp_path: Path) -> None:
    joined = edge.written(edge.tone(2, 300), form=form, subtype=subtype) + edge.written(
        edge.tone(3, 900, 22_050), 22_050, form, subtype
    )
    found = decoded(joined, tmp_path)
    assert len(found) / 16_000 == pytest.approx(5, abs=0.01)
    assert edge.tone_level(found[-40_000:-8_000], 900) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "aac"),
        ("matroska", "flac"),
        ("webm", "libopus"),
        ("adts", "aac"),
        ("amr", "libopencore_amrnb"),
        ("mpegts", "aac"),
    ],
)
def test_concatenated_media_files_are_decoded_to_the_end(container: str, codec: str, tmp_path: Path) -> None:
    rate = {"libopus": 48_000, "libopencore_amrnb": 8_000}.get(codec, 16_000)
    parts = [
        edge.encoded([(0, edge.tone(length, hertz, rate))], container, codec, rate, 12_200 if rate == 8_000 else 0)
        for length, hertz in ((2, 300), (3, 900))
    ]
    found = decoded(b"".join(parts), tmp_path)
    assert len(found) / 16_000 == pytest.approx(5, abs=0.35)
    assert edge.tone_level(found[-36_000:-12_000], 900) == pytest.approx(0.3, abs=0.08)


def test_a_sample_rate_change_within_a_stream_is_handled(tmp_path: Path) -> None:
    parts = [edge.encoded([(0, edge.tone(3, 900, rate))], "adts", "aac", rate) for rate in (16_000, 44_100, 22_050)]
    found = decoded(b"".join(parts), tmp_path)
    assert len(found) / 16_000 == pytest.approx(9, abs=0.4)
    for start in (8_000, 60_000, 110_000):
        assert edge.tone_level(found[start : start + 24_000], 900) == pytest.approx(0.3, abs=0.05)


def test_a_second_data_chunk_is_decoded(tmp_path: Path) -> None:
    wave = edge.written(edge.tone(2, 300))
    more = edge.written(edge.tone(1, 900))[36:]
    assert seconds(wave + b"LIST\x04\x00\x00\x00abcd" + more, tmp_path) == 3.0


def test_audio_beyond_the_length_in_the_header_is_rejected_as_trailing_data(tmp_path: Path) -> None:
    assert reason(edge.wav_with_size(edge.tone(5, 300), 32_000, 32_036), tmp_path) == "trailing_data"
    assert seconds(edge.written(edge.tone(2, 300)) + bytes(9_000), tmp_path) == 2.0
    assert seconds(edge.written(edge.tone(2, 300)) + b"\x01\x02" * 1_000, tmp_path) == 2.0


# placeholder lengths


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


# sample rates and channels


@pytest.mark.parametrize("rate", [0, 8_000, 11_025, 12_000, 44_100, 192_000])
def test_opus_is_decoded_at_full_bandwidth(rate: int, tmp_path: Path) -> None:
    wave = edge.tone(3, 7_000, 48_000)
    found = decoded(edge.opus_with_rate(edge.written(wave, 48_000, "OGG", "OPUS"), rate), tmp_path)
    assert len(found) / 16_000 == pytest.approx(3, abs=0.05)
    assert edge.tone_level(found[8_000:40_000], 7_000) == pytest.approx(0.3, abs=0.05)


def stereo(left: np.ndarray, right: np.ndarray, rate: int = 16_000) -> bytes:
    return edge.written(np.stack([left, right], axis=1), rate, "FLAC")


def test_hum_in_anti_phase_does_not_cancel_speech(tmp_path: Path) -> None:
    hum, quiet = edge.tone(10, 50), np.zeros(160_000, np.float32)
    left = np.concatenate([hum, edge.tone(10, 500), quiet])
    right = np.concatenate([-hum, quiet, edge.tone(10, 900)])
    found = decoded(stereo(left, right), tmp_path)
    assert edge.tone_level(found[20_000:150_000], 50) == pytest.approx(0.3, abs=0.01)
    assert edge.tone_level(found[170_000:310_000], 500) == pytest.approx(0.15, abs=0.01)
    assert edge.tone_level(found[330_000:470_000], 900) == pytest.approx(0.15, abs=0.01)


def test_speech_in_anti_phase_after_a_jingle_is_kept(tmp_path: Path) -> None:
    jingle, speech = edge.tone(9, 700), edge.speech_like(20)
    found = decoded(stereo(np.concatenate([jingle, speech]), np.concatenate([jingle, -speech])), tmp_path)
    np.testing.assert_allclose(found[150_000:], speech[6_000:], atol=1e-3)
    np.testing.assert_allclose(found[:140_000], jingle[:140_000], atol=1e-3)


def test_intermittent_anti_phase_is_handled_by_every_decoder(tmp_path: Path) -> None:
    parts = [edge.tone(3.1, 400 + 100 * number) for number in range(6)]
    left = np.concatenate(parts)
    right = np.concatenate([part * (-1) ** number for number, part in enumerate(parts)])
    for content in (stereo(left, right), edge.encoded([(0, np.stack([left, right], 1))], "matroska", "flac")):
        found = decoded(content, tmp_path)
        for number in range(6):
            middle = found[round((3.1 * number + 0.5) * 16_000) : round((3.1 * number + 2.6) * 16_000)]
            assert edge.tone_level(middle, 400 + 100 * number) == pytest.approx(0.3, abs=0.02)
        assert np.abs(np.diff(found)).max() < 0.2, "a click"


def test_channels_of_unequal_level_and_silent_channels_are_averaged(tmp_path: Path) -> None:
    speech = edge.tone(6, 500)
    assert edge.tone_level(decoded(stereo(speech, -0.8 * speech), tmp_path)[8_000:88_000], 500) > 0.2
    assert edge.tone_level(decoded(stereo(0 * speech, speech), tmp_path)[8_000:88_000], 500) == pytest.approx(
        0.15, abs=0.01
    )
    six = np.zeros((96_000, 6), np.float32)
    six[:, 2] = speech
    assert edge.tone_level(decoded(edge.written(six), tmp_path)[8_000:88_000], 500) == pytest.approx(0.05, abs=0.01)


# decoder failures


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


# other formats and memory bounds


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
