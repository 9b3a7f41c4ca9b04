"""Frozen encoders of several makes behind one call: audio to the features of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import dump, load
from pretrain.checkpointing.checkpoint import read_state
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.config import Config
from pretrain.evaluate import hf_encoder
from pretrain.evaluate.hf_encoder import HuggingFaceModel
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.spectral import LogMel
from pretrain.train_module import build_model

Model = SpeechModel | HuggingFaceModel


@dataclass(frozen=True)
class FrozenEncoder:
    """encode: (T,) waveform at 16 kHz to layers (L, F, D) at rate_hz; frame f is at (f + ½) / rate_hz seconds.

    fresh: makes the same architecture with random weights (by seed), to train or to freeze; None where there is none to
    make.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    rate_hz: float
    step: int = 0
    fresh: Callable[[int], Model] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint's model; fresh: as FrozenEncoder's; settings: the config that it was made from."""

    name: str
    model: Model
    fresh: Callable[[int], Model]
    settings: dict[str, Any]
    step: int = 0


def open_pretrained(given: str) -> Pretrained:
    """A checkpoint of ours or of Hugging Face's layout. Raises ValueError for one that cannot be used."""
    folder = find_checkpoint(given)
    if not (folder / "state.json").is_file():
        model = hf_encoder.load(folder)
        return Pretrained(
            folder.name, model, lambda seed: hf_encoder.fresh(folder, seed), model.net.config.to_diff_dict()
        )
    ours, config, step = load_model(folder)
    return Pretrained(config.name, ours, lambda seed: fresh_model(config, seed), dump(config), step)


def open_encoder(given: str, device: str = "cpu") -> FrozenEncoder:
    """The same, frozen."""
    found = open_pretrained(given)
    return freeze(found.model, found.name, device, found.step, found.fresh)


def load_model(folder: Path) -> tuple[SpeechModel, Config, int]:
    """The pretrained part of one of our checkpoints, its config and step. Raises ValueError for a damaged one."""
    values = read_state(folder)
    config = load(Config, values["config"])
    model = build_model(config).model
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / 'model.safetensors'}: {error}") from error
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    return model, config, values["step"]


def fresh_model(config: Config, seed: int) -> SpeechModel:
    """The architecture of `config` with the random weights of `seed`."""
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return build_model(Config(**{**values, "seed": keyed_seed(seed, "fresh") % 2**31})).model


def freeze(
    model: Model,
    name: str,
    device: str = "cpu",
    step: int = 0,
    fresh: Callable[[int], Model] | None = None,
) -> FrozenEncoder:
    """A model in evaluation mode."""
    model.eval().to(device)

    @torch.inference_mode()
    def encode(wave_T: Tensor) -> Tensor:
        encoded = model(wave_T[None].to(device), torch.tensor([len(wave_T)], device=device))
        return torch.stack([layer[0] for layer in encoded.layers]).cpu()

    return FrozenEncoder(name, encode, model.shape.rate_hz, step, fresh)


def log_mel_with_context(context: int = 10, n_mels: int = 80, rate_hz: float = 50.0) -> FrozenEncoder:
    """log-mel of the frame and of `context` 10 ms frames on either side, one "layer" of (2·context + 1) · n_mels."""
    mel = LogMel(n_mels)

    @torch.inference_mode()
    def encode(wave_T: Tensor) -> Tensor:
        frames_FD = mel(wave_T[None], torch.tensor([len(wave_T)])).x_BFD[0]
        padded = torch.nn.functional.pad(frames_FD.T, (context, context)).T
        windows_FDC = padded.unfold(0, 2 * context + 1, 1)
        centre_s = (np.arange(int(len(wave_T) / 16_000 * rate_hz)) + 0.5) / rate_hz
        # a mel frame of 25 ms every 10 ms has its middle at 10·f + 12.5 ms
        nearest = np.clip(np.rint((centre_s - 0.0125) * mel.rate_hz), 0, len(frames_FD) - 1).astype(np.int64)
        return windows_FDC[torch.from_numpy(nearest)].flatten(1)[None]

    return FrozenEncoder(f"log-mel ±{context} frames", encode, rate_hz)
