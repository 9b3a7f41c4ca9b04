"""Embeddings of voices by an encoder of random weights, in a package as Resemblyzer's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.speaker_similarity import PACKAGE, VoiceEncoder, amplified, speaker_encoder, window_starts
from tests.support.contract_cases import speech_like


def package(folder: Path, content: bytes | None = None) -> None:
    """Writes a package with random weights, which cannot be imported."""
    (folder / PACKAGE).mkdir()
    (folder / PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')\n")
    torch.manual_seed(0)
    state = VoiceEncoder().state_dict() | {"similarity_weight": torch.ones(1)}
    torch.save({"step": 1, "model_state": state}, folder / PACKAGE / "pretrained.pt")
    if content is not None:
        (folder / PACKAGE / "pretrained.pt").write_bytes(content)


def test_the_embedding_is_the_mean_over_windows_and_independent_of_loudness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    embed, wave = speaker_encoder(), 0.01 * speech_like(3.0, 0).numpy()
    found = embed(wave)
    assert found.shape == (256,)
    assert float(found @ found) == pytest.approx(1.0, rel=1e-5)
    assert float(found @ embed(0.5 * wave)) == pytest.approx(1.0, rel=1e-5)
    assert float(found @ embed(speech_like(3.0, 5).numpy())) < 0.99999
    assert embed(wave[:1_000]).shape == embed(np.zeros(16_000, np.float32)).shape == (256,)


def test_windows_cover_all_but_a_short_rest() -> None:
    assert window_starts(1) == window_starts(WHOLE) == [0]
    assert window_starts(WHOLE + 77 * 160) == [0, 77]
    for samples in range(1, 100_000, 997):
        starts = window_starts(samples)
        assert samples - (starts[-1] + 160) * 160 <= 77 * 160
        assert len(starts) == 1 or samples - starts[-1] * 160 >= 0.75 * WHOLE


WHOLE = 160 * 160
"""Samples of a window."""


def test_quiet_audio_is_amplified_and_loud_audio_is_not() -> None:
    wave = speech_like(0.5, 0).numpy()
    assert np.square(amplified(1e-3 * wave)).mean() == pytest.approx(1e-3, rel=1e-3)
    np.testing.assert_array_equal(amplified(wave), wave)
    assert not amplified(np.zeros(100, np.float32)).any()


def test_a_missing_and_a_damaged_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps resemblyzer==0\.1\.4"):
        speaker_encoder()
    monkeypatch.undo()
    package(tmp_path, b"no weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"pretrained\.pt: cannot be read .*install resemblyzer"):
        speaker_encoder()
