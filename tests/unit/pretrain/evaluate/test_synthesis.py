"""Measures of synthesised speech on signals whose result is known."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evaluate.synthesis import cepstra, mel_cepstral_distortion, pitch_error, warping_path
from tests.support.contract_cases import speech_like


def voice(hertz: float, seconds: float = 0.6) -> np.ndarray:
    time = np.arange(int(seconds * 16_000)) / 16_000
    return np.asarray(0.1 * sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 15)), np.float32)


def test_a_warped_path_follows_a_slower_copy() -> None:
    values = np.array([0.0, 3.0, 1.0, 7.0])
    slower = np.repeat(values, [1, 3, 2, 1])
    path = warping_path(np.abs(values[:, None] - slower[None]))
    assert [values[x] for x, _ in path] == [slower[y] for _, y in path]
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [3, 6]


def test_a_copy_has_no_distortion_and_loudness_does_not_count() -> None:
    wave = speech_like(0.5, 3).numpy()
    for copy in (wave, 0.5 * wave):
        total, count = mel_cepstral_distortion(wave, copy)
        assert count >= len(cepstra(wave))
        assert total / count < 0.2
    total, count = mel_cepstral_distortion(wave, speech_like(0.5, 4).numpy())
    assert total / count > 1.0


def test_the_pitch_of_tones_differs_by_their_interval() -> None:
    pytest.importorskip("swift_f0")
    total, count = pitch_error(voice(120.0), voice(120.0 * 2 ** (3 / 12)))
    assert count > 20
    assert total / count == pytest.approx(3.0, abs=0.3)


def test_pocketsphinx_needs_words_that_it_knows() -> None:
    pytest.importorskip("pocketsphinx")
    from pretrain.evaluate.synthesis import pocketsphinx

    with pytest.raises(ValueError, match="does not know zzyzzx"):
        pocketsphinx(["one", "zzyzzx"])
    assert set(pocketsphinx(["one", "two"])(speech_like(0.5, 1).numpy()).split()) <= {"one", "two"}
