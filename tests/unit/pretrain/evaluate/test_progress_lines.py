"""The progress of an evaluation on a terminal."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from pretrain.evaluate.frozen_encoders import FrozenEncoder, followed


@pytest.mark.parametrize("terminal", [True, False])
def test_encoded_utterances_are_counted_on_a_terminal_alone(terminal: bool) -> None:
    shown = io.StringIO()
    encoder = FrozenEncoder("mean", lambda wave_T: wave_T[None, None].mean(-1, keepdim=True), 50.0)
    with followed(encoder, 3, Console(file=shown, force_terminal=terminal, width=80)) as counted:
        layers_LFD = [counted.encode(torch.full((8,), float(value))) for value in range(3)]
    assert [float(layers) for layers in layers_LFD] == [0.0, 1.0, 2.0]
    assert (counted.name, counted.rate_hz) == ("mean", 50.0)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert ("3/3" in said) == terminal
    assert bool(said) == terminal
