"""Differential privacy: clipping, noise, samples, and the ledger against an independent accountant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError, dump
from pretrain.checkpointing.resume import require_same_config
from pretrain.checkpointing.stored import read_state
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.federated.privacy import Privacy, ledger
from pretrain.interfaces.engine_configs import FederatedConfig
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.tag_descriptions import description
from pretrain.train_module import build_model
from tests.support.federation import run, server, settings, synthetic_devices
from tests.support.training import config

pytest.importorskip("opacus")
Values = NDArray[np.float64]
PRIVATE = {"noise": 1.0, "devices": 367, "per_round": 16, "delta": 2.7e-4, "epsilon": 8.0, "clip": 0.5}


def privacy(**values: Any) -> Privacy:
    return Privacy(FederatedConfig(**{**PRIVATE, **values}), "secret")


def log_ratio(x: Values, noise: float, rate: float) -> Values:
    """Returns the log of the density of a round's sum with a device over that without it, clip norm 1."""
    return np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * x - 1) / (2 * noise**2))


def by_renyi_divergence(noise: float, rate: float, rounds: int, delta: float) -> float:
    """Returns ε from the divergence integrated on a grid of outcomes (conversion: arXiv 2004.00010, proposition 12)."""
    x, step = np.linspace(-30 * noise - 5, 30 * noise + 70, 20_001, retstep=True)
    log_density = -((x / noise) ** 2) / 2 - np.log(noise * np.sqrt(2 * np.pi))
    found = []
    for order in np.concatenate([np.linspace(1.05, 12, 150), np.arange(12, 64, 0.5)]):
        exponent = log_density + order * log_ratio(x, noise, rate)
        top = exponent.max()
        divergence = (top + np.log(np.exp(exponent - top).sum() * step)) / (order - 1)
        found.append(rounds * divergence + np.log1p(-1 / order) - np.log(delta * order) / (order - 1))
    return float(min(found))


def by_loss_distribution(noise: float, rate: float, rounds: int, delta: float, removed: bool) -> float:
    """Returns the least ε whose δ is at most `delta`: the privacy loss of a round, convolved `rounds` times by FFT.

    removed: whether the device is in the data whose outcomes are weighed, or only in the other data.
    """
    step, half = 1e-3, 2**15
    edges = np.linspace(-12 * noise - 1, 12 * noise + 2, 400_001)
    x, dx = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    density = np.exp(-((x / noise) ** 2) / 2) / (noise * np.sqrt(2 * np.pi))
    loss = log_ratio(x, noise, rate)
    mass = density * np.exp(loss) * dx if removed else density * dx
    cells = np.rint((loss if removed else -loss) / step).astype(int) + half
    one = np.bincount(np.clip(cells, 0, 2 * half - 1), mass, 2 * half)
    all_rounds = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(one)) ** rounds, 2 * half))
    values = (np.arange(2 * half) - half) * step
    low, high = 0.0, step * half / 2
    while high - low > 1e-4:
        middle = (low + high) / 2
        over = values > middle
        spent = -(all_rounds[over] * np.expm1(middle - values[over])).sum()
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


CASES = [(1.0, 16, 367, 100, 2.7e-4), (0.6, 8, 1000, 50, 1e-5), (1.0, 8, 1000, 300, 1e-4)]
"""Noise, per round, devices, rounds, δ."""


