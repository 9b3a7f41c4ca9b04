"""Frozen encoders of several kinds with one interface: audio to the features of every layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import dump
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint
from pretrain.config import Config
from pretrain.evaluate import hf_encoder
from pretrain.evaluate.hf_encoder import HuggingFaceModel
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.numerics import pad_audio
from pretrain.nn.spectral import LogMel
from pretrain.train_module import build_model

Model = SpeechModel | HuggingFaceModel


@dataclass(frozen=True)
class FrozenEncoder:
    """Computes features of audio.

    encode: (T,) waveform at 16 kHz to layers (L, F, D) at rate_hz; the centre of frame f is at (f + ½) / rate_hz s.
    fresh: builds the same architecture with the random weights of a seed; None for features without weights.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    rate_hz: float
    step: int = 0
    fresh: Callable[[int], Model] | None = field(default=None, repr=False)
    run: LoadedCheckpoint | None = field(default=None, repr=False)
    """The run that it is of, with its heads; None for others."""


def last_layer(encoder: FrozenEncoder) -> FrozenEncoder:
    """Returns the encoder with its last layer alone, which is what a small model gives where it is deployed."""
    return dataclasses.replace(encoder, encode=lambda wave_T: encoder.encode(wave_T)[-1:])


@contextlib.contextmanager
def followed(encoder: FrozenEncoder, utterances: int, console: Console | None = None) -> Iterator[FrozenEncoder]:
    """Shows on a terminal how many utterances the encoder has encoded while the block runs.

    Args:
        encoder: encoder.
        utterances: number of utterances that it will encode.
        console: terminal; None: standard error.

    Yields:
        The encoder, counted.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("utterances"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=utterances)

        def encode(wave_T: Tensor) -> Tensor:
            layers_LFD = encoder.encode(wave_T)
            bar.advance(task)
            return layers_LFD

        yield dataclasses.replace(encoder, encode=encode)


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint's model.  fresh: as in FrozenEncoder.  settings: the config that it was trained with."""

    name: str
    model: Model
    fresh: Callable[[int], Model]
    settings: dict[str, Any]
    step: int = 0
    run: LoadedCheckpoint | None = None


def open_pretrained(given: str) -> Pretrained:
    """Loads a checkpoint of this project or of Hugging Face.

    Args:
        given: a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder.

    Returns:
        The model on the CPU, with its name, config, number of updates and a function that builds untrained copies.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of an unsupported model; names the file and the remedy.
    """
    folder = find_checkpoint(given)
    if not (folder / "state.json").is_file():
        model = hf_encoder.load(folder)
        return Pretrained(
            folder.name, model, lambda seed: hf_encoder.fresh(folder, seed), model.net.config.to_diff_dict()
        )
    run = load_checkpoint(folder)
    config = run.config
    return Pretrained(
        config.name, run.module.model, lambda seed: fresh_model(config, seed), dump(config), run.step, run
    )


def open_encoder(given: str, device: str = "cpu") -> FrozenEncoder:
    """Loads a checkpoint for feature extraction: in evaluation mode, without gradients.

    Args:
        given: a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder.
        device: torch device that computes the features.

    Returns:
        An encoder whose `encode` maps a waveform (T,) at 16 kHz in [-1, 1] to the layers (L, F, D), fp32 on the CPU.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of an unsupported model; names the file and the remedy.
        ConfigError: this version cannot read its config.
    """
    found = open_pretrained(given)
    encoder = freeze(found.model, found.name, device, found.step, found.fresh)
    return dataclasses.replace(encoder, run=found.run)


def fresh_model(config: Config, seed: int) -> SpeechModel:
    """Builds the architecture of `config` with the random weights of `seed`."""
    return build_model(dataclasses.replace(config, seed=keyed_seed(seed, "fresh") % 2**31)).model


def freeze(
    model: Model,
    name: str,
    device: str = "cpu",
    step: int = 0,
    fresh: Callable[[int], Model] | None = None,
) -> FrozenEncoder:
    """Wraps a model for feature extraction: in evaluation mode, without gradients.

    Args:
        model: the model.
        name: its name in tables.
        device: torch device that computes the features.
        step: number of its updates.
        fresh: builds the same architecture with the random weights of a seed.
    """
    model.eval().to(device)
    shortest = model.least_samples() if isinstance(model, HuggingFaceModel) else model.frontend.least_samples()

    @torch.inference_mode()
    def encode(wave_T: Tensor) -> Tensor:
        wave_1T = pad_audio(wave_T[None], shortest).to(device)  # padded with silence to at least one frame
        encoded = model(wave_1T, torch.tensor([wave_1T.shape[1]], device=device))
        return torch.stack([layer[0] for layer in encoded.layers]).cpu()

    return FrozenEncoder(name, encode, model.shape.rate_hz, step, fresh)


def log_mel_with_context(context: int = 10, n_mels: int = 80, rate_hz: float = 50.0) -> FrozenEncoder:
    """Returns a baseline of one layer: log-mel of each frame and of `context` 10 ms frames on either side."""
    mel = LogMel(n_mels)

    @torch.inference_mode()
    def encode(wave_T: Tensor) -> Tensor:
        wave_1T = pad_audio(wave_T[None], int(SAMPLE_RATE / rate_hz) + mel.window)
        frames_FD = mel(wave_1T, torch.tensor([wave_1T.shape[1]])).x_BFD[0]
        padded = torch.nn.functional.pad(frames_FD.T, (context, context)).T
        windows_FDC = padded.unfold(0, 2 * context + 1, 1)
        centre_s = (np.arange(max(1, int(len(wave_T) / SAMPLE_RATE * rate_hz))) + 0.5) / rate_hz
        # mel windows of 25 ms every 10 ms have their centres at 10·f + 12.5 ms
        nearest = np.clip(np.rint((centre_s - 0.0125) * mel.rate_hz), 0, len(frames_FD) - 1).astype(np.int64)
        return windows_FDC[torch.from_numpy(nearest)].flatten(1)[None]

    return FrozenEncoder(f"log-mel ±{context} frames", encode, rate_hz)
