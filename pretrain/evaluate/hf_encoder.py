"""Checkpoints in Hugging Face's layout, as models that the probes and their baselines can use like ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import ModelShape


class HuggingFaceModel(nn.Module):
    """A speech encoder of transformers. normalize: bring each utterance to mean 0 and deviation 1 first."""

    def __init__(self, net: Any, normalize: bool) -> None:
        super().__init__()
        self.net, self.normalize = net, normalize
        hop = 1
        for stride in net.config.conv_stride:
            hop *= stride
        rate_hz, settings = 16_000 / hop, net.config
        self.shape = ModelShape(
            settings.hidden_size, settings.num_hidden_layers, settings.conv_dim[-1], rate_hz, rate_hz
        )
        # what a probe's supervised baseline must not have: masks and skipped layers of pretraining
        settings.apply_spec_augment, settings.layerdrop = False, 0.0

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Frames of so many samples."""
        frames_B: Tensor = self.net._get_feat_extract_output_lengths(lengths_B)
        return frames_B

    def forward(self, wave_BT: Tensor, lengths_B: Tensor, dropped_BF: Tensor | None = None) -> EncoderOutput:
        """(B, T) audio to all layers. dropped_BF: features set to 0."""
        valid_BT = torch.arange(wave_BT.shape[1], device=wave_BT.device)[None] < lengths_B[:, None]
        if self.normalize:
            mean_B1 = wave_BT.sum(1, keepdim=True) / lengths_B[:, None]
            centred_BT = (wave_BT - mean_B1) * valid_BT
            wave_BT = centred_BT / torch.sqrt(centred_BT.square().sum(1, keepdim=True) / lengths_B[:, None] + 1e-7)
        padded = bool((lengths_B < wave_BT.shape[1]).any())
        with self._without(dropped_BF):
            found = self.net(wave_BT, attention_mask=valid_BT.long() if padded else None, output_hidden_states=True)
        return EncoderOutput(tuple(found.hidden_states), self.feature_lengths(lengths_B), self.shape.rate_hz)

    @contextlib.contextmanager
    def _without(self, dropped_BF: Tensor | None) -> Iterator[None]:
        if dropped_BF is None:
            yield
            return

        def zero(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0].masked_fill(dropped_BF[:, : given[0].shape[1], None], 0.0), *given[1:])

        handle = self.net.feature_projection.register_forward_pre_hook(zero)
        try:
            yield
        finally:
            handle.remove()


def load(folder: Path) -> HuggingFaceModel:
    """The model of a folder with config.json and model.safetensors. Raises ValueError where it cannot be used."""
    model = _auto(folder).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return HuggingFaceModel(model.float(), _normalized(folder))  # they may lie there in half precision


def fresh(folder: Path, seed: int) -> HuggingFaceModel:
    """The same architecture with the random weights of `seed`."""
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "fresh"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return HuggingFaceModel(_auto(folder).from_config(config).float(), _normalized(folder))


def _auto(folder: Path) -> Any:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(f"{folder}: a Hugging Face checkpoint needs the package transformers ({error})") from error
    settings = _read(folder / "config.json")
    if "conv_stride" not in settings:
        raise ValueError(f"{folder}: model_type={settings.get('model_type')!r} has no waveform stem; not supported")
    return AutoModel


def _normalized(folder: Path) -> bool:
    by_norm = _read(folder / "config.json").get("feat_extract_norm") == "layer"
    return bool(_read(folder / "preprocessor_config.json").get("do_normalize", by_norm))


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values
