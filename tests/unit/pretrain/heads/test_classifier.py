"""The head classifier: margin loss against the published formula by angles, pooling against NumPy, bad classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config as RunConfig
from pretrain.heads.classifier import Config, statistics_pooling, with_margin
from pretrain.interfaces.frames import Frames, StepContext
from pretrain.monitoring.config_pages import differences
from tests.support.contract_cases import batch, make


def test_the_margin_is_added_to_the_angle_of_the_target() -> None:
    angles = torch.linspace(0.05, 3.05, 40, dtype=torch.float64)
    cosines = torch.stack([angles.cos(), angles.cos().flip(0)], dim=1).requires_grad_()
    moved = with_margin(cosines, torch.zeros(40, dtype=torch.int64), 0.2)
    expected = np.where(
        angles.numpy() < math.pi - 0.2, np.cos(angles.numpy() + 0.2), np.cos(angles.numpy()) - 0.2 * math.sin(0.2)
    )
    np.testing.assert_allclose(moved[:, 0].detach(), expected, rtol=0, atol=1e-9)
    assert torch.equal(moved[:, 1], cosines[:, 1])
    (slope,) = torch.autograd.grad(moved[:, 0].sum(), cosines)
    assert bool((slope[:, 0] > 0).all())
    edge = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    with_margin(edge, torch.zeros(2, dtype=torch.int64), 0.2).sum().backward()
    assert edge.grad is not None
    assert bool(edge.grad.isfinite().all())


def test_pooling_is_mean_and_deviation_over_valid_frames() -> None:
    x_BFD = torch.randn(3, 7, 4)
    found = statistics_pooling(Frames(x_BFD, torch.tensor([7, 3, 0]), 25.0)).numpy()
    for row, length in enumerate((7, 3)):
        valid = x_BFD[row, :length].numpy()
        np.testing.assert_allclose(found[row], np.concatenate([valid.mean(0), valid.std(0)]), rtol=1e-4, atol=1e-5)
    assert np.isfinite(found).all()


def test_classes_are_listed_or_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "speakers.txt"
    file.write_text("ann\nbob \n\nzoe\n")
    assert Config(classes_file=str(file)).all_classes() == ("ann", "bob", "zoe")
    assert Config(classes=("a", "b")).all_classes() == ("a", "b")


@pytest.mark.parametrize(("classes", "reason"), [(("a", "a"), "once"), (("a",), "at least 2")])
def test_classes_that_cannot_be_used_are_refused(classes: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=reason):
        Config(classes=classes)
    (tmp_path / "classes").write_text("\n".join(classes))
    with pytest.raises(ValidationError, match=reason):
        Config(classes_file=str(tmp_path / "classes")).all_classes()


def test_a_checkpoint_of_other_classes_is_refused() -> None:
    first, second = (
        make("none", heads={"who": {"name": "classifier", "classes": classes}}) for classes in (["a", "b"], ["b", "a"])
    )
    second.load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="in their order"):
        second.prepare(batch(), StepContext(0, 0))


def test_a_missing_file_of_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Config(classes_file=str(tmp_path / "none.txt")).all_classes()
    with pytest.raises(ConfigError, match="list them"):
        Config().all_classes()
    with pytest.raises(ValidationError, match="not in both"):
        Config(classes=("a", "b"), classes_file="none.txt")


def test_a_run_shows_how_its_classifier_differs_from_the_defaults() -> None:
    values = {
        "data": {"shards": "none"},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer"},
        "objective": {"name": "none"},
        "heads": {"who": {"name": "classifier", "classes": ["a", "b"]}},
    }
    changed = {path for path, _, _ in differences(load(RunConfig, values))}
    assert any(path.startswith("heads.who.classes") for path in changed)
