"""Streams of exported ONNX graphs equal the model's, and the program beside them writes their text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.inference.ctc_decoding import greedy
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.interop.stream_export import export_stream
from pretrain.recognition.recogniser import open_recogniser
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import small, speech_like
from tests.support.parity_table import Parity
from tests.support.paths import ROOT
from tests.support.training import STREAMING_RECOGNISER, save

pytest.importorskip("onnxscript")
CLIENT = ROOT / "docs" / "onnx_stream_client.py"
LOG_MEL = {"name": "log_mel", "n_mels": 20, "normalize": "fixed"}
CHUNKED = {"attention": "chunked", "chunk_frames": [0, 4], "left_chunks": [-1, 2]}
CAUSAL = small("encoders", "conformer", causal=True, kernel=5, **CHUNKED)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "log_mel, conformer": (LOG_MEL, CAUSAL),
    "multiscale, transformer": (
        {"name": "multiscale", "n_mels": 20, "wave_channels": 8, "normalize": "fixed"},
        small("encoders", "transformer", positions="rope", norm="pre", **CHUNKED),
    ),
    "waveform, chunk convolution": (
        {"name": "waveform_conv", "channels": 16, "norm": "layer"},
        small("encoders", "conformer", chunk_convolution=True, kernel=9, **CHUNKED),
    ),
    "half rate": (
        LOG_MEL,
        small("encoders", "transformer", positions="rope", layers=3, half_rate_blocks=1, **CHUNKED),
    ),
}


def built(frontend: dict[str, Any], encoder: dict[str, Any]) -> tuple[Config, TrainModule]:
    values = {
        "data": {"shards": "none", "labels": ["text"]},
        "objective": small("objectives", "best_rq"),
        "frontend": frontend,
        "encoder": encoder,
        "heads": {"text": {"name": "ctc"}},
    }
    config = load(Config, values)
    return config, build_model(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_one_chunk_equals_the_model(case: str, tmp_path: Path, parity: Parity) -> None:
    config, module = built(*CASES[case])
    head = module.heads["text"]
    assert isinstance(head, CTC)
    error = export_stream(config, module.model, tmp_path / "out", head=head)
    parity("ONNX streams: features, as a share of the largest", 1e-4, error)
    described = json.loads((tmp_path / "out" / "stream.json").read_bytes())
    assert (described["chunk_frames"], described["left_chunks"]) == (4, 2)


def test_the_program_writes_the_text_of_the_stream(tmp_path: Path) -> None:
    """It runs in a process without this project, with the graph of the command."""
    save(tmp_path / "run", 4, **STREAMING_RECOGNISER)
    checkpoint = str(find_checkpoint(str(tmp_path / "run")))
    given = ["export", checkpoint, str(tmp_path / "out"), "--to", "onnx_stream", "--chunk", "4"]
    assert main(given) == ExitCode.DONE
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"stream.onnx", "stream.json", "run.py", "README.md"}
    wave_T = (speech_like(1.7, 3) * 20_000).round().clamp(-32_768, 32_767) / 32_768
    pcm = (wave_T.numpy() * 32_768).astype("<i2").tobytes()
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(pcm)
    recogniser = open_recogniser(str(tmp_path / "run"))
    streamed = StreamedModel(recogniser.model, 4, 2)
    state, first = streamed.push(streamed.start(), wave_T)
    _, last = streamed.finish(state)
    with torch.no_grad():
        log_probs_FV = np.concatenate([recogniser.head.log_probs(part)[0].numpy() for part in (first, last)])
    expected = "".join(recogniser.head.symbols[symbol] for symbol in greedy(log_probs_FV))
    assert len(expected) > 3
    program = str(tmp_path / "out" / "run.py")
    for options, content in (([str(tmp_path / "speech.wav")], b""), (["--stdin"], pcm)):
        command = [sys.executable, program, *options]
        done = subprocess.run(command, input=content, capture_output=True, timeout=60, check=True)
        assert json.loads(done.stdout.splitlines()[-1])["text"] == expected
    command = [sys.executable, "-I", str(CLIENT), str(tmp_path / "out")]
    done = subprocess.run(command, input=pcm + b"x", capture_output=True, timeout=60, check=True)
    assert done.stdout.decode() == expected


def test_the_client_in_the_documentation_has_60_lines() -> None:
    source = CLIENT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    imported = {match[1] for match in re.finditer(r"^(?:import|from) (\w+)", source, re.MULTILINE)}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_an_unlimited_left_context_is_refused(tmp_path: Path) -> None:
    config, module = built(LOG_MEL, CAUSAL | {"left_chunks": [-1]})
    with pytest.raises(ConfigError, match="left=-1: a graph's states have a fixed size"):
        export_stream(config, module.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_stream_is_refused(tmp_path: Path) -> None:
    config, module = built({"name": "log_mel"}, CAUSAL)
    with pytest.raises(ConfigError, match=r"frontend\.normalize=utterance"):
        export_stream(config, module.model, tmp_path / "out")
