"""Exports a synthesis head as two ONNX graphs: tokens to their durations and vectors, and these to audio.

Between them a client adds the durations up, which gives the number of frames: a graph cannot make a tensor whose
size is a result. Nothing is written unless both graphs, loaded from their files, give the durations and the audio of
the head.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.text.tokenizer import Tokenizer
from pretrain.heads.synthesis import Synthesis
from pretrain.interop.export_tolerance import require_close
from pretrain.interop.graph_export import first_line, require
from pretrain.models.synthesis.synthesizer import Planned

TEXT, AUDIO, DESCRIPTION = "text.onnx", "audio.onnx", "synthesis.json"
CHECKED = (3, 17, 60)
"""Tokens of the texts of the comparison; the graphs are traced with 9."""


class TextGraph(nn.Module):
    """Tokens of one text, with both marks, to durations and vectors, in the learned voice."""

    def __init__(self, head: Synthesis) -> None:
        super().__init__()
        self.synthesizer = head.synthesizer
        self.register_buffer("style_1D", head.style_of(None))
        self.style_1D: Tensor

    def forward(self, tokens_1N: Tensor, controls_3: Tensor) -> tuple[Tensor, Tensor]:
        """Returns durations (1, N) int64 and vectors (1, N, D) for ids (1, N) and controls, `Controls` as (3,)."""
        tokens_1 = torch.full((1,), tokens_1N.shape[1], dtype=torch.int64)
        planned = self.synthesizer.plan(tokens_1N, tokens_1, self.style_1D, controls_3)
        return planned.durations_BN, planned.x_BND


class AudioGraph(nn.Module):
    """Durations and vectors of one text to audio."""

    def __init__(self, head: Synthesis) -> None:
        super().__init__()
        self.synthesizer = head.synthesizer

    def forward(self, durations_1N: Tensor, x_1ND: Tensor, places_F: Tensor) -> Tensor:
        """Returns (1, T) audio at 16 kHz; `places_F` is 0 … F − 1, int64, where F is the sum of the durations."""
        mel = self.synthesizer.render(Planned(x_1ND, durations_1N), places_F.shape[0])
        assert self.synthesizer.vocoder is not None
        wave_1T: Tensor = self.synthesizer.vocoder(mel.x_BFD, mel.lengths_B)
        return wave_1T


@torch.no_grad()
def export_synthesis(head: Synthesis, tokenizer: Tokenizer, folder: Path, run: str) -> float:
    """Writes both graphs and their description, synthesis.json.

    Args:
        head: a trained head with a vocoder; not modified.
        tokenizer: that of its texts.
        folder: must not exist; is created complete or not at all.
        run: name of the run, for the description.

    Returns:
        The largest difference of the audio, relative to its largest sample.

    Raises:
        ConfigError: the head has no vocoder or draws noise, a package is missing, `folder` exists, a graph cannot be
            exported, or the results differ by more than the tolerance of ONNX.
        OSError: the folder cannot be written; nothing is left behind.
    """
    if head.synthesizer.vocoder is None:
        raise ConfigError("--to onnx_synthesis: the head was trained without a vocoder; there is no audio to export")
    if head.synthesizer.flow is not None:
        raise ConfigError("--to onnx_synthesis: decoder=flow draws noise, which the graphs do not; train decoder=l1")
    require("onnx", "onnxscript", "onnxruntime")
    head = copy.deepcopy(head).cpu().float().eval()
    text, audio = TextGraph(head), AudioGraph(head)
    with new_folder(folder) as made:
        _write(text, audio, made, head)
        error = _gate(text, audio, made, head)
        require_close(error, "onnx_synthesis", f"heads.{head.config.name}")
        described = json.dumps(_description(head, tokenizer, run), indent=2, ensure_ascii=False) + "\n"
        (made / DESCRIPTION).write_text(described, encoding="utf-8")
    return error


def _write(text: TextGraph, audio: AudioGraph, folder: Path, head: Synthesis) -> None:
    any_size = torch.export.Dim.DYNAMIC
    tokens_1N = torch.arange(9)[None] % (head.config.vocabulary + 2)
    controls_3 = torch.tensor([1.0, 0.0, 0.0])
    durations_1N, x_1ND = text(tokens_1N, controls_3)
    places_F = torch.arange(int(durations_1N.sum()))
    graphs: list[tuple[str, nn.Module, tuple[Tensor, ...], tuple[Any, ...], list[str], list[str]]] = [
        (TEXT, text, (tokens_1N, controls_3), ({1: any_size}, None), ["tokens", "controls"], ["durations", "vectors"]),
        (AUDIO, audio, (durations_1N, x_1ND, places_F), ({1: any_size}, {1: any_size}, {0: any_size}),
         ["durations", "vectors", "places"], ["wave"]),
    ]  # fmt: skip
    for file, module, arguments, sizes, inputs, outputs in graphs:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warnings; `_gate` compares the results
                program = torch.export.export(
                    module, arguments, dynamic_shapes=sizes, strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )  # fmt: skip
                made: Any = torch.onnx.export(
                    program, (), input_names=inputs, output_names=outputs, dynamo=True, verbose=False
                )
        except Exception as error:  # exporters raise any type for what they cannot trace
            raise ConfigError(f"--to onnx_synthesis: {file} cannot be exported: {first_line(error)}") from None
        write_synced(folder / file, made.model_proto.SerializeToString())


def _gate(text: TextGraph, audio: AudioGraph, folder: Path, head: Synthesis) -> float:
    """Returns the largest relative difference of the audio; inf where a duration differs."""
    sessions = [open_session(folder / file) for file in (TEXT, AUDIO)]
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for tokens in CHECKED:
        tokens_1N = torch.randint(head.config.vocabulary, (1, tokens), generator=generator)
        controls_3 = torch.tensor([1.0 + tokens / 100, 1.0, 2.0])
        durations_1N, x_1ND = text(tokens_1N, controls_3)
        places_F = torch.arange(int(durations_1N.sum()))
        expected_1T = audio(durations_1N, x_1ND, places_F)
        found, vectors = sessions[0].run(None, {"tokens": tokens_1N.numpy(), "controls": controls_3.numpy()})
        if found.tolist() != durations_1N.tolist():
            return float("inf")
        given = {"durations": found, "vectors": vectors, "places": places_F.numpy()}
        wave_1T = torch.from_numpy(sessions[1].run(None, given)[0])
        if wave_1T.shape != expected_1T.shape:
            return float("inf")
        worst = max(worst, float((wave_1T - expected_1T).abs().max() / expected_1T.abs().max()))
    return worst


def _description(head: Synthesis, tokenizer: Tokenizer, run: str) -> dict[str, Any]:
    return {
        "format": "onnx",
        "run": run,
        "tokens": {"kind": tokenizer.kind, "case": tokenizer.case, "symbols": list(tokenizer.symbols)},
        "first_mark": head.first,
        "last_mark": head.last,
        "graphs": {
            TEXT: {
                "tokens": "(1, N) int64: first_mark, ids of the symbols, last_mark",
                "controls": "(3,) float32: speed, semitones, decibels; 1, 0, 0 as learned",
                "gives": "durations (1, N) int64, vectors (1, N, D)",
            },
            AUDIO: {
                "durations, vectors": "as given by text.onnx",
                "places": "0 … F - 1, int64, with F the sum of the durations",
                "gives": "wave (1, T)",
            },
        },
        "sample_rate": SAMPLE_RATE,
    }
