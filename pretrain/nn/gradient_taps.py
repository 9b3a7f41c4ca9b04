"""Measures the gradient of each task at the encoder's output, in the ordinary backward pass.

It accesses no parameter, so that it works where weights are partitioned (ZeRO-3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.frames import EncoderOutput


class NoTaps:
    """Measures nothing."""

    def objective(self) -> contextlib.AbstractContextManager[None]:
        """Encloses the objective's passes."""
        return contextlib.nullcontext()

    def head(self, name: str, encoded: EncoderOutput, shared: bool = False) -> EncoderOutput:
        """Returns the input of head `name`, and measures the head's gradient at it.

        Args:
            name: the head's.
            encoded: the encoder's output, (B, F, D) per layer.
            shared: whether `encoded` is of the objective's own pass.
        """
        return encoded

    def squares(self, loss: Tensor) -> Tensor | None:
        """Returns a tensor (K,) that holds ‖∂L/∂h‖² of each task after the backward pass of `loss`, float64."""
        return None


class GradientTaps(NoTaps):
    """Records ‖∂L/∂h‖² of each task, where h are the layers that a head reads, and the last one for the objective.

    A hook at the encoder's output measures the sum of all; the objective's part is that without those of the heads that
    read the same pass.

    Args:
        encoder: the model's encoder, whose output all tasks use.
        tasks: names of the K tasks, the objective's "objective" and those of the heads.
    """

    def __init__(self, encoder: nn.Module, tasks: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._squares_K: Tensor | None = None
        self._shared: list[Tensor] = []
        self._listening = False
        encoder.register_forward_hook(self._at_output)

    @contextlib.contextmanager
    def objective(self) -> Iterator[None]:
        self._squares_K, self._shared, self._listening = None, [], True
        try:
            yield
        finally:
            self._listening = False

    def _at_output(self, module: nn.Module, given: Any, encoded: EncoderOutput) -> None:
        last = encoded.layers[-1]
        if not self._listening or not last.requires_grad:
            return
        square, shared = self.squares(last)[self._tasks.index("objective")], self._shared

        def measure(grad: Tensor) -> None:
            total = grad.detach().double()
            for part in shared:
                if part.shape != total.shape:
                    raise ConfigError(
                        "balance: the gradient of this objective cannot be separated from that of heads which read "
                        "its pass; set heads.NAME.input=whole, or balance.name=fixed and balance.measure=false"
                    )
                total = total - part
            square.add_(total.square().sum())

        last.register_hook(measure)  # type: ignore[no-untyped-call]

    def head(self, name: str, encoded: EncoderOutput, shared: bool = False) -> EncoderOutput:
        layers = [layer.view_as(layer) for layer in encoded.layers]
        for number, layer in enumerate(layers):
            if layer.requires_grad:
                square = self.squares(layer)[self._tasks.index(name)]
                self._tap(layer, square, shared and number == len(layers) - 1)
        return encoded._replace(layers=tuple(layers))

    def _tap(self, layer: Tensor, square: Tensor, kept: bool) -> None:
        parts = self._shared

        def measure(grad: Tensor) -> None:
            square.add_(grad.detach().double().square().sum())
            if kept:
                parts.append(grad.detach().double())

        layer.register_hook(measure)  # type: ignore[no-untyped-call]

    def squares(self, loss: Tensor) -> Tensor:
        if self._squares_K is None:
            self._squares_K = torch.zeros(len(self._tasks), dtype=torch.float64, device=loss.device)
        return self._squares_K
