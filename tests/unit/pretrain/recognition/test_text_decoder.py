"""Streams of a transducer, and attention rescoring, equal decoding of the whole recording with the same pattern."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch
from data_pipeline.text.tokenizer import write_tokens
from pretrain.heads.ctc import CTC
from pretrain.heads.transducer import Transducer
from pretrain.interfaces.decoding import EndPoints, StreamingDecoder
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.objectives import HeadPlan, LossOutput, TextHead
from pretrain.nn.attention_patterns import Pattern
from pretrain.nn.block_stack import BlockStack
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.error_rates import Decoders, recognise
from pretrain.recognition.recogniser import Recogniser, open_recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from pretrain.recognition.transcript import Transcript
from tests.support.contract_cases import speech_like
from tests.support.recognition import assert_same_words, updates_of, words_of
from tests.support.training import STREAMING_RECOGNISER, save

NEVER = EndPoints(1e9, 1e9, 1e9)
CASES = [("ctc", "rescoring"), ("rnnt", "greedy"), ("rnnt", "beam"), ("rnnt", "rescoring")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with CTC, a transducer and an attention decoder over the same three characters."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("streams")
    tokens = {"kind": "characters", "label": "text", "case": "lower", "symbols": [" ", "a", "b"]}
    write_tokens(str(folder / "tokens"), tokens)
    over = {"tokens": "text", "vocabulary": 3}
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(folder / "tokens")}}
    aed = {"name": "sequence", "memory_layers": [1, 2], "decoder": {"layers": 1, "heads": 2, "dim": 16, "ffn_dim": 32}}
    heads = {
        "ctc": {"name": "ctc"} | over,
        "rnnt": {"name": "transducer", "joint_dim": 16} | over,
        "aed": aed | over,
    }
    save(folder / "run", 4, **STREAMING_RECOGNISER | {"heads": heads, "data": data})
    return folder / "run"


@pytest.fixture(scope="module")
def recognisers(run: Path) -> dict[str, Recogniser]:
    made = {name: open_recogniser(str(run), name) for name in ("ctc", "rnnt")}
    with torch.no_grad():  # probabilities of untrained heads are nearly uniform
        head: Any = made["ctc"].head
        head.linear.bias[0] -= 1
        head = made["rnnt"].head
        head.output.weight *= 12
        head.frame.weight *= 3
    return made


def whole(recogniser: Recogniser, wave_T: torch.Tensor, decoding: DecodingConfig) -> Transcript:
    """Transcribes a recording at once, with the attention pattern of the streams."""
    encoder = recogniser.model.encoder
    assert isinstance(encoder, BlockStack)
    encoder.stream = Pattern(chunk=4, left_chunks=2)
    try:
        return recogniser.transcribe("a", [wave_T.numpy()], decoding)
    finally:
        encoder.stream = None


@pytest.mark.parametrize(("head", "decoder"), CASES)
def test_a_stream_has_the_text_of_the_whole_recording(
    recognisers: dict[str, Recogniser], head: str, decoder: Any
) -> None:
    recogniser, wave_T = recognisers[head], speech_like(3.0, 8)
    decoding = DecodingConfig(decoder=decoder, beam=3, ctc_weight=0.95)
    expected = whole(recogniser, wave_T, decoding)
    assert len(expected.words) > 2
    streams = StreamingRecogniser(recogniser, decoding, 4, 2, NEVER)
    for size in (1_000, 9_999):
        assert_same_words(words_of(updates_of(streams, wave_T, size)), expected.words)


@pytest.mark.parametrize(("head", "decoder"), CASES)
def test_segments_do_not_depend_on_the_size_of_pushes(
    recognisers: dict[str, Recogniser], head: str, decoder: Any
) -> None:
    decoding = DecodingConfig(decoder=decoder, beam=3, ctc_weight=0.95)  # the untrained decoder prefers no text
    streams = StreamingRecogniser(recognisers[head], decoding, 4, 2, EndPoints(longest_seconds=0.9))
    wave_T = speech_like(3.0, 7)
    expected = words_of(updates_of(streams, wave_T, 48_000))
    assert len(expected) > 3
    assert all(0 <= word.start < word.end <= 3.0 for word in expected)
    assert_same_words(words_of(updates_of(streams, wave_T, 777)), expected)


class PlugIn(TextHead):
    """A head that no module of the package knows; its outputs are those of a CTC head."""

    def __init__(self, inner: CTC) -> None:
        super().__init__(inner.config)
        self.inner = inner
        self.name_tokens(inner.symbols)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        return self.inner.prepare(model, batch, ctx)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        return self.inner.forward(encoded, batch, plan, ctx)

    def decoder_frames(self, encoded: EncoderOutput) -> torch.Tensor:
        return self.inner.decoder_frames(encoded)

    def streaming_decoder(self, rate_hz: float, beam: int, end_points: EndPoints) -> StreamingDecoder[Any]:
        return self.inner.streaming_decoder(rate_hz, beam, end_points)


def test_a_plug_in_head_brings_its_decoder(recognisers: dict[str, Recogniser]) -> None:
    head = recognisers["ctc"].head
    assert isinstance(head, CTC)
    plugged, wave_T = replace(recognisers["ctc"], head=PlugIn(head).eval()), speech_like(3.0, 8)
    expected = whole(recognisers["ctc"], wave_T, DecodingConfig())
    assert expected.words
    assert_same_words(whole(plugged, wave_T, DecodingConfig()).words, expected.words)
    streams = StreamingRecogniser(plugged, DecodingConfig(), 4, 2, NEVER)
    assert_same_words(words_of(updates_of(streams, wave_T, 1_000)), expected.words)
    found = recognise(plugged, [wave_T.numpy()], Decoders(beam=3))
    assert found[0][1] == [plugged.transcribe("a", [wave_T.numpy()], DecodingConfig()).text]


def test_rescoring_can_choose_another_text(recognisers: dict[str, Recogniser]) -> None:
    wave_T, texts = speech_like(3.0, 8), set()
    for weight in (0.0, 0.99):
        decoding = DecodingConfig(decoder="rescoring", beam=8, ctc_weight=weight)
        texts.add(whole(recognisers["ctc"], wave_T, decoding).text)
    assert len(texts) == 2
    assert whole(recognisers["ctc"], wave_T, DecodingConfig(decoder="beam", beam=8)).text in texts


def test_a_long_recording_of_a_transducer_is_computed_in_windows(recognisers: dict[str, Recogniser]) -> None:
    wave = speech_like(6.0, 8).numpy()
    one = recognisers["rnnt"].transcribe("a", [wave], DecodingConfig())
    decoding = DecodingConfig(window_seconds=3.0, overlap_seconds=1.0)
    cut = recognisers["rnnt"].transcribe("a", np.array_split(wave, 7), decoding)
    assert cut.seconds == one.seconds == 6.0
    times = np.array([word.start for word in cut.words])
    assert (np.diff(times) >= 0).all()
    assert times[-1] > 4.0
    assert recognisers["rnnt"].transcribe("none", [wave[:200]], DecodingConfig()).words == ()


def test_error_rates_decode_transducers(recognisers: dict[str, Recogniser]) -> None:
    wave = speech_like(2.0, 8).numpy()
    found = recognise(recognisers["rnnt"], [wave], Decoders(beam=3))
    assert [name for name, _ in found] == ["greedy", "beam 3"]
    assert found[0][1] == [recognisers["rnnt"].transcribe("a", [wave], DecodingConfig()).text]


def test_a_run_opens_its_ctc_head_unless_the_transducer_is_named(run: Path, tmp_path: Path) -> None:
    assert open_recogniser(str(run)).head.gives_log_probs
    save(tmp_path / "alone", 4, heads={"text": {"name": "transducer", "symbols": " ab"}})
    assert isinstance(open_recogniser(str(tmp_path / "alone")).head, Transducer)
    with pytest.raises(ConfigError, match=r"head=other: must be one of text"):
        open_recogniser(str(tmp_path / "alone"), "other")


def test_decoders_that_a_run_lacks_are_refused(recognisers: dict[str, Recogniser]) -> None:
    alone = replace(recognisers["rnnt"], attention=None)
    wave = np.zeros(16_000, np.float32)
    for decoder, said in (("rescoring", "no head `sequence`"), ("joint", "decoder=joint: decodes whole recordings")):
        decoding: Any = DecodingConfig(decoder=decoder)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=said):
            alone.transcribe("a", [wave], decoding)
    with pytest.raises(ConfigError, match="no head `sequence`"):
        StreamingRecogniser(alone, DecodingConfig(decoder="rescoring"), 4, 2)
    for decoding in (DecodingConfig(decoder="joint"), DecodingConfig(decoder="beam", lm="words.arpa")):
        with pytest.raises(ConfigError, match="take greedy, beam or rescoring"):
            StreamingRecogniser(recognisers["ctc"], decoding, 4, 2)
