"""Downmix: the speech of every channel is kept, whatever hum or polarity the channels have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio.downmix import Downmix
from tests.support.decoded_audio import decoded
from tests.support.edge_case_audio import encoded, speech_like, tone, tone_level, written

RATE = 16_000
SECONDS = 10


def mixed(channels: np.ndarray, block: int = 7_001, rate: int = RATE) -> np.ndarray:
    """Returns the mix of (channels, T)."""
    downmix, wave = Downmix(rate, len(channels)), np.ascontiguousarray(channels.T)
    parts = [part for at in range(0, len(wave), block) for part in downmix.push(wave[at : at + block])]
    return np.concatenate([*parts, *downmix.flush()])


def placed(start: float, seconds: float, hertz: float, level: float = 0.14, rate: int = RATE) -> np.ndarray:
    wave = np.zeros(SECONDS * rate, np.float32)
    wave[round(start * rate) : round((start + seconds) * rate)] = tone(seconds, hertz, rate, level)
    return wave


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("level", [0.05, 0.2, 0.28, 0.4, 0.6])
def test_one_speaker_per_channel_is_kept_in_hum_of_opposite_polarity(level: float, rate: int) -> None:
    hum = tone(SECONDS, 50, rate, level)
    found = mixed(np.stack([hum + placed(1, 3, 500, rate=rate), -hum + placed(6, 3, 1_500, rate=rate)]), rate=rate)
    for start, stop, hertz in ((1.5, 3.7, 500), (6.5, 8.7, 1_500)):
        part = found[round(start * rate) : round(stop * rate)]
        assert tone_level(part, hertz, rate) == pytest.approx(0.07, abs=0.005)


@pytest.mark.parametrize("sign", [1, -1])
def test_speech_in_both_channels_is_kept_in_hum_of_the_other_polarity(sign: int) -> None:
    hum, speech = tone(SECONDS, 50, level=0.5), placed(1, 8, 400)
    found = mixed(np.stack([hum + speech, -sign * hum + sign * speech]))
    assert tone_level(found[24_000:136_000], 400) == pytest.approx(0.14, abs=0.005)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_pairs_of_opposite_polarity_keep_every_signal(order: tuple[int, ...]) -> None:
    one, two = placed(0, 5, 500, 0.2), placed(0, 5, 1_500, 0.2)
    found = mixed(np.stack([one, -one, two, -two])[list(order)])[8_000:72_000]
    assert tone_level(found, 500) == pytest.approx(0.1, abs=0.005)
    assert tone_level(found, 1_500) == pytest.approx(0.1, abs=0.005)


def test_every_channel_of_a_meeting_is_kept_when_one_is_inverted() -> None:
    room = speech_like(SECONDS, "room")
    talkers = np.stack([placed(2 * number, 2, 600 + 300 * number, 0.3) for number in range(4)])
    channels = room + talkers
    channels[2] *= -1
    found = mixed(channels)
    for number in range(4):
        part = found[round((2 * number + 0.3) * RATE) : round((2 * number + 1.7) * RATE)]
        assert tone_level(part, 600 + 300 * number) == pytest.approx(0.075, abs=0.02)


def test_the_mix_does_not_depend_on_the_blocks() -> None:
    hum, speech = tone(SECONDS, 50), speech_like(SECONDS)
    speech[80_000:] *= -1
    channels = np.stack([hum + speech, hum + np.abs(speech), -hum - speech]).astype(np.float32)
    np.testing.assert_array_equal(mixed(channels, 500), mixed(channels, 160_000))
    assert len(mixed(channels, 999)) == len(hum)


def test_independent_channels_are_averaged_exactly() -> None:
    channels = np.stack([speech_like(5, name) for name in ("one", "two", "three")])
    np.testing.assert_array_equal(mixed(channels), channels.T.mean(axis=1, dtype=np.float32))


# files


def stereo(left: np.ndarray, right: np.ndarray, rate: int = 16_000) -> bytes:
    return written(np.stack([left, right], axis=1), rate, "FLAC")


def test_hum_in_anti_phase_does_not_cancel_speech(tmp_path: Path) -> None:
    hum, quiet = tone(10, 50), np.zeros(160_000, np.float32)
    left = np.concatenate([hum, tone(10, 500), quiet])
    right = np.concatenate([-hum, quiet, tone(10, 900)])
    found = decoded(stereo(left, right), tmp_path)
    assert tone_level(found[20_000:150_000], 50) == pytest.approx(0.3, abs=0.01)
    assert tone_level(found[170_000:310_000], 500) == pytest.approx(0.15, abs=0.01)
    assert tone_level(found[330_000:470_000], 900) == pytest.approx(0.15, abs=0.01)


def test_speech_in_anti_phase_after_a_jingle_is_kept(tmp_path: Path) -> None:
    jingle, speech = tone(9, 700), speech_like(20)
    found = decoded(stereo(np.concatenate([jingle, speech]), np.concatenate([jingle, -speech])), tmp_path)
    np.testing.assert_allclose(found[150_000:], speech[6_000:], atol=1e-3)
    np.testing.assert_allclose(found[:140_000], jingle[:140_000], atol=1e-3)


def test_intermittent_anti_phase_is_handled_by_every_decoder(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the extra media")
    parts = [tone(3.1, 400 + 100 * number) for number in range(6)]
    left = np.concatenate(parts)
    right = np.concatenate([part * (-1) ** number for number, part in enumerate(parts)])
    for content in (stereo(left, right), encoded([(0, np.stack([left, right], 1))], "matroska", "flac")):
        found = decoded(content, tmp_path)
        for number in range(6):
            middle = found[round((3.1 * number + 0.5) * 16_000) : round((3.1 * number + 2.6) * 16_000)]
            assert tone_level(middle, 400 + 100 * number) == pytest.approx(0.3, abs=0.02)
        assert np.abs(np.diff(found)).max() < 0.2, "a click"


def test_channels_of_unequal_level_and_silent_channels_are_averaged(tmp_path: Path) -> None:
    speech = tone(6, 500)
    assert tone_level(decoded(stereo(speech, -0.8 * speech), tmp_path)[8_000:88_000], 500) > 0.2
    assert tone_level(decoded(stereo(0 * speech, speech), tmp_path)[8_000:88_000], 500) == pytest.approx(0.15, abs=0.01)
    six = np.zeros((96_000, 6), np.float32)
    six[:, 2] = speech
    assert tone_level(decoded(written(six), tmp_path)[8_000:88_000], 500) == pytest.approx(0.05, abs=0.01)
