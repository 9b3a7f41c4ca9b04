"""Every reader of a checkpoint's weights compares checksums, names and shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.commands.replay import model_at
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.config import Config
from pretrain.engines.base import fitting
from pretrain.evaluate.frozen_encoders import open_encoder
from pretrain.interop.hf_export import load_run
from pretrain.interop.init_weights import load_initial
from pretrain.train_module import build_model
from tests.support.checkpoint_states import write_run
from tests.support.training import config

FILE = "model.safetensors"
READERS: dict[str, Callable[[Path, Config], Any]] = {
    "export": lambda run, _: load_run(run),
    "init": lambda run, settings: load_initial(config(init=str(run), engine={"name": "torch"}), build_model(settings)),
    "evaluate, finetune, targets": lambda run, _: open_encoder(str(run)),
    "a checkpoint by its own name": lambda run, _: load_checkpoint(run / "checkpoints" / "step_00000001"),
    "replay": lambda run, settings: model_at(settings, run, 1),
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "2,000 values": lambda content: content[:-8000] + bytes(8000),
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", config(), build_model(config()))
    return tmp_path / "run"


@pytest.mark.parametrize("reader", READERS)
def test_an_intact_checkpoint_is_read(reader: str, run: Path) -> None:
    READERS[reader](run, config())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_with_a_wrong_checksum_is_refused(reader: str, damage: str, run: Path) -> None:
    file = run / "checkpoints" / "step_00000001" / FILE
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=f"{FILE}: checksum mismatch"):
        READERS[reader](run, config())


def rewrite(run: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Changes tensors and updates the checksum, as a deliberate modification would."""
    folder = run / "checkpoints" / "step_00000001"
    save_file(change(load_file(folder / FILE)), folder / FILE)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][FILE] = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))


NAME = "model.encoder.blocks.0.attention.out.weight"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda all_: all_ | {NAME: all_[NAME][:, :1].clone()},
            rf"{NAME} has shape \(32, 1\), the model expects \(32, 32\)",
        ),
        (lambda all_: all_ | {NAME: torch.zeros(1)}, rf"{NAME} has shape \(1,\)"),
        (lambda all_: {name: t for name, t in all_.items() if name != NAME}, f"{NAME} is missing"),
        (lambda all_: all_ | {"model.more": torch.zeros(2)}, "model.more is not in the model"),
    ],
)
def test_weights_with_wrong_names_or_shapes_are_refused(reader: str, change: Any, words: str, run: Path) -> None:
    rewrite(run, change)
    with pytest.raises(ValueError, match=words):
        READERS[reader](run, config())


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), (), (4, 4, 1)])
def test_a_resume_never_broadcasts_tensors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"model/w has shape .*, the model expects \(4, 4\)"):
        fitting({"model/w": torch.zeros(shape)}, "model/w", torch.Size((4, 4)))
