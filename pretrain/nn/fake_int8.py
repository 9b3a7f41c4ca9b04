"""Training that anticipates INT8: linear layers whose weights and inputs are rounded as in an INT8 graph, by torchao.

`auricle export --int8` rounds weights to signed 8-bit integers with a scale per output channel, and inputs to 8-bit
integers with the range of the call. Here the same rounding runs in fp32, once per update, and its gradient is that of
the identity within the range (Jacob et al., arXiv 1712.05877), so that the weights adapt to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError


class FakeInt8Linear(nn.Linear):
    """A linear layer that can round its weight and input to 8 bits; it shares the parameters of the given one.

    Args:
        linear: the layer whose weight and bias are used.
    """

    def __init__(self, linear: nn.Linear) -> None:
        from torchao.quantization.qat import FakeQuantizerBase, IntxFakeQuantizeConfig

        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rounds = False
        """Whether the next call rounds."""
        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
        self._inputs: Any = FakeQuantizerBase.from_config(inputs)
        self._weights: Any = FakeQuantizerBase.from_config(weights)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs, (…, out); with `rounds`, each row of the batch has one range, as a call of a graph."""
        if not self.rounds:
            return F.linear(input, self.weight, self.bias)
        rounded: Tensor = self._inputs(input.float().reshape(len(input), -1)).reshape(input.shape)
        return F.linear(rounded, self._weights(self.weight), self.bias)


def int8_layers(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers that run in 8 bits: all but those of the front end.

    The front end's projection has little of the arithmetic and most of the error (docs/findings.md).
    """
    named = model.named_modules()
    return [name for name, module in named if isinstance(module, nn.Linear) and name.split(".")[0] != "frontend"]


def add_fake_int8(model: nn.Module) -> None:
    """Replaces the linear layers of `int8_layers` by layers that can round, in place; names of weights stay.

    Args:
        model: front end and encoder.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        import torchao.quantization.qat  # noqa: F401
    except ImportError:
        raise ConfigError("engine.fake_int8 needs torchao: pip install torchao") from None
    for name in int8_layers(model):
        module = model.get_submodule(name)
        if type(module) is nn.Linear:
            model.set_submodule(name, FakeInt8Linear(module))


def round_to_int8(model: nn.Module, on: bool) -> None:
    """Switches rounding on or off, in layers that `add_fake_int8` made."""
    for module in model.modules():
        if isinstance(module, FakeInt8Linear):
            module.rounds = on
