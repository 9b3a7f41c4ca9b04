"""Training that anticipates INT8: equal to plain training while off, a NumPy twin of the rounding, exact resumes."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.core.schema import ConfigError
from pretrain.compression.quantization import quantize
from pretrain.engines.base import Engine
from pretrain.nn.fake_int8 import FakeInt8Linear, add_fake_int8, round_to_int8
from tests.support.training import config, run

ENGINE = {"name": "torch"}


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors()}


def layer(outputs: int = 5, inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    add_fake_int8(model)
    return model


def rounded_inputs(x_ND: np.ndarray) -> np.ndarray:
    """NumPy's twin: asymmetric 8-bit integers, a range per row that holds 0."""
    low_N, high_N = np.minimum(x_ND.min(1), 0)[:, None], np.maximum(x_ND.max(1), 0)[:, None]
    scale = (high_N - low_N) / np.float32(255)
    zero = np.clip(-128 - np.rint(low_N / scale), -128, 127)
    return (np.clip(np.rint(x_ND * (1 / scale)) + zero, -128, 127) - zero) * scale


def rounded_weights(weight_OI: np.ndarray) -> np.ndarray:
    """NumPy's twin: symmetric 8-bit integers with a scale per output channel."""
    scale = np.abs(weight_OI).max(1, keepdims=True) / np.float32(127.5)
    return np.clip(np.rint(weight_OI * (1 / scale)), -128, 127) * scale


def test_rounding_equals_numpy_and_its_gradient_is_that_of_the_identity() -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    model = layer()
    weight, bias = (parameter.detach().numpy() for parameter in model.parameters())
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    exact = model(x)
    round_to_int8(model, on=True)
    found = model(x)
    inputs = rounded_inputs(x.reshape(3, -1).numpy()).reshape(x.shape)
    np.testing.assert_allclose(found.detach().numpy(), inputs @ rounded_weights(weight).T + bias, rtol=0, atol=2e-6)
    assert not torch.equal(found, exact)
    found.sum().backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    inside = np.abs(weight) < np.abs(weight).max(1, keepdims=True)
    expected = np.broadcast_to(inputs.sum((0, 1)), weight.shape)
    np.testing.assert_allclose(gradient.numpy()[inside], expected[inside], rtol=1e-4, atol=1e-4)
    round_to_int8(model, on=False)
    assert torch.equal(model(x), exact)


def test_names_of_weights_stay_and_other_layers_too() -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    before = dict(model.named_parameters())
    add_fake_int8(model)
    assert {name: id(weight) for name, weight in model.named_parameters()} == {n: id(w) for n, w in before.items()}
    assert isinstance(model[0], FakeInt8Linear)
    assert list(model.state_dict()) == list(before)


def test_the_updates_before_it_starts_equal_plain_training_and_a_resume_is_exact(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    settings = config(6, engine={**ENGINE, "fake_int8": 0.5})
    _, plain = run(tmp_path / "plain", config(6), stop_after=3)
    _, before = run(tmp_path / "whole", settings, stop_after=3)
    assert all(torch.equal(tensor, tensors(before)[name]) for name, tensor in plain.tensors())
    _, resumed = run(tmp_path / "whole", settings)
    _, whole = run(tmp_path / "once", settings)
    assert all(torch.equal(tensor, tensors(resumed)[name]) for name, tensor in whole.tensors())
    _, plain = run(tmp_path / "plain", config(6))
    assert not all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in plain.tensors())


def test_training_with_it_lowers_the_error_of_the_int8_graph(tmp_path: Path) -> None:
    """A made case: inputs with one large channel, whose range leaves few steps for the others."""
    pytest.importorskip("torchao", reason="needs the extra int8")
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from tests.unit.pretrain.compression.test_quantization import product

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, 16, generator=generator)
    target = x @ torch.randn(16, 4, generator=generator) * 0.1
    errors = {}
    for on in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
        with torch.no_grad():
            model[0].weight[0] *= 60.0
        add_fake_int8(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(900):
            round_to_int8(model, on and step >= 450)
            loss = (model(x[None]) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        round_to_int8(model, on=False)
        given = x.detach()
        for number, linear in enumerate(model):
            assert isinstance(linear, nn.Linear)
            weight, bias = linear.weight.detach().T.contiguous().numpy(), linear.bias.detach().numpy()
            onnx.save(product(weight, bias), tmp_path / f"{number}.onnx")
            quantize(tmp_path / f"{number}.onnx", tmp_path / f"{number}_int8.onnx", ["product"], "dynamic", [], False)
            session = ort.InferenceSession(str(tmp_path / f"{number}_int8.onnx"))
            given = torch.from_numpy(session.run(None, {"wave": given.numpy()})[0])
        errors[on] = float((given - target).square().mean())
    assert errors[True] < 0.7 * errors[False], errors


def test_it_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "deepspeed", "zero_stage": 3}, "ZeRO 3"),
        ({"name": "meta"}, "engine.name=meta"),
        ({"name": "federated"}, "engine.name=federated"),
        ({"name": "torch", "packed": True}, "engine.packed"),
        ({"name": "torch", "compile": True}, "engine.compile"),
    ]
    for engine, message in wrong:
        with pytest.raises(ConfigError, match=message):
            config(6, engine={**engine, "fake_int8": 0.1})
    imported = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="pip install torchao"):
        add_fake_int8(nn.Linear(2, 2))


def test_the_front_end_is_not_rounded() -> None:
    pytest.importorskip("torchao")
    model = nn.ModuleDict({"frontend": nn.Linear(2, 2), "encoder": nn.Linear(2, 2)})
    add_fake_int8(model)
    assert [type(model[name]) for name in ("frontend", "encoder")] == [nn.Linear, FakeInt8Linear]