@pytest.mark.parametrize("case", CASES)
def test_the_ledger_is_that_of_independent_accountants(case: tuple[float, int, int, int, float]) -> None:
    noise, per_round, devices, rounds, delta = case
    values = {"noise": noise, "per_round": per_round, "devices": devices, "delta": delta}
    made, tight = privacy(**values), privacy(**values, accountant="prv")
    spent = made.with_rounds(made.with_rounds((), rounds // 2), rounds - rounds // 2)
    assert spent == ((noise, per_round / devices, rounds),)
    expected = by_renyi_divergence(noise, per_round / devices, rounds, delta)
    assert made.epsilon(spent) == pytest.approx(expected, rel=0.01)
    least = max(by_loss_distribution(noise, per_round / devices, rounds, delta, removed) for removed in (True, False))
    # opacus adds its own bound of 0.01 of what it may be wrong by
    assert tight.epsilon(spent) - 0.01 == pytest.approx(least, rel=0.01)
    assert least <= tight.epsilon(spent) < made.epsilon(spent)


def test_clipping_noise_and_sampling_have_their_sizes() -> None:
    made = privacy()
    update = {"a": torch.full((3,), 2.0), "b": torch.full((2, 2), -1.0)}
    clipped = made.clipped(update, 1.0)
    assert sum(float(t.square().sum()) for t in clipped.values()) == pytest.approx(0.5**2)
    assert torch.equal(made.clipped({"a": torch.full((4,), 0.1)}, 1.0)["a"], torch.full((4,), 0.1))
    noise = made.noise("a", torch.Size([100_000]), 0)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert not torch.equal(noise, made.noise("a", torch.Size([100_000]), 1))
    assert not torch.equal(noise, Privacy(made.settings, "another").noise("a", torch.Size([100_000]), 0))
    names = [f"d{number}" for number in range(367)]
    sizes = [len(made.sample(names, step, 0)) for step in range(200)]
    assert np.mean(sizes) == pytest.approx(16, abs=1.0)
    assert np.std(sizes) == pytest.approx(np.sqrt(16 * (1 - 16 / 367)), rel=0.2)


def test_one_device_moves_the_sum_by_at_most_the_clip_norm() -> None:
    rounds = {
        "noise": 1e-3,
        "clip": 0.01,
        "devices": 4,
        "per_round": 4,
        "delta": 0.1,
        "epsilon": 1e9,
        "min_devices": 1,
    }
    config = settings(rounds, optimizer={"lr": 1e-3, "clip_norm": 1e9})
    gradients = []
    for count in (3, 4):
        devices = synthetic_devices(config, 4)
        devices.names = devices.names[:count]
        engine = server(config, devices)
        engine.step([], StepContext(config.seed, 0), 1e-3)
        # the first moment after one update: 1 − β1 of the gradient
        moments = ((name, tensor) for name, tensor in engine.tensors() if name.startswith("exp_avg/"))
        gradients.append({name: tensor / (1 - config.optimizer.betas[0]) for name, tensor in moments})
    moved = sum(float((gradients[1][name] - gradients[0][name]).square().sum()) for name in gradients[0]) ** 0.5
    assert moved == pytest.approx(0.01 / 4, rel=0.01)


def test_the_ledger_is_in_the_checkpoint_and_a_run_ends_before_the_budget_is_spent(tmp_path: Path) -> None:
    rounds = {"noise": 1.0, "devices": 100, "per_round": 4, "delta": 1e-3, "epsilon": 1.5, "attempts": 100}
    tiny = {"steps": 4, "checkpoint_every": 2, "media_every": 0}
    config = settings(rounds, train=tiny, health={"on_collapse": "warn"})
    engine = run(tmp_path / "run", config, synthetic_devices(config, 40))
    state = read_state(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert state["engine"] == {"privacy": [[1.0, 0.04, 4]]} == engine.memory()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    spent = [row["federated/epsilon"] for row in rows]
    assert spent == sorted(set(spent))
    assert spent[-1] == pytest.approx(Privacy(config.engine.federated, "").epsilon(((1.0, 0.04, 4),)))
    board = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("federated/epsilon")] == [
        (number, pytest.approx(value)) for number, value in enumerate(spent, 1)
    ]
    assert all(description(name) for name in rows[-1] if name.startswith("federated/"))
    longer = settings(rounds, train=tiny | {"steps": 2000}, health={"on_collapse": "warn"})
    with pytest.raises(
        ConfigError, match=r"epsilon=1\.5: 1996 further rounds.*of which 0\.\d+ are spent; set train\."
    ) as e:
        run(tmp_path / "run", longer, synthetic_devices(longer, 40))
    allowed = int(str(e.value).partition("train.steps=")[2].partition(",")[0])
    made = Privacy(longer.engine.federated, "")
    assert made.epsilon(((1.0, 0.04, allowed),)) <= 1.5 < made.epsilon(((1.0, 0.04, allowed + 1),))


@pytest.mark.parametrize("values", [{"a": 1}, [[1.0, 0.1]], [[1.0, "x", 3]], [[1.0, 0.1, -3]], [3]])
def test_a_ledger_of_another_form_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="ledger"):
        ledger(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": 3}, r"(?s)devices.*at least per_round=16"),
        ({"delta": 0.01}, r"(?s)delta.*below 1 / devices = 0\.0027"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        privacy(**values)


def test_a_resume_can_neither_drop_the_noise_nor_forget_what_is_spent() -> None:
    private = {"noise": 1.0, "devices": 5, "per_round": 3, "delta": 0.1}
    saved = dump(settings(private))
    for change in ({"noise": 0.0}, {"clip": 2.0}, {"rule": "fedavg"}):
        with pytest.raises(ConfigError, match=f"engine.federated.{next(iter(change))}"):
            require_same_config(saved, settings(private | change), Path("step_00000002"))
    require_same_config(saved, settings(private | {"answer_seconds": 5.0}), Path("step_00000002"))

    central = config(4)
    engine = make_engine(central, build_model(central), DistributedContext())
    spent = {"privacy": [[1.0, 0.6, 3]]}
    engine.remember(spent)
    assert engine.memory() == spent, "rounds after updates on central data spend the rest of the budget"
