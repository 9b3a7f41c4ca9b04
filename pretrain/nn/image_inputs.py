"""Images of a batch as embeddings read them."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.core.types import IMAGE, Batch
from pretrain.nn.numerics import row_numbers


def images_present(batch: Batch) -> Tensor:
    """Returns which samples have an image, (B,) bool."""
    if IMAGE in batch.images:
        return batch.images[IMAGE].present_B
    return torch.zeros_like(batch.lengths_B, dtype=torch.bool)


def image_numbers(batch: Batch, side: int, channels: int) -> Tensor:
    """Returns a number for each sample's image, (B,) int64, equal for equal images; 0 without one."""
    return row_numbers(pixels_of(batch, side, channels).flatten(1).long() + 1) * images_present(batch)


def pixels_of(batch: Batch, side: int, channels: int) -> Tensor:
    """Returns the pixels, (B, channels, side, side) uint8; black where there is no image.

    Raises:
        ValueError: they have another size.
    """
    wanted = (channels, side, side)
    if IMAGE not in batch.images:
        return torch.zeros(len(batch.keys), *wanted, dtype=torch.uint8)
    pixels_BCHW = batch.images[IMAGE].pixels_BCHW
    if pixels_BCHW.shape[1:] != wanted:
        raise ValueError(f"images of (channels, height, width) {tuple(pixels_BCHW.shape[1:])} instead of {wanted}")
    return pixels_BCHW
