"""The start-up check finds wrong 16-bit kernels, reroutes convolutions and refuses other wrong operations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.core.schema import ConfigError
from pretrain.nn import convolution
from pretrain.nn.convolution import ConvShape, TimeConv, override_route
from pretrain.nn.positions import ConvPositions
from pretrain.profiling import operation_check
from pretrain.profiling.operation_check import (
    Product,
    TimeConvolution,
    check_each,
    check_operations,
    operations,
    survey,
)
from tests.support.contract_cases import make

BF16 = torch.bfloat16
ODD_SHAPE = ConvShape(16, 8, 5, 1, 2)
"""A shape that the default rule for oneDNN's fault does not reroute."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clears results and routes of other tests, and sets a separate cache folder."""
    monkeypatch.setattr(operation_check, "_PROCESS", {})
    monkeypatch.setattr(convolution, "_OVERRIDES", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor], bool]) -> None:
    """Makes convolutions return rolled outputs, of the right magnitude, where `wrong(input, weight)`."""
    for name in ("conv1d", "conv2d"):
        right = getattr(F, name)

        def planted(x: Tensor, weight: Tensor, *rest: Any, right: Any = right) -> Tensor:
            out: Tensor = right(x, weight, *rest)
            return out.roll(1, dims=1) if wrong(x, weight) else out

        monkeypatch.setattr(F, name, planted)


def reduced(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu") or x.dtype == BF16


def test_a_wrong_even_kernel_is_replaced_by_a_padded_odd_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault of even 16-bit kernels with more channels than the known fault has."""
    plant(monkeypatch, lambda x, weight: reduced(x) and weight.shape[-1] % 2 == 0)
    shape, said = ConvShape(16, 8, 4, 2, 1), list[str]()
    conv = TimeConv(*shape)
    (verdict,) = check_operations(conv, "cpu", BF16, said.append)
    assert (verdict.route, verdict.right) == ("odd_kernel", True)
    assert verdict.direct > 0.5
    assert verdict.error < 0.01
    assert "kernel 4" in said[0]
    assert "odd_kernel" in said[0]
    x_BFD = torch.randn(2, 30, 16)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        found = conv(x_BFD)
    with torch.no_grad():
        expected = conv(x_BFD)
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_a_wrong_odd_kernel_runs_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, weight: reduced(x))
    (verdict,) = check_operations(TimeConv(*ODD_SHAPE), "cpu", BF16, lambda line: None)
    assert (verdict.route, verdict.right) == ("fp32", True)
    conv = TimeConv(*ODD_SHAPE)
    with torch.autocast("cpu", BF16):
        assert conv(torch.randn(1, 9, 16)).dtype == BF16


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (
            lambda out: out.roll(1, dims=-1),
            r"linear layer of 8 to 6 channels in bfloat16 on cpu differs from fp32 by 1",
        ),
        (lambda out: out * float("nan"), "differs from fp32 by inf"),
        (lambda out: out * 1.05, "by 0.05"),
    ],
)
def test_a_wrong_matrix_product_is_refused(
    planted: Callable[[Tensor], Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear layer has no alternative; the message gives the operation, its error, the limit and the remedy."""
    right = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: planted(right(x, w, b)) if reduced(x) else right(x, w, b))
    with pytest.raises(ConfigError, match=words) as raised:
        check_operations(nn.Linear(8, 6), "cpu", BF16)
    assert "set engine.precision=fp32" in str(raised.value)
    assert "allowed: 0.03" in str(raised.value)


def test_each_operation_of_a_model_is_checked_once() -> None:
    found = operations(make("best_rq", "waveform_conv", "conformer"))
    assert len(found) == len(set(found))
    kinds = {type(operation).__name__ for operation in found}
    assert kinds == {"TimeConvolution", "Product", "AttentionProduct"}
    assert operations(ConvPositions(8, 4, 2)) == [TimeConvolution(ConvShape(8, 8, 4, 1, 2, 2))]
    verdicts = check_each(found, "cpu", BF16)
    assert all(verdict.right for verdict in verdicts)


def test_fp32_needs_no_check() -> None:
    assert check_operations(nn.Linear(8, 6), "cpu", None) == []


def test_results_are_cached_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ConvShape(16, 8, 4, 2, 1)
    with monkeypatch.context() as faulty:
        plant(faulty, lambda x, weight: reduced(x) and weight.shape[-1] % 2 == 0)
        check_each([TimeConvolution(shape)], "cpu", BF16)
    file = tmp_path / "auricle" / "operations.json"
    assert file.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(operation_check, "_PROCESS", {})
    override_route("cpu", BF16, shape, None)
    monkeypatch.setattr(operation_check, "check_operation", lambda *arguments: pytest.fail("measured again"))
    (verdict,) = check_each([TimeConvolution(shape)], "cpu", BF16)
    assert verdict.route == "odd_kernel"
    assert convolution._OVERRIDES["cpu", BF16, shape] == "odd_kernel"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "\x00"])
def test_a_damaged_cache_is_measured_again(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "auricle"
    folder.mkdir(mode=0o700)
    (folder / "operations.json").write_text(content)
    (verdict,) = check_each([Product(4, 4)], "cpu", BF16)
    assert verdict.right
    assert str(Product(4, 4)) in "".join(json.loads((folder / "operations.json").read_text()))


def test_a_cache_folder_writable_by_other_users_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "auricle"
    folder.mkdir()
    folder.chmod(0o777)
    assert operation_check.cache_file() is None
    check_each([Product(4, 4)], "cpu", BF16)
    assert not list(folder.iterdir())


def test_the_cache_key_depends_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here = operation_check.device_fingerprint("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert operation_check.device_fingerprint("cpu") != here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_of_shipped_models_are_computed_correctly_on_this_machine(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation_check, "SAMPLE", operation_check.SAMPLE[3:])
    n_right, odd = survey("cpu", dtype)
    assert n_right + len(odd) == len(operation_check.SAMPLE)
    assert all(verdict.right for verdict in odd)
