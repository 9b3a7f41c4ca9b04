"""A recogniser in WeNet's layout: Kaldi's features, the graph in sherpa-onnx's loop, and sherpa-onnx's own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.inference.streaming_encoder import StreamedModel
from pretrain.interop.wenet_export import SKIPPED_SAMPLES, WenetStep, export_wenet, run_graph
from pretrain.nn.kaldi_mel import EARLIER, KaldiMel
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import small, speech_like
from tests.support.parity_table import Parity
from tests.support.training import STREAMING_RECOGNISER

FRONTEND = {"name": "log_mel", "normalize": "fixed", "mel": "kaldi"}
CONFORMER = small(
    "encoders", "conformer", kernel=5, causal=True, attention="chunked", chunk_frames=[4, 8], left_chunks=[2, -1]
)
ENCODERS: dict[str, dict[str, Any]] = {"transformer": STREAMING_RECOGNISER["encoder"], "conformer": CONFORMER}
SUBSAMPLING = {"transformer": 4, "conformer": 2}


def recogniser(encoder: str) -> tuple[Config, TrainModule, CTC]:
    """Returns a model whose random weights give a text of many symbols."""
    values = {"data": {"shards": "none"}, "encoder": ENCODERS[encoder], "heads": STREAMING_RECOGNISER["heads"]}
    front = FRONTEND | {"subsampling": SUBSAMPLING[encoder]}
    config = load(Config, values | {"frontend": front, "objective": {"name": "none"}})
    module = build_model(config).eval()
    head = module.heads["text"]
    assert isinstance(head, CTC)
    with torch.no_grad():
        frames = module.model(wave()[None], torch.tensor([len(wave())])).final.x_BFD[0]
        head.linear.weight.mul_(40)
        head.linear.bias.copy_(-head.linear.weight @ frames.mean(0))  # no symbol wins everywhere
    return config, module, head


def wave(seconds: float = 6.0) -> torch.Tensor:
    """Returns speech-like audio with 16-bit values, and a second of silence at its end."""
    speech_T = torch.cat([speech_like(seconds - 1, 3), torch.zeros(16_000)])
    return (speech_T * 32_768).round().clamp(-32_768, 32_767) / 32_768


def test_features_equal_torchaudios_kaldi(parity: Parity) -> None:
    from torchaudio.compliance import kaldi

    wave_1T = wave(3.0)[None]
    expected_FM = kaldi.fbank(
        32_768 * wave_1T, num_mel_bins=80, sample_frequency=16_000, low_freq=20, high_freq=-400, snip_edges=True
    )
    found_FM = KaldiMel().log_power(wave_1T)[0]
    parity("Kaldi's log-mel = torchaudio's compliance.kaldi.fbank", 1e-4, float((found_FM - expected_FM).abs().max()))
    edges = kaldi.fbank(32_768 * wave_1T, num_mel_bins=80, low_freq=20, high_freq=-400, snip_edges=False)
    shifted_FM = KaldiMel().log_power(torch.nn.functional.pad(wave_1T, (EARLIER, 0)))[0]
    torch.testing.assert_close(shifted_FM[1:200], edges[1:200], rtol=0, atol=1e-4)  # the first one is mirrored
    frames = KaldiMel(normalize="fixed")(wave_1T, torch.tensor([32_000])).x_BFD[0, :150]
    assert abs(float(frames.mean())) < 1.5
    assert 0.3 < float(frames.std()) < 2


@pytest.mark.parametrize("encoder", ["conformer", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_graph_gives_the_recognisers_stream_and_sherpa_onnx_its_text(
    encoder: str, tmp_path: Path, parity: Parity
) -> None:
    config, module, head = recogniser(encoder)
    error = export_wenet(config, module.model, tmp_path / "wenet", None, None, head)
    parity("WeNet layout in onnxruntime = the model's stream: ln p, relative", 1e-4, error)
    step = WenetStep(StreamedModel(module.model, 4, 2), head)
    found_FV = run_graph(step, tmp_path / "wenet" / "model.onnx", wave())
    _, first = step.streamed.push(step.streamed.start(), wave()[SKIPPED_SAMPLES:])
    with torch.inference_mode():
        expected_FV = head.log_probs(first)[0, : len(found_FV)]
    torch.testing.assert_close(found_FV, expected_FV, rtol=0, atol=1e-3)
    assert len(found_FV) > 4 * len(wave()) / 16_000 * step.streamed.rate_hz / 5
    text = spelled(head, found_FV)
    assert len(text) > 10, text
    assert len(set(text)) > 1, text
    sherpa = pytest.importorskip("sherpa_onnx")
    assert heard(sherpa, tmp_path / "wenet", wave()) == " ".join(text.split())


def spelled(head: CTC, log_probs_FV: torch.Tensor) -> str:
    """Returns the greedy text of ln p."""
    best = [
        key for key, last in zip(log_probs_FV.argmax(1), [-1, *log_probs_FV.argmax(1)], strict=False) if key != last
    ]
    return "".join(head.symbols[symbol - 1] for symbol in best if symbol)


def heard(sherpa: Any, folder: Path, wave_T: torch.Tensor) -> str:
    """Returns sherpa-onnx's text of a recording that is pushed in parts, with single spaces."""
    given = json.loads((folder / "wenet.json").read_text())["sherpa_onnx"]["from_wenet_ctc"]
    recogniser = sherpa.OnlineRecognizer.from_wenet_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / "model.onnx"), num_threads=1, **given
    )
    stream = recogniser.create_stream()
    for part in np.array_split(wave_T.numpy(), 7):
        stream.accept_waveform(16_000, part)
        while recogniser.is_ready(stream):
            recogniser.decode_stream(stream)
    return " ".join(str(recogniser.get_result(stream)).split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frontend": {"mel": "plain"}}, "train with frontend=log_mel frontend.mel=kaldi"),
        ({"encoder": {"widths": [[1, 64], [2, 64]]}}, "same number of heads in all blocks"),
        ({"encoder": {"left_chunks": [-1]}}, "left=-1: WeNet's states hold 1 chunk or more"),
        ({"encoder": {"attention": "full"}}, "train with encoder.attention=chunked"),
        ({"head": None}, "needs a CTC head"),
    ],
)
def test_models_that_the_layout_cannot_hold_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    front, encoder = (FRONTEND | changes.get("frontend", {}), ENCODERS["transformer"] | changes.get("encoder", {}))
    values = {"data": {"shards": "none"}, "frontend": front, "encoder": encoder, "heads": STREAMING_RECOGNISER["heads"]}
    config = load(Config, values | {"objective": {"name": "none"}})
    module = build_model(config)
    head = None if "head" in changes else module.heads["text"]
    with pytest.raises(ConfigError, match=words):
        export_wenet(config, module.model, tmp_path / "wenet", None, None, head)  # type: ignore[arg-type]
    assert not (tmp_path / "wenet").exists()
