"""Frozen image encoder of a local CLIP or SigLIP folder of transformers, as in SpeechCLIP (arXiv 2210.00705).

Its weights are read from safetensors, are not in the run's checkpoints, and never change; the checkpoint has
their sha256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.json_object import DamagedFileError, read_optional
from data_pipeline.core.schema import ConfigError, about, config
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import EmbeddingConfig
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.models import Embedding
from pretrain.nn.image_inputs import image_numbers, images_present, pixels_of
from pretrain.nn.numerics import full_precision

WEIGHTS = "model.safetensors"
MODELS = {
    "clip": ("CLIPVisionModelWithProjection", "projection_dim"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "projection_dim"),
    "siglip": ("SiglipVisionModel", "hidden_size"),
    "siglip_vision_model": ("SiglipVisionModel", "hidden_size"),
}
"""model_type of config.json -> transformers' class of the image encoder, and the field with the size of its output."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of pixels by default, where preprocessor_config.json has none."""


@config
class Config(EmbeddingConfig):
    name: Literal["clip"] = "clip"
    folder: Annotated[
        str,
        about("a folder with config.json and model.safetensors of CLIP or SigLIP", resume="free", min_length=1),
    ]
    size: Annotated[int, about("side of the images in pixels, as data.images.size", ge=1, le=4096)] = 224

    @property
    def image_shape(self) -> tuple[int, int]:
        """`size` pixels and 3 colour channels."""
        return self.size, 3


class Described(NamedTuple):
    """Fields of config.json on the image encoder."""

    model: str
    dim: int
    side: int


class Clip(Embedding):
    """One frame per image: the encoder's embedding of it, before it is normalised. Set no encoder for its tower."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        if dim:
            raise ConfigError("an embedding clip encodes images itself; leave out the encoder of its tower")
        self.config = config
        self.described = read_description(config.folder)
        self.dim = self.described.dim
        self.register_buffer("sha256", torch.zeros(32, dtype=torch.uint8))
        self.sha256: Tensor
        self._loaded: list[nn.Module] = []  # in a list, so that it is not a submodule
        self._mean_std: tuple[Tensor, Tensor] = _mean_std(config.folder, self.described.model)

    def present(self, batch: Batch) -> Tensor:
        return images_present(batch)

    def identity(self, batch: Batch) -> Tensor:
        return image_numbers(batch, self.config.size, 3)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Frames:
        side, device, present_B = self.described.side, self.sha256.device, self.present(batch)
        pixels_BCHW = pixels_of(batch, self.config.size, 3).to(device, non_blocking=True).float() / 255
        with full_precision(device):
            if side != self.config.size:
                pixels_BCHW = F.interpolate(pixels_BCHW, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            mean_C11, std_C11 = (values.to(device) for values in self._mean_std)
            out: Any = self._encoder(device)(pixel_values=(pixels_BCHW - mean_C11) / std_C11)
        x_BD = out.image_embeds if self.described.model.startswith("CLIP") else out.pooler_output
        return Frames(x_BD[:, None] * present_B.to(device)[:, None, None], present_B.long(), 1.0)

    def _encoder(self, device: torch.device) -> nn.Module:
        """Returns the image encoder on a device, loaded on first use.

        Raises:
            ConfigError: it cannot be read, or is not the one that the run began with.
        """
        if not self._loaded:
            digest = bytes.fromhex(sha256_of(Path(self.config.folder).expanduser() / WEIGHTS))
            begun = bytes(self.sha256.cpu().tolist())
            if any(begun) and begun != digest:
                raise ConfigError(
                    f"embedding.folder={self.config.folder}: its weights have sha256 {digest.hex()[:12]}…, and this "
                    f"run began with {begun.hex()[:12]}…; give the same folder"
                )
            self.sha256.copy_(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
            self._loaded = [_load(self.config.folder, self.described.model, self.dim).eval().requires_grad_(False)]
        return self._loaded[0].to(device)


def read_description(folder: str) -> Described:
    """Reads config.json of a folder; loads nothing.

    Raises:
        ConfigError: there is no CLIP or SigLIP with safetensors.
        DamagedFileError: config.json is not a JSON object.
    """
    path = Path(folder).expanduser()
    values = read_optional(path / "config.json", "download the whole model again") or {}
    try:
        kind = values["model_type"]
        model, size = MODELS[kind]
        vision = values.get("vision_config", values)
        dim = values.get(size, vision.get(size)) if size == "projection_dim" else vision[size]
        described = Described(model, int(dim), int(vision["image_size"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"embedding.folder={folder}: not a folder with config.json of one of {', '.join(MODELS)} "
            f"({type(error).__name__}: {error})"
        ) from None
    if not (path / WEIGHTS).is_file():
        raise ConfigError(
            f"embedding.folder={folder}: has no {WEIGHTS}; other formats of weights can run code and are not read"
        )
    return described


def _load(folder: str, model: str, dim: int) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ConfigError("embedding.name=clip: needs transformers; pip install transformers") from None
    path = str(Path(folder).expanduser())
    try:
        whole = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        vision = getattr(whole, "vision_config", whole)
        if model.startswith("CLIP"):  # the size of the projection is that of the whole model
            vision.projection_dim = dim
        loaded: nn.Module = getattr(transformers, model).from_pretrained(
            path, config=vision, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # `read_description` has judged its config
        raise DamagedFileError(
            f"embedding.folder={folder}: cannot be loaded ({error}); download the whole model again"
        ) from None
    return loaded


def _mean_std(folder: str, model: str) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation that pixels are normalised with, (C, 1, 1) each.

    Raises:
        ConfigError: the folder has others than numbers.
        DamagedFileError: preprocessor_config.json is not a JSON object.
    """
    default = (CLIP_MEAN, CLIP_STD) if model.startswith("CLIP") else ((0.5,) * 3, (0.5,) * 3)
    file = Path(folder).expanduser() / "preprocessor_config.json"
    values = read_optional(file, "download the whole model again") or {}
    given = (values.get("image_mean", default[0]), values.get("image_std", default[1]))
    try:
        mean, std = (torch.tensor([float(value) for value in row], device="cpu")[:, None, None] for row in given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: image_mean and image_std must be lists of numbers ({error})") from None
    return mean, std


def build(config: Config, dim: int) -> Clip:
    return Clip(config, dim)
