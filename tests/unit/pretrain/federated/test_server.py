"""A round of any devices is the update of the plain engine on the same audio; other rules equal a twin in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.engines.plain_torch import TorchEngine
from pretrain.federated.server import FederatedEngine, TooFewDevicesError
from pretrain.interfaces.frames import StepContext
from pretrain.nn.dropout import seed_dropout
from pretrain.train_module import build_model
from tests.support.federation import WORLD, Spoil, server, settings, synthetic_devices
from tests.support.parity_table import Parity
from tests.support.synthetic_reader import synthetic_batch

TEXT = {"heads": {"text": {"name": "reconstruction"}}}
HEAD_ALONE = {**TEXT, "objective": {"name": "none"}}


def tensors(engine: TorchEngine) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in engine.tensors()}


def distance(one: TorchEngine, other: TorchEngine) -> float:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return max(float(np.abs(mine[name] - theirs[name]).max(initial=0.0)) for name in mine)


@pytest.mark.parametrize(
    ("top", "count"),
    [*(({}, count) for count in (1, 2, 4)), *((TEXT, count) for count in (1, 2, 4)), (HEAD_ALONE, 2)],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value) or "objective",
)
def test_a_gradient_round_is_the_local_engines_step(count: int, top: dict[str, Any], parity: Parity) -> None:
    # AdamW divides by gradients near 0 where eps is small, and their rounding with them
    config = settings({"per_round": 4}, optimizer={"lr": 1e-3, "eps": 1e-4}, **top)
    federated = server(config, synthetic_devices(config, count))
    local = TorchEngine(build_model(config), config.engine, config.optimizer, WORLD)
    for step in range(2):
        ctx = StepContext(config.seed, step)
        found = federated.step([], ctx, 1e-3)
        expected = local.step([synthetic_batch(step, j) for j in range(4)], ctx, 1e-3)
        parity("a federated gradient round = a step of the torch engine: loss", 1e-6, abs(found.loss - expected.loss))
        for name, (total, n) in expected.metrics.items():
            assert found.metrics[name][1] == pytest.approx(n), name
            assert found.metrics[name][0] == pytest.approx(total, rel=1e-5, abs=1e-5), name
    parity(
        "a federated gradient round = a step of the torch engine: weights and moments after two",
        1e-6,
        distance(federated, local),
    )
    assert found.metrics["federated/devices"][0] == count


def local_change(config: Any, weights: dict[str, torch.Tensor], device: int, devices: int, step: int) -> Any:
    """Takes the local steps of a device with autograd and NumPy; returns the change of each weight and the targets."""
    rounds, module = config.engine.federated, build_model(config)
    module.load_state_dict(weights)
    start = {name: p.detach().double().numpy().copy() for name, p in module.named_parameters() if p.requires_grad}
    targets = 0.0
    for number in range(step * rounds.local_steps, (step + 1) * rounds.local_steps):
        ctx = StepContext(config.seed, step)
        batches = [synthetic_batch(number, j) for j in range(device, 4, devices)]
        plans = [module.prepare(batch, ctx) for batch in batches]
        counts_K = torch.stack([plan.counts_K for plan in plans]).sum(0)
        module.zero_grad()
        for batch, plan in zip(batches, plans, strict=True):
            seed_dropout(ctx, batch.micro_batch, batch.wave_BT.device)
            module(batch, plan, counts_K, ctx)[0].backward()
        targets += float(counts_K.sum())
        for name, p in module.named_parameters():
            if p.requires_grad:
                now = p.detach().double().numpy()
                pull = rounds.proximal * (now - start[name]) if rounds.rule == "fedprox" else 0.0
                p.data.copy_(torch.from_numpy(now - rounds.device_lr * (p.grad.double().numpy() + pull)))
    named = dict(module.named_parameters())
    return {name: named[name].detach().double().numpy() - start[name] for name in start}, targets


@pytest.mark.parametrize("rule", ["fedavg", "fedprox", "fedadam"])
def test_changes_of_weights_are_combined_as_by_a_twin_in_numpy(
    rule: str, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.federated.device.keyed_seed", lambda seed, *parts: seed)  # draws of the twin
    rounds = {"rule": rule, "local_steps": 2, "device_lr": 0.05, "proximal": 3.0}
    config = settings(rounds, optimizer={"lr": 1.0, "weight_decay": 0.0, "eps": 1e-2})
    federated = server(config, synthetic_devices(config, 2))
    lr, (b1, b2), eps = 0.2, config.optimizer.betas, config.optimizer.eps
    expected = {name: p.detach().double().numpy().copy() for name, p in federated.module.named_parameters()}
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in expected.items()}
    for step in range(2):
        weights = {name: tensor.clone() for name, tensor in federated.module.state_dict().items()}
        changes = [local_change(config, weights, device, 2, step) for device in range(2)]
        federated.step([], StepContext(config.seed, step), lr)
        total = sum(targets for _, targets in changes)
        for name in changes[0][0]:
            mean = sum(targets / total * change[name] for change, targets in changes)
            if rule == "fedadam":
                m, v = moments[name]
                m, v = b1 * m + (1 - b1) * mean, b2 * v + (1 - b2) * mean**2
                moments[name], t = (m, v), step + 1
                expected[name] += lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            else:
                expected[name] += lr * mean
    found = {name: p.detach().double().numpy() for name, p in federated.module.named_parameters()}
    furthest = max(float(np.abs(found[name] - expected[name]).max()) for name in expected)
    parity(f"{rule} = its formula in NumPy, two rounds of two devices: weights", 1e-5, furthest)
    moved = max(float(np.abs(found[n] - build_weights(config)[n]).max()) for n in expected)
    assert moved > 1e-3


def build_weights(config: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in build_model(config).named_parameters()}


def nan(message: bytes) -> list[bytes]:
    return [message[:-4] + b"\x00\x00\xc0\x7f"]


def huge(message: bytes) -> list[bytes]:
    return [message[:-4] + b"\x00\x00\x80\x7e"]


def earlier(message: bytes) -> list[bytes]:
    return [message.replace(b'"step":"0"', b'"step":"9"')]


def of_another_device(message: bytes) -> list[bytes]:
    return [message.replace(b'"device":"d1"', b'"device":"d0"')]


def misshapen(message: bytes) -> list[bytes]:
    return [message.replace(b'"shape":[32,32]', b'"shape":[16,64]')]


def another_metric(message: bytes) -> list[bytes]:
    return [message.replace(b'/loss/objective"', b'/lass/objective"')]


WRONG: dict[str, tuple[Spoil, str]] = {
    "silent": (lambda message: [], "no answer"),
    "not finite": (nan, "not finite"),
    "huge": (huge, "max_norm"),
    "late": (earlier, "late"),
    "of another device": (of_another_device, "device is 'd0'"),
    "another shape": (misshapen, "has shape [16, 64]"),
    "garbage": (lambda message: [b"\xff" * 100], "not a message"),
    "cut off": (lambda message: [message[:-100]], "not a message"),
    "empty": (lambda message: [b""], "not a message"),
    "too long": (lambda message: [message + b"\x00" * 2**25], "at most"),
    "another metric": (another_metric, "metrics"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_is_named_and_left_out(fault: str) -> None:
    spoil, reason = WRONG[fault]
    config = settings()
    notes: list[tuple[int, str, str]] = []
    devices = synthetic_devices(config, 4, {"d1": spoil})
    spoiled = server(config, devices, notes)
    result = spoiled.step([], StepContext(config.seed, 0), 1e-3)
    without = synthetic_devices(config, 4)
    without.names.remove("d1")
    expected = server(config, without)
    expected.step([], StepContext(config.seed, 0), 1e-3)
    assert distance(spoiled, expected) == 0.0
    assert result.metrics["federated/left_out"][0] == 1
    assert [(step, device) for step, device, _ in notes] == [(0, "d1")]
    assert reason in notes[0][2]


def test_a_second_answer_counts_for_nothing() -> None:
    config = settings()
    notes: list[tuple[int, str, str]] = []
    doubled = server(config, synthetic_devices(config, 2, {"d0": lambda message: [message, message]}), notes)
    once = server(config, synthetic_devices(config, 2))
    for engine in (doubled, once):
        engine.step([], StepContext(config.seed, 0), 1e-3)
    assert distance(doubled, once) == 0.0
    assert notes == [(0, "d0", "answered twice; its first answer counts")]


def test_a_device_that_counted_and_then_is_silent_takes_no_part() -> None:
    config = settings(**TEXT)
    answers: list[bytes] = []

    def once(message: bytes) -> list[bytes]:
        answers.append(message)
        return [message] if len(answers) == 1 else []

    silent = server(config, synthetic_devices(config, 4, {"d2": once}))
    without = synthetic_devices(config, 4)
    without.names.remove("d2")
    expected = server(config, without)
    for engine in (silent, expected):
        engine.step([], StepContext(config.seed, 0), 1e-3)
    assert distance(silent, expected) == 0.0


def test_devices_are_drawn_by_seed_and_round() -> None:
    config = settings({"per_round": 3})
    draws = []
    for _ in range(2):
        devices = synthetic_devices(config, 6)
        engine = server(config, devices)
        for step in range(4):
            engine.step([], StepContext(config.seed, step), 1e-4)
        draws.append(devices.asked)
    assert draws[0] == draws[1]
    assert all(len(names) == 3 for names in draws[0])
    assert len({tuple(names) for names in draws[0]}) > 1


def test_too_few_answers_end_the_run_with_names() -> None:
    config = settings({"min_devices": 3, "attempts": 2})
    silent: dict[str, Spoil] = {name: lambda message: [] for name in ("d0", "d1")}
    engine = server(config, synthetic_devices(config, 4, silent))
    with pytest.raises(TooFewDevicesError, match=r"min_devices=3.*2 attempts.*d0, d1, d2, d3.*answer_seconds"):
        engine.step([], StepContext(config.seed, 0), 1e-3)


def test_too_few_connected_devices_end_the_run_with_names() -> None:
    config = settings({"min_devices": 3})
    devices = synthetic_devices(config, 3)
    engine = server(config, devices)
    engine.step([], StepContext(config.seed, 0), 1e-3)
    devices.names.remove("d1")
    with pytest.raises(TooFewDevicesError, match=r"2 are connected.*\(d0, d2\).*d1"):
        engine.step([], StepContext(config.seed, 1), 1e-3)


@pytest.mark.parametrize(
    "objective",
    [{"name": "best_rq", "n_codes": 32, "projection": "pca"}, {"name": "dinosr", "n_codes": 16, "top_layers": 1}],
)
def test_objectives_that_gather_frames_are_refused(objective: dict[str, Any]) -> None:
    config = settings(objective=objective)
    engine: FederatedEngine = server(config, synthetic_devices(config, 1))
    with pytest.raises(ConfigError, match="must not leave the devices"):
        engine.step([], StepContext(config.seed, 0), 1e-3)
