"""Snapshots: one micro-batch with mask, targets, predictions and frames, for figures and audio. No extra compute.

A forward hook on the objective obtains batch and encoder output; targets and predictions are in the objective's record.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.objectives import LossOutput, Objective


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


class SnapshotHook:
    """Takes a Snapshot of the first micro-batch after `arm`."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._armed = objective, False
        self._batch: Batch | None = None
        self._encoded: EncoderOutput | None = None
        objective.register_forward_hook(self._seen)

    def arm(self) -> None:
        """Requests a snapshot of the next forward pass."""
        self._armed, self._batch, self._encoded = True, None, None
        self._objective.record_next()

    def take(self) -> Snapshot | None:
        """Returns the snapshot taken since `arm`; None if no forward pass has run."""
        batch, encoded, last = self._batch, self._encoded, self._objective.monitoring().last
        self._armed, self._batch, self._encoded = False, None, None
        if batch is None or encoded is None or last is None:
            return None
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
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _seen(
        self, objective: Objective, arguments: tuple[object, Batch], output: tuple[LossOutput, EncoderOutput]
    ) -> None:
        if self._armed and self._batch is None:
            encoded = output[1]
            detached = tuple(layer.detach() for layer in encoded.layers[-1:])
            self._batch, self._encoded = arguments[1], encoded._replace(layers=detached, ffn_layers=())
