"""Fixtures and audio for tests of streaming recognition; a pytest plugin, loaded by conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.recognition.recogniser import Recogniser, open_recogniser
from tests.support.contract_cases import speech_like
from tests.support.training import STREAMING_RECOGNISER, save


@pytest.fixture(scope="module")
def streaming_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that recognises streams, untrained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "streams"
    save(folder, 4, **STREAMING_RECOGNISER)
    return folder


@pytest.fixture(scope="module")
def recogniser(streaming_run: Path) -> Recogniser:
    """The recogniser of `streaming_run`."""
    return open_recogniser(str(streaming_run))


def pcm(seconds: float, seed: int) -> bytes:
    """Returns 16-bit PCM at 16 kHz that resembles speech."""
    return (speech_like(seconds, seed) * 20_000).clamp(-32_768, 32_767).numpy().astype("<i2").tobytes()
