"""Synthesiser: durations, values of tokens, controls, vocoders."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.interfaces.frames import Frames
from pretrain.models.synthesis.spectral_loss import SpectralLoss
from pretrain.models.synthesis.synthesizer import (
    LONGEST_TOKEN,
    Controls,
    Recorded,
    Synthesizer,
    SynthesizerConfig,
    frames_of,
)
from pretrain.models.synthesis.variance import filled, token_means
from pretrain.models.synthesis.vocoder import ISTFTVocoder, VocoderConfig, griffin_lim
from pretrain.nn.spectral import LogMel
from tests.support.contract_cases import speech_like

MEL = LogMel(40, normalize="fixed")
SMALL = SynthesizerConfig(
    dim=16, layers=1, decoder_layers=1, ffn_dim=32, kernel=3, predictor_dim=16, aligner_dim=16,
    vocoder=VocoderConfig(dim=16, layers=1, inner=32),
)  # fmt: skip


def test_means_of_tokens_leave_out_frames_that_do_not_count() -> None:
    values_BF = torch.tensor([[1.0, 3.0, 100.0, 5.0, 7.0, 9.0]])
    counted_BF = torch.tensor([[True, True, False, True, True, False]])
    means_BN, known_BN = token_means(values_BF, counted_BF, torch.tensor([[2, 1, 2, 0]]))
    assert means_BN.tolist() == [[2.0, 0.0, 6.0, 0.0]]
    assert known_BN.tolist() == [[True, False, True, False]]


def test_unknown_values_are_taken_from_their_neighbours() -> None:
    values_BN, known_BN = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0], [9.0] * 5]), torch.zeros(2, 5, dtype=torch.bool)
    known_BN[0, [1, 3]] = True
    assert filled(values_BN, known_BN).tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0], [0.0] * 5]


@pytest.mark.parametrize("speed", [0.5, 1.0, 1.3, 2.0])
def test_the_rate_of_speech_is_kept_by_rounding(speed: float) -> None:
    torch.manual_seed(0)
    exact_BN = torch.empty(1, 40).uniform_(5, 12)
    durations_BN = frames_of(torch.log1p(exact_BN), torch.ones(1, 40, dtype=torch.bool), speed)
    assert int(durations_BN.sum()) == pytest.approx(float(exact_BN.sum()) / speed, abs=1)


def test_durations_are_bounded_whatever_is_predicted() -> None:
    log_BN = torch.tensor([[-50.0, 0.0, 700.0, 3.0]])
    durations_BN = frames_of(log_BN, torch.tensor([[True, True, True, False]]), 1.0)
    assert durations_BN.tolist() == [[1, 1, LONGEST_TOKEN, 0]]


def spoken(controls: Controls, pitch: bool = True) -> Frames:
    torch.manual_seed(4)
    synthesizer = Synthesizer(SMALL, 9, MEL, pitch).eval()
    torch.nn.init.constant_(synthesizer.duration.out.bias, math.log(9))
    with torch.inference_mode():
        return synthesizer.speak(torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]), torch.zeros(1, 16), controls)


def test_controls_change_what_is_spoken() -> None:
    plain = spoken(Controls())
    assert int(spoken(Controls(speed=2.0)).lengths_B) == pytest.approx(int(plain.lengths_B) / 2, abs=1)
    for changed in (Controls(pitch=2.0), Controls(energy=6.0)):
        other = spoken(changed)
        assert other.x_BFD.shape == plain.x_BFD.shape
        assert not torch.equal(other.x_BFD, plain.x_BFD)


def test_a_padded_text_is_spoken_as_if_alone() -> None:
    torch.manual_seed(0)
    synthesizer = Synthesizer(SMALL, 9, MEL, True).eval()
    tokens_BN = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
    with torch.inference_mode():
        both = synthesizer.speak(tokens_BN, torch.tensor([5, 2]), torch.zeros(2, 16), Controls())
        alone = synthesizer.speak(tokens_BN[1:, :2], torch.tensor([2]), torch.zeros(1, 16), Controls())
    frames = int(alone.lengths_B)
    assert int(both.lengths_B[1]) == frames
    torch.testing.assert_close(both.x_BFD[1, :frames], alone.x_BFD[0], rtol=1e-4, atol=1e-5)


def test_training_predicts_pitch_of_tokens_with_a_voice_alone() -> None:
    torch.manual_seed(0)
    synthesizer = Synthesizer(SMALL, 9, MEL, True).eval()
    mel = Frames(torch.randn(1, 20, 40), torch.tensor([20]), 100.0)
    voiced_BF = torch.arange(20)[None] < 10
    out = synthesizer(
        torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.zeros(1, 16), Recorded(mel, torch.ones(1, 20), voiced_BF)
    )
    assert out.pitch is not None
    heard = torch.stack([part.sum() > 0 for part in voiced_BF[0].int().split(out.durations_BN[0].tolist())])
    assert out.pitch.known_BN[0].tolist() == heard.tolist()
    assert out.pitch.target_BN.tolist() == [[1.0, 1.0, 1.0]]


def test_griffin_lim_keeps_length_and_envelope() -> None:
    wave_T = speech_like(0.6, 1)
    mel = MEL(wave_T[None], torch.tensor([len(wave_T)]))
    made_T = griffin_lim(MEL, mel.x_BFD[0])
    assert len(made_T) == 160 * (int(mel.lengths_B) - 1) + 400
    again = MEL(made_T[None], torch.tensor([len(made_T)]))
    assert float((again.x_BFD - mel.x_BFD).abs().mean()) < 0.2  # in deviations of speech


def test_griffin_lim_keeps_the_loudness_of_predicted_frames() -> None:
    """Predicted frames are smooth and have errors of their own, so that no spectrum has exactly these mel powers."""
    torch.manual_seed(0)
    bands, wave_T = LogMel(80, normalize="fixed"), speech_like(0.6, 1)
    mel_FD = bands(wave_T[None], torch.tensor([len(wave_T)])).x_BFD[0]
    smooth_FD = torch.nn.functional.avg_pool1d(mel_FD[:, None], 3, 1, 1)[:, 0] + 0.2 * torch.randn_like(mel_FD)
    made_T = griffin_lim(bands, smooth_FD)
    again_FD = bands(made_T[None], torch.tensor([len(made_T)])).x_BFD[0]
    assert float((again_FD - smooth_FD).abs().mean()) < 0.35
    assert float(made_T.std() / wave_T.std()) < 1.5


def test_the_vocoder_gives_padded_rows_the_same_audio() -> None:
    torch.manual_seed(0)
    vocoder = ISTFTVocoder(VocoderConfig(dim=16, layers=1, inner=32), MEL)
    mel_BFD, lengths_B = torch.randn(2, 30, 40), torch.tensor([30, 20])
    with torch.inference_mode():
        both_BT, alone_1T = vocoder(mel_BFD, lengths_B), vocoder(mel_BFD[1:, :20], lengths_B[1:])
    assert both_BT.shape == (2, 160 * 29 + 400)
    assert alone_1T.shape == (1, 160 * 19 + 400)
    torch.testing.assert_close(both_BT[1:, : alone_1T.shape[1]], alone_1T, rtol=1e-4, atol=1e-5)


def test_the_distance_of_waveforms_ignores_what_is_beyond_the_end() -> None:
    distance, wave_T = SpectralLoss(MEL), speech_like(0.3, 2)
    lengths_B = torch.tensor([3_000, 4_800])
    wanted_BT = wave_T.repeat(2, 1)
    found_BT = wanted_BT + 0.01 * torch.randn(2, 4_800)
    whole_B = distance(found_BT, wanted_BT, lengths_B)
    assert whole_B[0] == pytest.approx(
        float(distance(found_BT[:1, :3_000], wanted_BT[:1, :3_000], lengths_B[:1])), rel=1e-5
    )
    assert float(distance(wanted_BT, wanted_BT, lengths_B).max()) < 0.05 < float(whole_B.min())
