"""Two files joined together, of any formats: what follows the first one is decoded, too, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.codecs import AudioError
from data_pipeline.audio.containers import examine
from tests.support import edge_case_audio as edge
from tests.support.decoded_audio import decoded

pytest.importorskip("av", reason="needs the extra media")

FOLLOWERS = ("wav", "flac", "ogg", "mp3", "bare mp3", "tta", "adts", "mp4", "same")


VORBIS = edge.written(edge.tone(5, 300), form="OGG", subtype="VORBIS")
OPUS = edge.written(edge.tone(5, 300), form="OGG", subtype="OPUS")


def wrong(found: np.ndarray, first: float = 1.0, second: float = 1.0) -> str:
    """Returns what is wrong with a tone of 300 Hz that a tone of 900 Hz should follow; "" if nothing."""
    length, at = len(found) / 16_000, edge.onset(found, 900)
    right = abs(length - first - second) < 0.25 and abs(at - first) < 0.2
    return "" if right and edge.tone_level(found[-6_000:-4_800], 900) > 0.2 else f"{length:.2f} s, 900 Hz at {at:.2f} s"


@pytest.mark.parametrize("first", edge.FORMATS)
def test_what_follows_a_file_of_any_format_is_decoded(first: str, tmp_path: Path) -> None:
    faults = {}
    for second in FOLLOWERS:
        name = first if second == "same" else second
        try:
            fault = wrong(decoded(edge.in_format(first, 1, 300) + edge.in_format(name, 1, 900), tmp_path))
        except AudioError as error:
            fault = f"{error.reason}: {error}"
        if fault:
            faults[name] = fault
    assert not faults


@pytest.mark.parametrize("second", ["wav", "flac", "ogg", "caf", "mp4"])
@pytest.mark.parametrize("first", ["wav", "au"])
def test_what_follows_a_file_of_unknown_length_is_decoded(first: str, second: str, tmp_path: Path) -> None:
    wave = edge.tone(1, 300)
    streamed = edge.wav_with_size(wave, 0xFFFFFFFF)
    if first == "au":
        au = edge.written(wave, form="AU", endian="BIG")
        streamed = au[:8] + b"\xff" * 4 + au[12:]
    assert not wrong(decoded(streamed + edge.in_format(second, 1, 900), tmp_path))


def test_what_follows_a_large_or_streamed_flac_is_decoded(tmp_path: Path) -> None:
    noise = edge.written(edge.speech_like(20), form="FLAC")
    assert len(noise) > 1 << 18
    for second in ("mp3", "ogg", "flac"):
        found = decoded(noise + edge.in_format(second, 1, 900), tmp_path)
        assert len(found) / 16_000 == pytest.approx(21, abs=0.15)
        assert edge.tone_level(found[-10_000:-4_000], 900) > 0.2
    streamed = edge.flac_with_total(edge.in_format("flac", 1, 300), 0)
    assert not wrong(decoded(streamed + edge.in_format("mp3", 1, 900), tmp_path))
    three = edge.in_format("flac", 1, 300) + edge.in_format("flac", 1, 300) + edge.in_format("bare mp3", 1, 900)
    assert not wrong(decoded(three, tmp_path), first=2.0)


def test_tags_between_files_are_skipped(tmp_path: Path) -> None:
    tag, id3 = b"TAG" + bytes(125), b"ID3\x04\x00\x00\x00\x00\x00\x10" + b"TIT2" + bytes(12)
    for first, second in (("flac", "mp3"), ("mp3", "flac"), ("tta", "tta"), ("adts", "mp3"), ("wavpack", "wav")):
        joined = edge.in_format(first, 1, 300) + tag + id3 + edge.in_format(second, 1, 900)
        assert not wrong(decoded(joined, tmp_path)), (first, second)


@pytest.mark.parametrize("name", ["adts", "ac3", "gsm"])
def test_zeros_over_whole_frames_of_a_stream_are_corrupt(name: str, tmp_path: Path) -> None:
    content = edge.in_format(name, 1, 300) + edge.in_format(name, 1, 900)
    begin = len(edge.in_format(name, 1, 300))
    hole = edge.with_hole(content, begin, len(edge.in_format(name, 0.5, 900)) // 33 * 33)
    with pytest.raises(AudioError) as refused:
        decoded(hole, tmp_path)
    assert refused.value.reason in ("corrupt", "trailing_data")


def test_the_sections_of_monkeys_audio_give_its_end() -> None:
    sizes = (52, 24, 8, 44, 5_000, 0, 10)
    content = b"MAC " + (3_990).to_bytes(4, "little") + b"".join(size.to_bytes(4, "little") for size in sizes)
    content = content.ljust(sum(sizes), b"\x55") + edge.in_format("wav", 1, 900)
    with ByteSource(content) as source:
        assert [part.pieces for part in examine(source)] == [((0, 5_138),), ((5_138, len(content)),)]


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
