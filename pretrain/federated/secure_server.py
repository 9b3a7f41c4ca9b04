"""The engine of a federated run with secure aggregation: the server learns the mean update, and no device's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from pretrain.engines.base import SAMPLES
from pretrain.federated.secure import unpacked
from pretrain.federated.server import ABSENT, Exchanged, FederatedEngine
from pretrain.interfaces.frames import StepContext


class SecureEngine(FederatedEngine):
    """A `FederatedEngine` whose devices mask their clipped updates for each other (Flower's SecAgg+).

    Devices have equal weights. Since nothing of a single device is seen, a wrong update cannot be distinguished from
    others; the clip norm bounds what it does.

    Raises:
        ConfigError: there are several tasks.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if len(self.module.tasks) > 1:
            raise ConfigError(
                f"engine.federated.secure=true: {len(self.module.tasks)} tasks ({', '.join(self.module.tasks)}), and "
                "secure aggregation gives the loss of one; remove heads, or set objective=none and one head"
            )

    def _exchange(self, ctx: StepContext, exchange: Exchanged) -> tuple[int, Tensor, dict[str, list[Tensor]]]:
        """Asks until enough devices are in the mean; leaves it, or its negative for changes, in the gradients."""
        settings = self.settings
        drawn: list[str] = []
        for attempt in range(settings.attempts):
            exchange.attempts += 1
            drawn = self._draw(ctx, attempt)
            ones = torch.ones(len(self.module.tasks), dtype=torch.float64)
            message = self._request(self.kind, ctx, attempt, ones, settings.clip)[0].encoded()
            exchange.asked += len(drawn)
            exchange.sent += len(message) * len(drawn)
            self.on_phase("devices")
            included, mean = self._devices.sum(drawn, message, settings.answer_seconds, settings.min_devices)
            exchange.received += len(mean) * len(included)  # masked values as int64, without the shares of keys
            for name in sorted(set(drawn) - set(included)):
                exchange.left_out += 1
                self._note(ctx.step, name, ABSENT)
            if len(included) >= settings.min_devices:
                return len(included), *self._leave(mean, len(included))
        raise self._too_few(ctx, drawn)

    def _leave(self, mean: bytes, devices: int) -> tuple[Tensor, dict[str, list[Tensor]]]:
        shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        found = unpacked(mean, shapes, self.settings.clip)
        self._sum([found.update], [-1.0 if self.kind == "delta" else 1.0])
        loss, heard, one = torch.tensor([[found.loss], [found.samples * devices], [1.0]], dtype=torch.float64)
        return loss[0], {f"loss/{self.module.tasks[0]}": [loss, one[0]], SAMPLES: [heard, devices * one[0]]}
