"""Runs that learn few weights: the base travels once, and a round is still the local engine's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.engines.plain_torch import TorchEngine
from pretrain.federated import base_weights
from pretrain.federated.base_weights import BaseDigest, digest, split
from pretrain.federated.device import DeviceEngine
from pretrain.federated.estimate import exchange
from pretrain.federated.messages import RoundRequest
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import build_model
from tests.support.federation import WORLD, server, settings, synthetic_devices
from tests.support.synthetic_reader import synthetic_batch

LORA = {"name": "lora", "rank": 2, "alpha": 4.0}


def values(engine: TorchEngine) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy().copy() for name, tensor in engine.tensors()}


@pytest.mark.parametrize("tune", [{"name": "prompt", "prompts": 4}, LORA], ids=["prompt", "lora"])
def test_small_weights_alone_travel_after_the_first_round(tune: dict[str, Any]) -> None:
    config = settings({"per_round": 2}, tune=tune, optimizer={"lr": 1e-2, "eps": 1e-4})
    federated = server(config, synthetic_devices(config, 2))
    local = TorchEngine(build_model(config), config.engine, config.optimizer, WORLD)
    before, sent = values(federated), []
    for step in range(3):
        ctx = StepContext(config.seed, step)
        sent.append(federated.step([], ctx, 1e-2).metrics["federated/bytes_sent"][0][0] / 2)
        local.step([synthetic_batch(step, j) for j in range(4)], ctx, 1e-2)
    found, expected = values(federated), values(local)
    assert max(float(np.abs(found[name] - expected[name]).max(initial=0.0)) for name in expected) < 1e-6
    learned = {f"model/{name}" for name, parameter in federated.module.named_parameters() if parameter.requires_grad}
    moved = {name for name in before if name.startswith("model/") and not np.array_equal(before[name], found[name])}
    assert moved
    assert moved <= learned
    one = exchange(config)
    names = 20_000
    assert 0 <= sent[0] - one.sent - one.once < names
    assert all(0 <= each - one.sent < names for each in sent[1:])
    assert one.once > one.sent


def test_weights_that_do_not_learn_are_read_once_for_their_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counted(tensors: Mapping[str, torch.Tensor]) -> str:
        reads.append(digest(tensors))
        return reads[-1]

    monkeypatch.setattr(base_weights, "digest", counted)
    config = settings({"per_round": 2}, tune=LORA)
    engine = server(config, synthetic_devices(config, 2))
    for step in range(3):
        engine.step([], StepContext(config.seed, step), 1e-3)
    assert len(reads) == 1
    engine.load_tensors(dict(engine.tensors()), 3)
    engine.step([], StepContext(config.seed, 3), 1e-3)
    assert reads == [reads[0]] * 2


def test_a_base_that_changed_has_another_digest() -> None:
    seen, weights = BaseDigest(), {"a": torch.ones(3), "b": torch.ones(2)}
    first = seen.of({name: tensor.detach() for name, tensor in weights.items()})
    assert first == seen.of({name: tensor.detach() for name, tensor in weights.items()}) == digest(weights)
    weights["b"].lerp_(torch.zeros(2), 0.5)  # as a teacher
    second = seen.of({name: tensor.detach() for name, tensor in weights.items()})
    assert first != second == digest(weights)
    weights["b"].data.copy_(torch.zeros(2))  # as a checkpoint
    seen.forget()
    assert second != seen.of(weights) == digest(weights)


def test_a_device_that_started_again_gets_the_base_again() -> None:
    config = settings({"per_round": 2}, tune=LORA)
    fresh = iter(range(100))

    def restarted(message: bytes) -> list[bytes]:
        """Answers as a device without the base to the first request of the second round."""
        return [lacks(config, message) if next(fresh) == 1 else message]

    again = server(config, synthetic_devices(config, 2, {"d1": restarted}))
    once = server(config, synthetic_devices(config, 2))
    for step in range(2):
        ctx = StepContext(config.seed, step)
        found, expected = again.step([], ctx, 1e-3).metrics, once.step([], ctx, 1e-3).metrics
    mine, theirs = values(again), values(once)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert found["federated/devices"][0] == 2
    assert found["federated/left_out"][0] == 0
    assert found["federated/bytes_sent"][0][0] > expected["federated/bytes_sent"][0][0] + exchange(config).once


def lacks(config: Any, message: bytes) -> bytes:
    """Returns a fresh device's answer to a request without the base, for the round that `message` answers."""
    from pretrain.federated.messages import decode

    fields = decode(message)[1]
    request = RoundRequest(
        run=fields["run"],
        kind="gradient",
        step=int(fields["step"]),
        attempt=int(fields["attempt"]),
        seed=0,
        tensors={"model/x": torch.zeros(1)},
        base="another",
    )
    engine = DeviceEngine(build_model(config), config.engine, config.optimizer, WORLD)
    return engine.answer(request.encoded(), fields["device"], None)  # type: ignore[arg-type]


def test_the_digest_is_of_names_types_shapes_and_values() -> None:
    learned, rest = split({"a": torch.ones(2), "b": torch.tensor(3)}, {"a"})
    assert (list(learned), list(rest)) == (["model/a"], ["model/b"])
    others = [
        {"model/c": torch.tensor(3)},
        {"model/b": torch.tensor(4)},
        {"model/b": torch.tensor([3])},
        {"model/b": torch.tensor(3.0)},
    ]
    assert digest(rest) == digest({"model/b": torch.tensor(3)})
    assert len({digest(rest), *map(digest, others)}) == 5
