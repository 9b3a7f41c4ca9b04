"""Embedding of images: square patches, each by one linear map, with learned positions (ViT, arXiv 2010.11929)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import EmbeddingConfig
from pretrain.interfaces.frames import Frames
from pretrain.interfaces.models import Embedding
from pretrain.nn.image_inputs import image_numbers, images_present, pixels_of


@config
class Config(EmbeddingConfig):
    name: Literal["patches"] = "patches"
    size: Annotated[int, about("side of the images in pixels, as data.images.size", ge=1, le=4096)] = 224
    channels: Annotated[Literal[1, 3], about("1: grey, 3: RGB, as data.images.channels")] = 3
    patch: Annotated[int, about("side of a patch in pixels; must divide size", ge=1)] = 16

    def __post_init__(self) -> None:
        if self.size % self.patch:
            refuse("patch", self.patch, f"must divide size={self.size}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """`size` and `channels`."""
        return self.size, self.channels


class Patches(Embedding):
    """Vectors of patches; one frame per patch, row by row. Pixels are scaled to [-1, 1]."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.frames = (config.size // config.patch) ** 2
        # not Conv2d, whose 16-bit kernels are wrong on some CPUs for even kernels of few channels
        self.project = nn.Linear(config.channels * config.patch**2, dim)
        self.positions_FD = nn.Parameter(torch.randn(self.frames, dim) * 0.02)

    def present(self, batch: Batch) -> Tensor:
        return images_present(batch)

    def identity(self, batch: Batch) -> Tensor:
        return image_numbers(batch, self.config.size, self.config.channels)

    def forward(self, batch: Batch) -> Frames:
        pixels_BCHW = pixels_of(batch, self.config.size, self.config.channels)
        pixels_BCHW = pixels_BCHW.to(self.positions_FD.device, non_blocking=True).to(self.positions_FD.dtype)
        patches_BFK = F.unfold(pixels_BCHW / 127.5 - 1, self.config.patch, stride=self.config.patch).transpose(1, 2)
        x_BFD = self.project(patches_BFK) + self.positions_FD
        present_B = self.present(batch)
        return Frames(x_BFD * present_B.to(x_BFD.device)[:, None, None], present_B * self.frames, 1.0)


def build(config: Config, dim: int) -> Patches:
    return Patches(config, dim)
