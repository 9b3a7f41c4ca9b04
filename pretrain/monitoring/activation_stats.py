"""Statistics of every stage's output during training: deviation over batch and time, and RankMe. Forward hooks only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.monitoring.detectors import rank_me
from pretrain.train_module import TrainModule

MAX_FRAMES = 512
"""Frames that RankMe is computed from."""


class ActivationStats:
    """Measures the first forward pass after `arm`: features, stem and every layer of the encoder."""

    def __init__(self, module: TrainModule) -> None:
        self.armed = False
        self._objective = module.objective
        self._deviations: dict[str, float] = {}
        self._ranks: dict[str, float] = {}
        model = module.model
        model.features.register_forward_hook(self._hook("features"))
        model.frames.register_forward_hook(self._hook("stem"))
        model.encoder.register_forward_hook(self._encoded)

    def arm(self) -> None:
        """Requests the measurement of the next forward pass, and of the objective's targets in it."""
        self.armed = True
        self._objective.record_next()

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the deviations and ranks by stage and clears them."""
        taken = self._deviations, self._ranks
        self._deviations, self._ranks, self.armed = {}, {}, False
        return taken

    def target_inputs(self) -> tuple[float, float] | None:
        """Returns mean and deviation of the input of a fixed quantiser of targets; None if the objective has none."""
        last = self._objective.monitoring().last
        if last is None or last.target_inputs_XD is None or len(last.target_inputs_XD) < 2:
            return None
        inputs_XD = last.target_inputs_XD.float()
        return float(inputs_XD.mean()), float(inputs_XD.std())

    def _hook(self, stage: str) -> Callable[[nn.Module, object, Frames], None]:
        def hook(module: nn.Module, arguments: object, frames: Frames) -> None:
            self._note(stage, frames.x_BFD, frames.valid_BF())

        return hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encoded(self, encoder: nn.Module, arguments: object, encoded: EncoderOutput) -> None:
        valid_BF = encoded.final.valid_BF()
        for number, x_BFD in enumerate(encoded.layers[1:], 1):
            self._note(f"layer_{number}", x_BFD, valid_BF)

    @torch.no_grad()
    def _note(self, stage: str, x_BFD: Tensor, valid_BF: Tensor) -> None:
        if not self.armed or stage in self._deviations:
            return
        x_ND = x_BFD.detach()[valid_BF].float()
        if len(x_ND) < 2:
            return
        self._deviations[stage] = float(x_ND.std(0).mean())
        if stage.startswith("layer") and bool(torch.isfinite(x_ND).all()):
            kept = x_ND[:: max(1, len(x_ND) // MAX_FRAMES)][:MAX_FRAMES]
            self._ranks[stage] = rank_me(kept.cpu().numpy())
