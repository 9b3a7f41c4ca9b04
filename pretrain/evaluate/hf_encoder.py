"""Loads Hugging Face checkpoints as models for probes and their baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.frames import EncoderOutput, valid_frames
from pretrain.interfaces.models import ModelShape, shortest_input
from pretrain.interop import hf_folder

UNUSED = ("masked_spec_embed", "decoder.")
"""Beginnings of the names of weights that the encoder does not need: of pretraining, and of Whisper's decoder."""
WHISPER, W2V_BERT = "whisper", "wav2vec2-bert"
"""Model types whose input is log-mel or filter bank features instead of the waveform."""
HOP = 320
"""Samples per frame of these models: two spectral frames of 10 ms."""


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


class SpectralModel(HuggingFaceModel):
    """An encoder of transformers on spectral features: Whisper's, or w2v-BERT 2.0.

    transformers computes the features. Whisper sees windows of a fixed length (30 s), padded with silence; longer audio
    is encoded window by window.
    """

    def __init__(self, net: Any, kind: str) -> None:
        nn.Module.__init__(self)
        from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

        self.normalize, self.kind, settings = False, kind, net.config
        self.net = net.encoder if kind == WHISPER else net
        rate_hz = SAMPLE_RATE / HOP
        if kind == WHISPER:
            dim, layers, mels = settings.d_model, settings.encoder_layers, settings.num_mel_bins
            self.extractor = WhisperFeatureExtractor(feature_size=mels)
            self.window = settings.max_source_positions * HOP
            settings.encoder_layerdrop = 0.0
        else:
            dim, layers, mels = settings.hidden_size, settings.num_hidden_layers, settings.feature_projection_input_dim
            self.extractor = SeamlessM4TFeatureExtractor(feature_size=mels // 2, num_mel_bins=mels // 2)
            self.window = 0
            settings.apply_spec_augment, settings.layerdrop = False, 0.0
        self.shape = ModelShape(dim, layers, mels, rate_hz, rate_hz)

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the number of frames for each number of samples, (B,)."""
        if self.kind == WHISPER:
            return torch.div(lengths_B + HOP - 1, HOP, rounding_mode="floor")
        spectra_B = torch.div(lengths_B - 400, 160, rounding_mode="floor") + 1  # Kaldi's windows of 25 ms
        return torch.div(spectra_B, 2, rounding_mode="floor").clamp(min=0)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor, dropped_BF: Tensor | None = None) -> EncoderOutput:
        """Encodes (B, T) audio to (B, F, D) per layer. Raises ValueError for `dropped_BF`, which is not supported."""
        if dropped_BF is not None:
            raise ValueError(f"features of a model of type {self.kind} cannot be dropped")
        frames_B = self.feature_lengths(lengths_B)
        rows = [
            self._whisper(row[:n]) if self.window else self._bert(row[:n])
            for row, n in zip(wave_BT, lengths_B, strict=True)
        ]
        most = int(frames_B.max())
        layers = [
            torch.stack([F.pad(row[at][:most], (0, 0, 0, most - min(most, len(row[at])))) for row in rows])
            for at in range(len(rows[0]))
        ]
        return EncoderOutput(tuple(layers), frames_B, self.shape.rate_hz)

    def _whisper(self, wave_T: Tensor) -> list[Tensor]:
        """Returns the (F, D) frames of each layer."""
        windows = []
        for start in range(0, len(wave_T), self.window):
            part_T = wave_T[start : start + self.window]
            padded = F.pad(part_T, (0, self.window - len(part_T))).cpu().numpy()
            features = self.extractor(
                padded, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="pt"
            ).input_features.to(wave_T.device)
            states = self.net(features, output_hidden_states=True).hidden_states
            windows.append([state[0, : -(-len(part_T) // HOP)] for state in states])
        return [torch.cat([window[at] for window in windows]) for at in range(len(windows[0]))]

    def _bert(self, wave_T: Tensor) -> list[Tensor]:
        features = self.extractor(
            wave_T.cpu().numpy(), sampling_rate=SAMPLE_RATE, padding=False, pad_to_multiple_of=None, return_tensors="pt"
        ).input_features.to(wave_T.device)
        return [state[0] for state in self.net(features, output_hidden_states=True).hidden_states]


def wrap(net: Any, folder: Path) -> HuggingFaceModel:
    """Returns a model of transformers with the interface of this module, in fp32."""
    kind = net.config.model_type
    if kind in (WHISPER, W2V_BERT):
        return SpectralModel(net.float(), kind)
    return HuggingFaceModel(net.float(), _normalized(folder))


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
    missing = {name: "is missing" for name in report["missing_keys"] if not name.startswith(UNUSED)}
    for name, theirs, ours in report["mismatched_keys"]:
        missing[name] = f"has shape {tuple(theirs)}, but its config.json requires {tuple(ours)}"
    hf_folder.require_weights(missing, folder)
    return wrap(net, folder)  # weights may be saved in 16 bits


def fresh(folder: Path, seed: int) -> HuggingFaceModel:
    """Builds the same architecture with the random weights of `seed`."""
    transformers, settings = _transformers(folder), _settings(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "fresh"))
        return wrap(transformers.MODEL_MAPPING[type(settings)](settings), folder)


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
    strides = [1] if kind in (WHISPER, W2V_BERT) else values.get("conv_stride")
    if strides is None:
        raise ConfigError(
            f"{folder}: model_type={kind} has no waveform stem (conv_stride), and is neither {WHISPER} nor {W2V_BERT}; "
            "not supported"
        )
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
