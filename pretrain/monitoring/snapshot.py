"""Snapshots: one micro-batch with mask, targets, predictions and frames, for figures and audio. No extra compute.

A forward hook on the objective obtains batch and encoder output; targets and predictions are in the objective's record.
Frames of the micro-batches that follow it in the update are kept as well, so that several speakers are among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.objectives import LossOutput, Objective

MICRO_BATCHES = 4
"""Micro-batches of one rank whose frames are kept."""


@dataclass(frozen=True)
class LabelledFrames:
    """Frames (B, F, D) of the last layer of one micro-batch, on the CPU, and its labels as in `Batch`."""

    keys: tuple[str, ...]
    lengths_B: Tensor
    labels: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, Tensor]
    frames_BFD: Tensor
    frame_lengths_B: Tensor

    @classmethod
    def of(cls, batch: Batch, encoded: EncoderOutput) -> LabelledFrames:
        """Copies them from the device."""
        targets = {name: target.cpu() for name, target in batch.targets.items()}
        frames_BFD, frame_lengths_B = encoded.final.x_BFD.detach().float().cpu(), encoded.lengths_B.cpu()
        return cls(batch.keys, batch.lengths_B, batch.labels, targets, frames_BFD, frame_lengths_B)


@dataclass(frozen=True)
class Snapshot:
    """One micro-batch, on the CPU. targets_N, predictions_N: units of the masked frames, row by row; None: no units."""

    batch: Batch
    mask_BF: Tensor
    targets_N: Tensor | None
    predictions_N: Tensor | None
    frames_BFD: Tensor
    frame_lengths_B: Tensor
    rate_hz: float
    others: tuple[LabelledFrames, ...] = ()
    """Frames of further micro-batches."""


class SnapshotHook:
    """Takes a Snapshot of the first micro-batch after `arm`, with the frames of some that follow."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._armed = objective, False
        self._passes: list[tuple[Batch, EncoderOutput]] = []
        objective.register_forward_hook(self._seen)

    def arm(self) -> None:
        """Requests a snapshot of the next forward passes."""
        self._armed, self._passes = True, []
        self._objective.record_next()

    def take(self) -> Snapshot | None:
        """Returns the snapshot taken since `arm`; None if no forward pass has run."""
        passes, last = self._passes, self._objective.monitoring().last
        self._armed, self._passes = False, []
        if not passes or last is None:
            return None
        (batch, encoded), *others = passes
        targets, predictions = (
            None if units is None else units.cpu() for units in (last.target_units_N, last.predicted_units_N)
        )
        frames = encoded.final
        return Snapshot(
            batch=batch.to("cpu"),
            mask_BF=last.mask_BF.cpu(),
            targets_N=targets,
            predictions_N=predictions,
            frames_BFD=frames.x_BFD.detach().float().cpu(),
            frame_lengths_B=frames.lengths_B.cpu(),
            rate_hz=encoded.rate_hz,
            others=tuple(LabelledFrames.of(*further) for further in others),
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _seen(
        self, objective: Objective, arguments: tuple[object, Batch], output: tuple[LossOutput, EncoderOutput]
    ) -> None:
        if self._armed and len(self._passes) < MICRO_BATCHES and not arguments[1].is_empty:
            encoded = output[1]
            detached = tuple(layer.detach() for layer in encoded.layers[-1:])
            self._passes.append((arguments[1], encoded._replace(layers=detached, ffn_layers=())))
