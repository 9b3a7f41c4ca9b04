"""Vectors for secure aggregation: a device's clipped update, of which the server learns the mean over devices alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.engines.base import SAMPLES
from pretrain.federated.messages import Answer

LARGEST_LOSS, LARGEST_SAMPLES = 100.0, 1e9
"""Losses per target and samples of audio are clipped to them."""


class Mean(NamedTuple):
    """Mean over devices: the update of each parameter (fp32), the loss, and the samples of audio."""

    update: dict[str, Tensor]
    loss: float
    samples: float


def packed(answer: Answer, clip: float) -> bytes:
    """Returns update, loss and samples of audio of a device as one vector of float32 between -1 and 1.

    An update is the gradient per target of the device's own, or the change of its weights, clipped to the norm `clip`
    and divided by it, so that Flower's steps are small beside it. Neither targets nor other metrics are in it.

    Raises:
        ValueError: it is not finite.
    """
    targets = max(float(answer.counts_K.sum()), 1.0)
    scale = 1.0 / targets if answer.kind == "gradient" else 1.0
    norm = scale * math.sqrt(sum(float(tensor.double().square().sum()) for tensor in answer.update.values()))
    loss = answer.loss * scale
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise ValueError("its update or loss has values that are not finite")
    factor = scale * min(1.0, clip / max(norm, 1e-12)) / clip
    parts = [answer.update[name].reshape(-1).cpu() * factor for name in sorted(answer.update)]
    samples = float(answer.totals[SAMPLES][0].sum()) if SAMPLES in answer.totals else 0.0
    parts.append(torch.tensor([loss / LARGEST_LOSS, samples / LARGEST_SAMPLES]).clamp(-1.0, 1.0))
    return torch.cat(parts).float().numpy().astype("<f4").tobytes()


def unpacked(mean: bytes, shapes: Mapping[str, torch.Size], clip: float) -> Mean:
    """Returns the parts of a mean of vectors, given as float64 in bytes.

    Raises:
        ValueError: it has another length, or values that are not finite.
    """
    wanted = sum(shape.numel() for shape in shapes.values()) + 2
    if len(mean) != 8 * wanted:
        raise ValueError(f"the mean has {len(mean)} bytes, and {8 * wanted} were expected")
    values = torch.frombuffer(bytearray(mean), dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the mean has values that are not finite")
    update, first = {}, 0
    for name in sorted(shapes):
        last = first + shapes[name].numel()
        update[name] = (values[first:last] * clip).float().reshape(shapes[name])
        first = last
    return Mean(update, float(values[-2]) * LARGEST_LOSS, float(values[-1]) * LARGEST_SAMPLES)
