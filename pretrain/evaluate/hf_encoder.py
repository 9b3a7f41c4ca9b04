"""Loads Hugging Face checkpoints as models for probes and their baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.frames import EncoderOutput, valid_frames
from pretrain.interfaces.models import ModelShape, shortest_input
from pretrain.interop import hf_folder

UNUSED = ("masked_spec_embed",)
"""Weights of a base model that are used in its pretraining only."""


class HuggingFaceModel(nn.Module):
    """A speech encoder of transformers. normalize: scale each utterance to mean 0 and deviation 1."""

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
        # train the supervised baseline without the masks and layer drop of pretraining
        settings.apply_spec_augment, settings.layerdrop = False, 0.0

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of frames for each number of samples, (B,)."""
        frames_B: Tensor = self.net._get_feat_extract_output_lengths(lengths_B)
        return frames_B

    def least_samples(self) -> int:
        """Returns the shortest audio, in samples, that gives a frame."""
        return shortest_input(self.feature_lengths)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor, dropped_BF: Tensor | None = None) -> EncoderOutput:
        """Encodes (B, T) audio to (B, F, D) per layer; features at `dropped_BF` are set to 0."""
        valid_BT = valid_frames(lengths_B, wave_BT.shape[1], wave_BT.device)
        if self.normalize:
            samples_B1 = lengths_B.to(wave_BT.device)[:, None]
            mean_B1 = wave_BT.sum(1, keepdim=True) / samples_B1
            centred_BT = (wave_BT - mean_B1) * valid_BT
            wave_BT = centred_BT / torch.sqrt(centred_BT.square().sum(1, keepdim=True) / samples_B1 + 1e-7)
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
    """Loads a folder with config.json and safetensors weights; no code in it is executed.

    Raises:
        ValueError: transformers is not installed.
        ConfigError: the folder cannot be read, its model_type is unknown to transformers or has no waveform stem, or a
            weight of the encoder is missing or of another shape.
    """
    transformers, settings = _transformers(folder), _settings(folder)
    kind = transformers.MODEL_MAPPING[type(settings)]
    weights = hf_folder.read_weights(folder)
    try:
        with _quiet(transformers):
            net, report = kind.from_pretrained(
                None,
                config=settings,
                state_dict=weights,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
            )
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:  # of incompatible sizes
        raise ConfigError(f"{folder / hf_folder.CONFIG}: transformers cannot build this model ({error})") from None
    missing = {name: "is missing" for name in report["missing_keys"] if name not in UNUSED}
    for name, theirs, ours in report["mismatched_keys"]:
        missing[name] = f"has shape {tuple(theirs)}, but its config.json requires {tuple(ours)}"
    hf_folder.require_weights(missing, folder)
    return HuggingFaceModel(net.float(), _normalized(folder))  # weights may be saved in 16 bits


def fresh(folder: Path, seed: int) -> HuggingFaceModel:
    """Builds the same architecture with the random weights of `seed`."""
    transformers, settings = _transformers(folder), _settings(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "fresh"))
        net = transformers.MODEL_MAPPING[type(settings)](settings)
        return HuggingFaceModel(net.float(), _normalized(folder))


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder}: a Hugging Face checkpoint needs the package transformers ({error})") from error
    return transformers


def _settings(folder: Path) -> Any:
    """Returns the config of a model of transformers; auto_map, which names code in the folder, is ignored."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    values = hf_folder.read_config(folder)
    kind = values["model_type"]
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        raise ConfigError(
            f"{folder / hf_folder.CONFIG}: transformers has no model_type={kind}; code in a checkpoint is never "
            "run, so use a checkpoint of a model that is part of transformers"
        )
    strides = values.get("conv_stride")
    if strides is None:
        raise ConfigError(f"{folder}: model_type={kind} has no waveform stem (conv_stride); not supported")
    if not isinstance(strides, list) or not all(isinstance(stride, int) and stride > 0 for stride in strides):
        raise ConfigError(f"{folder / hf_folder.CONFIG}: conv_stride must be a list of whole numbers above 0")
    values = {name: value for name, value in values.items() if name not in ("auto_map", "custom_pipelines")}
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # its validation raises many types
        raise ConfigError(f"{folder / hf_folder.CONFIG}: {error}") from None


def _normalized(folder: Path) -> bool:
    by_norm = hf_folder.read_config(folder).get("feat_extract_norm") == "layer"
    return bool(hf_folder.read_processor(folder).get("do_normalize", by_norm))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppresses the report and progress bar of loading."""
    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
