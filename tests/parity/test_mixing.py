"""WavLM's mixing against the released `mixing_collated_audios`, reimplemented in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.objectives import wavlm
from tests.support.contract_cases import make
from tests.support.parity_table import Parity

B, T = 3, 601
NAMES = ("mix", "noise", "partner", "length", "begin", "at", "snr")


class Recorder:
    """A random generator that records its draws under `names`, in order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.drawn: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any) -> Any:
            self.drawn.append(getattr(self.rng, name)(*args))
            return self.drawn[-1]

        return draw


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    wave_BT = rng.standard_normal((B, T)) * rng.uniform(0.01, 1, (B, 1)) * np.linspace(0.1, 2, T)
    wave_BT[2] *= step % 5 != 0  # some rows are silent
    return Batch(torch.from_numpy(wave_BT).float(), torch.full((B,), T), ("a", "b", "c"), 0)


def mixed(
    monkeypatch: pytest.MonkeyPatch, objective: Any, step: int
) -> tuple[Batch, torch.Tensor, list[dict[str, Any]]]:
    """Returns a batch, its mixture, and the draws for each row: {} where nothing is mixed in."""
    recorders, clips = [], []

    def recorded(*key: Any) -> Recorder:
        recorders.append(Recorder(keyed_rng(*key)))
        return recorders[-1]

    def clip(length: int, rng: Recorder) -> np.ndarray:
        clips.append(np.random.default_rng(len(clips)).standard_normal(length).astype(np.float32))
        return clips[-1]

    monkeypatch.setattr(wavlm, "keyed_rng", recorded)
    monkeypatch.setattr(wavlm, "pink_noise", clip)
    given = batch(step)
    found_BT = objective.mix(given, StepContext(0, step))
    rows = []
    for recorder in recorders:
        if recorder.drawn[0] >= objective.config.mix_prob:
            rows.append({})
            continue
        noisy = recorder.drawn[1] < objective.config.noise_share
        names = [name for name in NAMES if name != "partner" or not noisy]
        rows.append(dict(zip(names, recorder.drawn, strict=True)) | ({"clip": clips.pop(0)} if noisy else {}))
    return given, found_BT, rows


def released(source: np.ndarray, rows: list[dict[str, Any]]) -> np.ndarray:
    """Mixes row by row in place, with the powers of both whole signals; silent signals are not mixed in."""
    source = source.astype(np.float64)
    for main, draw in zip(source, rows, strict=True):
        if not draw:
            continue
        other = draw["clip"].astype(np.float64) if "clip" in draw else source[draw["partner"]].copy()
        main_power, other_power = np.mean(main**2), np.mean(other**2)
        scale = 0.0 if other_power == 0 else np.sqrt(main_power / (other_power * 10 ** (draw["snr"] / 10)))
        length = min(draw["length"], len(other))
        main[draw["at"] : draw["at"] + length] += scale * other[draw["begin"] : draw["begin"] + length]
    return source


@pytest.mark.parametrize("noise_share", [0.0, 0.5, 1.0])
def test_mixtures_equal_those_of_the_released_code(
    noise_share: float, monkeypatch: pytest.MonkeyPatch, parity: Parity
) -> None:
    """The cases include a row mixed with itself, with an already mixed row, and with a silent row."""
    objective, seen = make("wavlm", mix_prob=0.8, noise_share=noise_share).objective, set()
    for step in range(40):
        given, found_BT, rows = mixed(monkeypatch, objective, step)
        expected_BT = torch.from_numpy(released(given.wave_BT.numpy(), rows))
        error = float((found_BT - expected_BT).abs().max() / expected_BT.abs().max())
        parity("WavLM mixtures against the released code (share of the largest sample)", 1e-5, error)
        seen |= {np.sign(draw["partner"] - row) for row, draw in enumerate(rows) if "partner" in draw}
    assert seen == ({-1, 0, 1} if noise_share < 1 else set())


def test_draws_have_the_released_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("wavlm", mix_prob=0.5, noise_share=0.4).objective
    drawn = [mixed(monkeypatch, objective, step)[2] for step in range(400)]
    rows = [(row, draw) for step in drawn for row, draw in enumerate(step)]
    mixtures = [(row, draw) for row, draw in rows if draw]
    speech = [(row, draw) for row, draw in mixtures if "partner" in draw]
    noise = [draw for _, draw in mixtures if "clip" in draw]
    assert len(mixtures) / len(rows) == pytest.approx(0.5, abs=0.05)
    assert len(noise) / len(mixtures) == pytest.approx(0.4, abs=0.08)
    assert np.mean([draw["partner"] == row for row, draw in speech]) == pytest.approx(1 / B, abs=0.08)
    lengths = [draw["length"] for _, draw in mixtures]
    assert 0 <= min(lengths) < 10
    assert T // 2 - 10 < max(lengths) <= T // 2
    assert np.mean(lengths) == pytest.approx(T / 4, rel=0.1)
    for snrs, low, high in (([d["snr"] for _, d in speech], -5, 5), ([d["snr"] for d in noise], -5, 20)):
        assert low <= min(snrs) < low + 1
        assert high - 1 < max(snrs) <= high
        assert np.mean(snrs) == pytest.approx((low + high) / 2, abs=1.5)
