"""Vectors of secure aggregation, and rounds in which the server sees their mean alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from pretrain.federated.messages import RoundRequest
from pretrain.federated.secure import packed, unpacked
from pretrain.federated.server import TooFewDevicesError
from pretrain.interfaces.engine_configs import FederatedConfig
from pretrain.interfaces.frames import StepContext
from tests.support.federation import Spoil, server, settings, synthetic_devices

UPDATE = {"b": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "a": torch.tensor([12.0])}
HEARD = {"data/micro_batch_samples": [torch.tensor(128_000.0), torch.tensor(2.0)]}


@pytest.mark.parametrize(("kind", "targets", "scale"), [("gradient", 2.0, 0.5), ("delta", 2.0, 1.0)])
@pytest.mark.parametrize("clip", [1.0, 100.0])
def test_a_vector_is_the_clipped_update(kind: Any, targets: float, scale: float, clip: float) -> None:
    request = RoundRequest(run="r", kind=kind, step=0, attempt=0, seed=0)
    answer = request.answer("d", torch.tensor([targets]).double(), loss=7.0, update=UPDATE, totals=HEARD)
    vector = np.frombuffer(packed(answer, clip), "<f4")
    assert np.abs(vector).max() <= 1.0
    shapes = {name: tensor.shape for name, tensor in UPDATE.items()}
    found, loss, samples = unpacked(vector.astype(np.float64).tobytes(), shapes, clip)
    factor = scale * min(1.0, clip / (13.0 * scale))
    assert loss == pytest.approx(7.0 * scale)
    assert samples == pytest.approx(128_000.0)
    for name, tensor in UPDATE.items():
        torch.testing.assert_close(found[name], tensor * factor)


def test_vectors_that_are_not_finite_or_too_short_are_refused() -> None:
    request = RoundRequest(run="r", kind="delta", step=0, attempt=0, seed=0)
    wrong = request.answer("d", torch.ones(1).double(), update={"a": torch.tensor([torch.nan])})
    with pytest.raises(ValueError, match="not finite"):
        packed(wrong, 1.0)
    with pytest.raises(ValueError, match="8 bytes, and 24 were expected"):
        unpacked(b"\0" * 8, {"a": torch.Size([1])}, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        unpacked(np.array([np.nan, 0.0, 0.0]).tobytes(), {"a": torch.Size([1])}, 1.0)


@pytest.mark.parametrize("rule", ["gradient", "fedavg"])
def test_a_round_takes_the_mean_of_those_who_answered(rule: str) -> None:
    """With equal weights and a clip norm that clips nothing, it is the round without secure aggregation."""
    equal = {"optimizer": {"lr": 1e-2, "eps": 1e-2}}
    rounds = {"rule": rule, "min_devices": 3, "per_round": 4, "clip": 1e3}
    spoil: dict[str, Spoil] = {"d3": lambda message: []}
    notes: list[tuple[int, str, str]] = []
    secure_config = settings(rounds | {"secure": True}, **equal)
    secure = server(secure_config, synthetic_devices(secure_config, 4, spoil), notes)
    config = settings(rounds, **equal)
    plain = server(config, synthetic_devices(config, 4, spoil))
    phases: list[str] = []
    secure.on_phase = phases.append
    ctx = StepContext(config.seed, 0)
    found, expected = secure.step([], ctx, 1e-2), plain.step([], ctx, 1e-2)
    assert found.metrics["federated/devices"][0] == 3
    assert found.samples == expected.samples
    assert notes == [(0, "d3", "no answer")]
    assert phases == ["devices", "devices", "sum of losses", "update"]
    assert found.loss == pytest.approx(expected.loss, rel=0.05)  # devices with a few targets more count more there
    start = dict(server(config, synthetic_devices(config, 1)).module.named_parameters())
    theirs = dict(plain.module.named_parameters())
    mine = {name: (parameter - start[name]).flatten() for name, parameter in secure.module.named_parameters()}
    both = torch.cat(list(mine.values())), torch.cat([(theirs[name] - start[name]).flatten() for name in mine])
    assert float(torch.cosine_similarity(*both, dim=0).detach()) > 0.99


def test_too_few_in_the_mean_end_the_run_and_fields_that_cannot_be_secure_are_refused() -> None:
    config = settings({"secure": True, "min_devices": 3, "per_round": 4})
    silent: dict[str, Spoil] = {name: lambda message: [] for name in ("d0", "d1")}
    with pytest.raises(TooFewDevicesError, match="min_devices=3"):
        server(config, synthetic_devices(config, 4, silent)).step([], StepContext(config.seed, 0), 1e-3)
    with pytest.raises(ConfigError, match=r"min_devices.*3 or more"):
        load(FederatedConfig, {"secure": True, "min_devices": 2})
    with pytest.raises(ConfigError, match=r"noise.*secure=true"):
        load(FederatedConfig, {"secure": True, "min_devices": 3, "noise": 1.0, "devices": 100, "delta": 1e-3})
    two = settings({"secure": True, "min_devices": 3, "per_round": 4}, heads={"text": {"name": "reconstruction"}})
    with pytest.raises(ConfigError, match=r"2 tasks .*gives the loss of one"):
        server(two, synthetic_devices(two, 4))
