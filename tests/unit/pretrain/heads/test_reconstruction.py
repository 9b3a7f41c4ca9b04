"""The reconstruction head: its targets are the log-mel frames that each encoder frame spans."""

from __future__ import annotations

import torch

from data_pipeline.core.schema import load
from pretrain.heads import reconstruction
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import ModelShape
from pretrain.interfaces.objectives import HeadPlan
from tests.support.contract_cases import batch

SHAPE = ModelShape(dim=8, n_layers=1, feature_dim=80, feature_rate_hz=100.0, rate_hz=25.0)
CTX = StepContext(seed=0, step=0)
RATIO = 4
"""Log-mel frames, 100 per second, for each of the encoder's 25."""


def head() -> reconstruction.Reconstruction:
    made = reconstruction.build(load(reconstruction.Config, {"n_mels": 20}), SHAPE)
    torch.nn.init.zeros_(made.linear.weight)
    torch.nn.init.zeros_(made.linear.bias)
    return made


def encoded(lengths: list[int]) -> EncoderOutput:
    layer_BFD = torch.zeros(len(lengths), max(lengths), SHAPE.dim)
    return EncoderOutput((layer_BFD, layer_BFD), torch.tensor(lengths), 25.0)


def test_a_prediction_of_zeros_has_the_size_of_the_log_mel_frames_as_loss() -> None:
    made, data, frames = head(), batch((1.0, 0.6)), [24, 14]
    found = made(encoded(frames), data, HeadPlan(torch.tensor(0.0), torch.tensor([True, True])), CTX)
    mel_BFM = made.mel(data.wave_BT, data.lengths_B).x_BFD
    expected = sum(mel_BFM[row, : RATIO * length].abs().sum() for row, length in enumerate(frames))
    torch.testing.assert_close(found.total, expected)
    assert int(found.count) == sum(frames) * RATIO * 20


def test_a_bias_that_equals_the_target_of_a_frame_has_no_loss_there() -> None:
    made, data = head(), batch((1.0,))
    mel_FM = made.mel(data.wave_BT, data.lengths_B).x_BFD[0]
    with torch.no_grad():
        made.linear.bias.copy_(mel_FM[3 * RATIO : 4 * RATIO].flatten())
    only_third = torch.zeros(1, 24, dtype=torch.bool)
    only_third[0, 3] = True
    found = made(encoded([24]), data, HeadPlan(torch.tensor(0.0), torch.tensor([True]), only_third), CTX)
    assert float(found.total.detach()) < 1e-4
    assert int(found.count) == RATIO * 20


def test_rows_that_do_not_count_have_no_loss() -> None:
    made, data = head(), batch((1.0, 0.6))
    one = made(encoded([24, 14]), data, HeadPlan(torch.tensor(0.0), torch.tensor([True, False])), CTX)
    mel_BFM = made.mel(data.wave_BT, data.lengths_B).x_BFD
    torch.testing.assert_close(one.total, mel_BFM[0, : RATIO * 24].abs().sum())
    assert int(one.count) == 24 * RATIO * 20
