"""The numerical condition of every export: a loaded copy gives the features of the model."""

from __future__ import annotations

from typing import Literal

from data_pipeline.core.schema import ConfigError

Format = Literal["hugging_face", "torchscript", "onnx", "onnx_stream", "onnx_synthesis", "wenet"]
TOLERANCE: dict[Format, float] = {
    "hugging_face": 1e-5,
    "torchscript": 1e-5,
    "onnx": 1e-4,
    "onnx_stream": 1e-4,
    "onnx_synthesis": 1e-4,
    "wenet": 1e-4,
}
"""Allowed difference: of Hugging Face models absolute, in double precision; of graphs relative to the largest value,
in fp32, where ONNX runtimes sum in another order than torch."""


def require_close(difference: float, kind: Format, what: str) -> None:
    """Raises ConfigError if an exported copy differs from the model by more than its format allows.

    Args:
        difference: the largest difference; inf or NaN where the copy cannot be compared.
        kind: the format.
        what: the copy, for the message.
    """
    if not difference <= TOLERANCE[kind]:
        raise ConfigError(
            f"{what}: the exported features differ by {difference:.1e} (allowed: {TOLERANCE[kind]:.0e}), so nothing "
            "was written"
        )
