"""Keeps what one micro-batch looked like on its way through a training step: mask, units, last layer. No extra compute.

It listens to what objectives have in common. Targets: the plan's `labels_N`, the method `find_units`, `clusters` or
`labels`, or else `quantizers`. Predictions: the last of `classifiers`; where `project_prediction` is compared with
`project_target`, the unit of the masked frame of the same utterance whose target lies nearest. An objective without
them still gets its mask and its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.self_supervision.masking import FrameMask
from pretrain.train_module import TrainModule, TrainPlan

NAMING = ("find_units", "clusters", "labels")
"""Methods that return units: of the masked frames (N,), of each layer's masked frames (L, N), or of all frames."""


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
                if isinstance(given := getattr(plan.plan, "labels_N", None), Tensor):
                    self._keep("targets", given)
            return plan

        module.prepare = watched_prepare  # type: ignore[method-assign]
        module.model.encoder.register_forward_hook(self._encoded)
        classifiers = getattr(objective, "classifiers", None)
        if isinstance(classifiers, nn.ModuleList) and len(classifiers):
            classifiers[-1].register_forward_hook(self._predicted)
        for name in ("project_prediction", "project_target"):
            if isinstance(part := getattr(objective, name, None), nn.Module):
                part.register_forward_hook(self._keeping(name))
        naming = [name for name in NAMING if callable(getattr(objective, name, None))]
        for name in naming:
            self._listen(objective, name)
        quantizers = getattr(objective, "quantizers", [])
        if not naming and len(quantizers):
            quantizers[-1].register_forward_hook(self._keeping("targets"))

    def take(self) -> Snapshot | None:
        """What was seen since arming; None where no step has run."""
        seen, self._seen, self.armed = self._seen, {}, False
        if "batch" not in seen or "frames" not in seen:
            return None
        mask = seen["mask"] if isinstance(seen["mask"], FrameMask) else None
        targets = _of_masked(seen.get("targets"), mask)
        predictions = _of_masked(seen.get("predictions"), mask)
        if predictions is None and targets is not None and {"project_prediction", "project_target"} <= seen.keys():
            assert mask is not None
            predictions = nearest_units(seen["project_prediction"], seen["project_target"], targets, mask)
        return Snapshot(
            seen["batch"].to("cpu"), mask, targets, predictions, seen["frames"], seen["lengths"], seen["rate_hz"]
        )

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

    def _keeping(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                self._keep(name, output)

        return hook

    def _listen(self, objective: nn.Module, name: str) -> None:
        method = getattr(objective, name)

        def watched(*arguments: Any) -> Tensor:
            units: Tensor = method(*arguments)
            self._keep("targets", units)
            return units

        setattr(objective, name, watched)


def _of_masked(units: Tensor | None, mask: FrameMask | None) -> Tensor | None:
    """Units of the masked frames, (N,), whatever NAMING they came by; None where they do not fit the mask."""
    if units is None or mask is None:
        return None
    if units.shape == mask.mask_BF.shape:
        units = units.flatten()[mask.flat_N.cpu()]
    units = units[-1] if units.dim() == 2 else units
    return units if len(units) == len(mask.flat_N) else None


def nearest_units(predictions_ND: Tensor, targets_ND: Tensor, units_N: Tensor, mask: FrameMask) -> Tensor:
    """For each masked frame the unit of the target that its prediction is nearest to, among those of its row, (N,)."""
    found_N = torch.full_like(units_N, -1)
    for row_M, valid_M in zip(mask.row_BM.cpu(), mask.valid_BM.cpu(), strict=True):
        frames = row_M[valid_M]
        if len(frames):
            predicted, targets = (F.normalize(x[frames].float(), dim=1) for x in (predictions_ND, targets_ND))
            found_N[frames] = units_N[frames[(predicted @ targets.T).argmax(1)]]
    return found_N
