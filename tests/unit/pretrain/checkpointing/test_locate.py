"""Reading of checkpoints/latest and state.json: malformed files are refused with file and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpointing.locate import find_checkpoint, latest_checkpoint, steps_done
from pretrain.checkpointing.stored import damage, read_state
from tests.support.checkpoint_states import state

STATE = state(4, cursor={"plan_hash": "x", "epoch": 0, "step": 4})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Makes a run folder with two checkpoints."""
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(STATE))
    return tmp_path / "run"


def test_the_newest_checkpoint_is_found(run: Path) -> None:
    assert latest_checkpoint(run / "checkpoints") is None
    assert steps_done(run) == 0
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step_00000004"
    assert steps_done(run) == 4
    for given in (run, run / "checkpoints", run / "checkpoints" / "step_00000004"):
        assert find_checkpoint(str(given)).name == "step_00000004"


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"", b"../..", b"/etc", b"step_x", b"step_1/../../..", b"step_" + b"9" * 5000, "step_٣".encode()],
)
def test_an_invalid_latest_pointer_is_refused(run: Path, content: bytes) -> None:
    """It raises no UnicodeDecodeError and cannot lead outside the run folder."""
    (run / "checkpoints" / "latest").write_bytes(content)
    for ask in (steps_done, lambda folder: find_checkpoint(str(folder))):
        with pytest.raises(ValueError, match="latest") as refused:
            ask(run)
        assert "step_00000002, step_00000004" in str(refused.value)


def test_a_pointer_to_a_missing_checkpoint_is_refused(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(ValueError, match=r"step_00000009.*step_00000002, step_00000004"):
        find_checkpoint(str(run))


def test_a_misspelt_run_is_refused_with_the_nearest_name(run: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean .*run"):
        find_checkpoint(str(run.with_name("rum")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "4"),
        ("step", -1),
        ("step", True),
        ("cursor", []),
        ("cursor", {"plan_hash": 3, "epoch": 0, "step": 0}),
        ("config", None),
        ("sha256", {}),
        ("sha256", None),
        ("health", [1]),
        ("loss_scale", 3),
        ("prolonged", {"step": 1}),
    ],
)
def test_a_state_with_an_invalid_field_is_refused(run: Path, field: str, value: object) -> None:
    folder = run / "checkpoints" / "step_00000004"
    (folder / "state.json").write_text(json.dumps(STATE | {field: value}))
    with pytest.raises(ValueError) as refused:
        read_state(folder)
    assert f"state.json: {field} must be" in str(refused.value)
    assert field in damage(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"format": 9}', b"[" * 100_000, b"3", b"null"])
def test_a_malformed_state_file_is_refused(run: Path, content: bytes) -> None:
    folder = run / "checkpoints" / "step_00000004"
    (folder / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match="step_00000004"):
        read_state(folder)
