"""What every stage of a model gives, while it trains: deviation over batch and time, and RankMe."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.monitoring.detectors import rank_me
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer
from pretrain.train_module import TrainModule

MAX_FRAMES = 512
"""Frames that RankMe is computed from."""


class StageGauge:
    """Measures the first micro-batch after it was armed: features, stem, every layer, and what fixed targets come from.

    The front end has two stages that objectives call directly, so these are wrapped; the encoder gets a forward hook.
    """

    def __init__(self, module: TrainModule) -> None:
        self.armed = False
        self._deviations: dict[str, float] = {}
        self._ranks: dict[str, float] = {}
        self.target_inputs: tuple[float, float] | None = None
        """Mean and deviation of what a random-projection quantiser was given last, while armed."""
        frontend = module.model.frontend
        extract, project = frontend.extract, frontend.project

        def watched_extract(wave_BT: Tensor, lengths_B: Tensor) -> Frames:
            features = extract(wave_BT, lengths_B)
            self._note("features", features.x_BFD, features.valid_BF())
            return features

        def watched_project(features: Frames) -> Frames:
            frames = project(features)
            self._note("stem", frames.x_BFD, frames.valid_BF())
            return frames

        frontend.extract = watched_extract  # type: ignore[method-assign]
        frontend.project = watched_project  # type: ignore[method-assign]
        module.model.encoder.register_forward_hook(self._encoded)
        for part in module.objective.modules():
            if isinstance(part, RandomProjectionQuantizer):
                part.register_forward_pre_hook(self._quantized)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Deviations and ranks by stage; empties the gauge."""
        taken = self._deviations, self._ranks
        self._deviations, self._ranks, self.armed = {}, {}, False
        return taken

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encoded(self, encoder: nn.Module, arguments: object, encoded: EncoderOutput) -> None:
        valid_BF = encoded.final.valid_BF()
        for number, x_BFD in enumerate(encoded.layers[1:], 1):
            self._note(f"layer_{number}", x_BFD, valid_BF)

    def _quantized(self, quantizer: nn.Module, arguments: tuple[Tensor]) -> None:
        if self.armed and len(arguments[0]) > 1:
            x_ND = arguments[0].detach().float()
            self.target_inputs = float(x_ND.mean()), float(x_ND.std())

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
