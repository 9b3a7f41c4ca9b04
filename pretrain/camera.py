"""Keeps what one micro-batch looked like on its way through a training step: mask, units, last layer. No extra compute.

It listens to modules that objectives have in common: `classifiers` (predictions), and `quantizers`, `quantizer` or
`find_units` (targets). An objective without them still gets its mask and its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain.model import TrainModule, TrainPlan
from pretrain.nn.masking import FrameMask
from pretrain.types import EncoderOutput, StepContext


@dataclass(frozen=True)
class Snapshot:
    """One micro-batch, on the CPU. targets_N, predictions_N: units of the masked frames, row by row."""

    batch: Batch
    mask: FrameMask | None
    targets_N: Tensor | None
    predictions_N: Tensor | None
    frames_BFD: Tensor
    frame_lengths_B: Tensor
    rate_hz: float


class Camera:
    """Takes one Snapshot after it was armed."""

    def __init__(self, module: TrainModule) -> None:
        self.armed = False
        self._seen: dict[str, Any] = {}
        prepare, objective = module.prepare, module.objective

        def watched_prepare(batch: Batch, ctx: StepContext) -> TrainPlan:
            plan = prepare(batch, ctx)
            if self.armed and "batch" not in self._seen:
                self._seen |= {"batch": batch, "mask": getattr(plan.plan, "mask", None)}
            return plan

        module.prepare = watched_prepare  # type: ignore[method-assign]
        module.model.encoder.register_forward_hook(self._encoded)
        classifiers = getattr(objective, "classifiers", None)
        if isinstance(classifiers, nn.ModuleList) and len(classifiers):
            classifiers[-1].register_forward_hook(self._predicted)
        quantizers = getattr(objective, "quantizers", [getattr(objective, "quantizer", None)])
        if len(quantizers) and isinstance(quantizers[-1], nn.Module):
            quantizers[-1].register_forward_hook(self._quantized)
        if find := getattr(objective, "find_units", None):

            def watched_find(*arguments: Any) -> Tensor:
                units: Tensor = find(*arguments)
                self._keep("targets", units)
                return units

            objective.find_units = watched_find  # type: ignore[assignment]

    def take(self) -> Snapshot | None:
        """What was seen since arming; None where no step has run."""
        seen, self._seen, self.armed = self._seen, {}, False
        if "batch" not in seen or "frames" not in seen:
            return None
        mask = seen["mask"] if isinstance(seen["mask"], FrameMask) else None
        n_masked = len(mask.flat_N) if mask else -1
        units = {name: seen.get(name) for name in ("targets", "predictions")}
        whole = {name: unit if unit is not None and len(unit) == n_masked else None for name, unit in units.items()}
        return Snapshot(
            seen["batch"].to("cpu"), mask, whole["targets"], whole["predictions"],
            seen["frames"], seen["lengths"], seen["rate_hz"],
        )  # fmt: skip

    def _keep(self, name: str, value: Tensor) -> None:
        if self.armed and name not in self._seen:
            self._seen[name] = value.detach().cpu()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encoded(self, encoder: nn.Module, arguments: object, encoded: EncoderOutput) -> None:
        if self.armed and encoder.training:
            self._keep("frames", encoded.final.x_BFD.float())
            self._keep("lengths", encoded.lengths_B)
            self._seen["rate_hz"] = encoded.rate_hz

    def _predicted(self, classifier: nn.Module, arguments: object, logits_NK: Tensor) -> None:
        if self.armed:
            self._keep("predictions", logits_NK.argmax(-1))

    def _quantized(self, quantizer: nn.Module, arguments: object, output: Any) -> None:
        index = output if isinstance(output, Tensor) else getattr(output, "index_NG", None)
        if self.armed and isinstance(index, Tensor):
            self._keep("targets", index if index.dim() == 1 else index[:, 0])
