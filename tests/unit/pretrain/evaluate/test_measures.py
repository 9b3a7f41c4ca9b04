"""Verification, ranking, texts from features, and the network on log-mel, on data with known results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import metrics, retrieval, text_probe, verification
from pretrain.evaluate.config import NeuralConfig, ProbeConfig, TextProbeConfig
from pretrain.evaluate.features import Labelled, Waves
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Utterance
from pretrain.evaluate.neural_probe import fit_neural

RNG = np.random.default_rng(0)


class Given(Waves):
    """Audio by name of the utterance."""

    def __init__(self, waves: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.waves = waves

    def __call__(self, utterance: Utterance) -> torch.Tensor:
        return self.waves[utterance.name]


def voices(informed: float, speakers: int = 6, takes: int = 4) -> tuple[list[Utterance], Given, FrozenEncoder]:
    """Makes utterances whose second layer separates speakers, and whose first is noise."""
    utterances = [
        Utterance("", f"{s}-{t}", f"s{s}", file=f"{s}/{t}.wav") for s in range(speakers) for t in range(takes)
    ]
    centres = RNG.normal(0, 1, (speakers, 16))
    waves = {}
    for u in utterances:
        waves[u.name] = torch.from_numpy(informed * centres[int(u.speaker[1:])] + RNG.normal(0, 1, 16)).float()

    def encode(wave_T: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.from_numpy(RNG.normal(0, 1, (1, 16))).float(), wave_T[None]])

    return utterances, Given(waves), FrozenEncoder("known", encode, 50.0)


def test_weights_of_1_give_the_equal_error_rate_and_repeated_pairs_count() -> None:
    scores, same = RNG.normal(0, 1, 500), RNG.random(500) < 0.3
    scores[same] += 1.0
    plain = metrics.equal_error_rate(scores, same)
    assert metrics.equal_error_rate(scores, same, np.ones(500)) == pytest.approx(plain)
    weights = RNG.integers(0, 4, 500)
    repeated = np.repeat(np.arange(500), weights)
    assert metrics.equal_error_rate(scores, same, weights.astype(float)) == pytest.approx(
        metrics.equal_error_rate(scores[repeated], same[repeated]), abs=0.01
    )


def test_verification_chooses_the_layer_on_other_speakers() -> None:
    utterances, waves, encoder = voices(5.0)
    valid, test = utterances[:12], utterances[12:]
    rate = verification.verification(encoder, valid, test, waves, times=50)
    assert rate.value < 0.1
    assert rate.low <= rate.value <= rate.high
    utterances, waves, encoder = voices(0.0, speakers=12)
    assert verification.verification(encoder, utterances[:24], utterances[24:], waves).value == pytest.approx(
        0.5, abs=0.2
    )
    with pytest.raises(ValueError, match="pairs of the same speaker"):
        verification.verification(encoder, utterances[:8], utterances[8:10], waves)


def test_the_sample_that_chooses_a_layer_has_many_pairs_of_both_kinds() -> None:
    """With the numbers of VoxCeleb1, recordings at equal distances have no pair of one speaker."""
    everyone = [Utterance("", f"{s}/{t}", f"s{s}") for s in range(1_211) for t in range(122)]
    some = verification.sampled(everyone)
    same_P = verification.all_pairs(some).same_P
    assert 190 <= len(some) <= 210
    assert same_P.sum() >= 300
    assert (~same_P).sum() >= 300
    assert [u.name for u in verification.sampled(everyone[::-1])] == [u.name for u in some]
    singles = [Utterance("", f"alone{s}", f"alone{s}") for s in range(1_000)]
    assert verification.sampled(everyone[: 122 * 50] + singles) == verification.sampled(everyone[: 122 * 50])
    few = verification.sampled(everyone[: 122 * 4])
    assert len(few) == 200
    assert len({u.name for u in few}) == 200
    assert verification.sampled([]) == []


def test_few_validation_speakers_choose_the_layer_of_verification_with_those_of_training() -> None:
    utterances, waves, encoder = voices(5.0, speakers=12)
    train, valid, test = utterances[:24], utterances[24:28], utterances[28:]
    assert not verification.can_choose(valid)
    others = verification.for_choice(train, valid, least_speakers=5)
    assert {u.name for u in others} == {u.name for u in utterances[:28]}
    assert verification.can_choose(others)
    assert verification.verification(encoder, others, test, waves).value < 0.1
    assert verification.for_choice(train, utterances[24:44], least_speakers=5) == utterances[24:44]


def test_trials_name_recordings_by_the_end_of_their_path(tmp_path: Path) -> None:
    utterances, _, _ = voices(1.0, speakers=2, takes=2)
    (tmp_path / "trials.txt").write_text("1 0/0.wav 0/1.wav\n0 0/0.wav 1/0.wav\n0 0/0.wav 9/9.wav\n")
    used, trials, lost = verification.read_trials(tmp_path / "trials.txt", utterances)
    assert [u.file for u in used] == ["0/0.wav", "0/1.wav", "1/0.wav"]
    assert (trials.first_P.tolist(), trials.second_P.tolist()) == ([0, 0], [1, 2])
    assert (trials.same_P.tolist(), lost) == ([True, False], 1)
    for text, said in (("2 a b\n", "line 1 is not"), ("1 a b\n", "none of its 1 pairs")):
        (tmp_path / "trials.txt").write_text(text)
        with pytest.raises(ConfigError, match=said):
            verification.read_trials(tmp_path / "trials.txt", utterances)
    with pytest.raises(ConfigError, match=r"trials=.*/typo.txt: there is no such file.*leave `trials` empty"):
        verification.read_trials(tmp_path / "typo.txt", utterances)


def test_average_precision_of_known_rankings() -> None:
    assert metrics.average_precision(np.array([True, False, True, False])) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.average_precision(np.array([True, True, False])) == 1.0
    assert metrics.average_precision(np.array([False, False])) == 0.0


def test_ranking_counts_other_speakers_only() -> None:
    """Each speaker has its own offset: with own utterances among the candidates every word would rank them first."""
    words, speakers = np.tile(np.arange(4), 10), np.repeat(np.arange(5), 8)
    x_ND = 3 * np.eye(24)[words] + RNG.normal(0, 0.1, (40, 24))
    x_ND[:, 4:9] += 5 * np.eye(5)[speakers]
    noise_ND = RNG.normal(0, 1, (40, 24))
    part = Labelled(
        torch.from_numpy(np.stack([noise_ND, x_ND], 1)).half(), torch.from_numpy(words), speakers,
        tuple(f"s{i}" for i in range(5)),
    )  # fmt: skip
    assert retrieval.best_layer(part) == 1
    assert metrics.accuracy([retrieval.ranking(part, 1)]) > 0.95
    assert metrics.accuracy([retrieval.ranking(part, 0)]) < 0.5
    assert sum(count for _, count in retrieval.ranking(part, 1).values()) == 40


def test_few_validation_speakers_choose_the_layer_of_ranking_with_those_of_training() -> None:
    words = torch.arange(4).repeat(6)
    x_NLD = torch.from_numpy(RNG.normal(0, 1, (24, 2, 8))).float()
    x_NLD[:, 1, :4] += 9 * torch.eye(4)[words]
    train = Labelled(x_NLD[:20], words[:20], np.repeat(np.arange(5), 4), tuple("abcde"))
    valid = Labelled(x_NLD[20:], words[20:], np.zeros(4, int), ("f",))
    assert retrieval.best_layer(valid) is None  # no utterance of another speaker
    both = retrieval.for_choice(train, valid, ProbeConfig())
    assert len(both.y_N) == 24
    assert retrieval.best_layer(both) == 1
    assert retrieval.for_choice(valid, train, ProbeConfig()) is train


def spoken(text: str, speaker: str, informed: bool) -> text_probe.UtteranceFeatures:
    """Frames whose second layer shows the symbol, three frames each, with a pause after it."""
    at = [symbol for letter in text for symbol in [" abc".index(letter) + 1] * 3 + [0]]
    x_LFD = RNG.normal(0, 0.3, (2, len(at), 8))
    if informed:
        x_LFD[1, np.arange(len(at)), at] += 3
    return text_probe.UtteranceFeatures(torch.from_numpy(x_LFD).half(), text, speaker)


@pytest.mark.parametrize("informed", [True, False])
def test_texts_are_read_from_features_that_show_them(informed: bool) -> None:
    texts = ["".join(RNG.choice(list("abc"), 4)) + " " + "".join(RNG.choice(list("abc"), 3)) for _ in range(24)]
    made = [spoken(text, f"s{number % 3}", informed) for number, text in enumerate(texts)]
    probe = text_probe.fit_text(made[:16], made[16:20], TextProbeConfig(epochs=30, lr=0.02, batch=4), seed=0)
    wrong = metrics.accuracy([text_probe.counted(probe, made[20:], by_words=True)])
    assert (wrong < 0.2) if informed else (wrong > 0.8)


def test_the_network_learns_what_a_linear_probe_cannot() -> None:
    x_ND = RNG.normal(0, 1, (900, 6))
    y_N = torch.from_numpy((x_ND[:, 0] * x_ND[:, 1] > 0).astype(int))
    parts = [
        Labelled(torch.from_numpy(x_ND[at : at + 300])[:, None].half(), y_N[at : at + 300], np.zeros(300, int), ("a",))
        for at in (0, 300, 600)
    ]
    config = NeuralConfig(epochs=40, patience=8, lr=3e-3, batch=64)
    net = fit_neural(parts[0], parts[1], 2, 3_000, config, seed=0)
    assert (net.predict(parts[2].x_NLD[:, 0]) == parts[2].y_N.numpy()).mean() > 0.85
