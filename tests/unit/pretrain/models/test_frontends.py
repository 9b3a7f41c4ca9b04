"""Front ends: correct frame counts and rates, and no influence of padding."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import load
from pretrain import registry
from pretrain.interfaces.models import Frontend
from pretrain.models.frontends.multiscale import Multiscale
from tests.support.contract_cases import batch

CASES: dict[str, dict[str, Any]] = {
    "log_mel 50 Hz": {"name": "log_mel", "subsampling": 2},
    "log_mel 25 Hz": {"name": "log_mel", "subsampling": 4},
    "log_mel 12.5 Hz": {"name": "log_mel", "subsampling": 8, "normalize": "fixed"},
    "waveform_conv": {"name": "waveform_conv", "channels": 16, "norm": "layer", "normalize": True},
    "multiscale 25 Hz": {"name": "multiscale", "wave_channels": 16},
    "multiscale 50 Hz": {"name": "multiscale", "wave_channels": 16, "subsampling": 2},
}


def frontend(case: str) -> Frontend:
    torch.manual_seed(0)
    values = CASES[case]
    config = load(registry.config_type("frontends", values["name"]), values)
    built = registry.build_frontend(config, 24)
    return built.eval()


@pytest.mark.parametrize("case", CASES)
def test_frames(case: str) -> None:
    module = frontend(case)
    data = batch((1.31, 0.87), width=1.77)
    features = module.extract(data.wave_BT, data.lengths_B)
    frames = module.project(features)
    assert features.x_BFD.shape[2] == module.feature_dim
    assert torch.equal(features.lengths_B, module.feature_lengths(data.lengths_B))
    assert torch.equal(frames.lengths_B, module.frame_lengths(data.lengths_B))
    assert frames.x_BFD.shape[1] == int(module.frame_lengths(torch.tensor([data.wave_BT.shape[1]])))
    seconds = (1.31, 0.87)
    for row, second in enumerate(seconds):
        length = int(frames.lengths_B[row])
        assert length == pytest.approx(second * module.rate_hz, abs=2.5)
        alone = batch((second,), first_seed=row)
        single = module.project(module.extract(alone.wave_BT, alone.lengths_B)).x_BFD[0]
        torch.testing.assert_close(frames.x_BFD[row, : len(single)], single, rtol=1e-4, atol=2e-5)
        assert frames.x_BFD[row, length:].abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_features_are_computed_on_the_device_of_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every constant moves with the module: one left on the CPU would fail against tensors on "meta"."""
    monkeypatch.setattr(
        torch, "autocast", lambda *arguments, **options: contextlib.nullcontext()
    )  # "meta" has no autocast
    module = frontend(case).to("meta")
    wave_BT, lengths_B = torch.zeros(2, 20_000, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert module.project(module.extract(wave_BT, lengths_B)).x_BFD.device.type == "meta"


def test_the_branch_weights_of_the_multiscale_front_end_are_logged() -> None:
    module = frontend("multiscale 25 Hz")
    assert isinstance(module, Multiscale)
    module.project(module.extract(batch().wave_BT, batch().lengths_B))
    gates = module.watched()
    assert set(gates) == {"health/gate_mel", "health/gate_mfcc", "health/gate_wave"}
    assert float(sum(gates.values())) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_shortest_input_gives_one_frame_and_one_sample_less_gives_none(case: str, packed: bool) -> None:
    module = frontend(case)
    module.packed = packed
    shortest = module.least_samples()
    assert module.frame_lengths(torch.tensor([shortest, shortest - 1])).tolist() == [1, 0]
    for samples, expected in ((shortest, 1), (shortest - 1, 0), (1, 0)):
        frames = module.project(module.extract(torch.randn(1, samples), torch.tensor([samples])))
        assert frames.lengths_B.tolist() == [expected]
        assert frames.x_BFD.isfinite().all()
        assert frames.x_BFD[:, :expected].abs().max() > 0 if expected else not frames.x_BFD.any()
    assert all(
        int(module.frame_lengths(torch.tensor(module.least_samples(n)))) == n
        and int(module.frame_lengths(torch.tensor(module.least_samples(n) - 1))) == n - 1
        for n in (2, 3, 10)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_without_frames_do_not_change_other_rows(case: str, packed: bool) -> None:
    """The batch has a row of one second, an empty one, one of one sample, and one a sample too short for a frame."""
    module = frontend(case)
    module.packed = packed
    lengths_B = torch.tensor([16_000, 0, 1, module.least_samples() - 1])
    wave_BT = torch.zeros(4, 16_000)
    for row, samples in enumerate(lengths_B.tolist()):
        wave_BT[row, :samples] = batch((1.0,), first_seed=row).wave_BT[0, :samples]
    frames = module.project(module.extract(wave_BT, lengths_B))
    alone = module.project(module.extract(wave_BT[:1], lengths_B[:1]))
    assert frames.lengths_B.tolist()[1:] == [0, 0, 0]
    assert not frames.x_BFD[1:].any()
    torch.testing.assert_close(frames.x_BFD[0], alone.x_BFD[0], rtol=1e-4, atol=2e-5)
