"""Small sets of weights that adapt a frozen model: LoRA, adapters, prompts and biases.

Layers replace `nn.Linear` and keep the names of its weights, so that a checkpoint of the base fits, and use all their
weights in their own `forward`, where ZeRO-3 gathers them. New ones give the base's outputs until they are trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.interfaces.configs import TuneConfig
from pretrain.interfaces.models import SpeechModel


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: W·x + b + (α / r)·B·A·x (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    Args:
        linear: the layer to replace, whose weights are shared.
        rank: r.
        alpha: α.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_a_RI = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b_OR = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a_RI, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:  # the name of torch
        """Returns the output, (…, O), for (…, I)."""
        update = F.linear(F.linear(input, self.lora_a_RI), self.lora_b_OR)
        return F.linear(input, self.weight, self.bias) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Returns the linear layer with the same outputs, whose weight contains the update."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        update_OI = self.scale * (self.lora_b_OR.double() @ self.lora_a_RI.double())
        linear.weight = nn.Parameter((self.weight.double() + update_OI).to(self.weight.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


class AdapterLinear(nn.Linear):
    """A linear layer and a bottleneck with a residual on its output: y + U·GELU(D·y) (Houlsby et al. 2019).

    Args:
        linear: the layer to replace, whose weights are shared.
        bottleneck: inner channels K of the adapter.
    """

    def __init__(self, linear: nn.Linear, bottleneck: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        new = linear.weight.new_zeros
        self.adapter_down_KO = nn.Parameter(new(bottleneck, linear.out_features))
        self.adapter_down_bias_K = nn.Parameter(new(bottleneck))
        self.adapter_up_OK = nn.Parameter(new(linear.out_features, bottleneck))
        self.adapter_up_bias_O = nn.Parameter(new(linear.out_features))
        nn.init.kaiming_uniform_(self.adapter_down_KO, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:  # the name of torch
        """Returns the output, (…, O), for (…, I)."""
        y = F.linear(input, self.weight, self.bias)
        inner = F.gelu(F.linear(y, self.adapter_down_KO, self.adapter_down_bias_K))
        return y + F.linear(inner, self.adapter_up_OK, self.adapter_up_bias_O)


ADDED = ("lora_a_RI", "lora_b_OR", "adapter_", "prompts_LPD")
"""Beginnings of the last part of the names of weights that a base does not have."""


def is_added(name: str) -> bool:
    """Returns whether a weight of a tuned model is one that its base does not have."""
    return name.rpartition(".")[2].startswith(ADDED)


def apply_tuning(model: SpeechModel, tune: TuneConfig) -> None:
    """Adds the weights of `tune` to front end and encoder and freezes what does not learn, in place.

    Args:
        model: with the weights of the base, or before they are loaded: names and shapes of the base's weights stay.
        tune: the kind of tuning, with its sizes.

    Raises:
        ValueError: the encoder has no such place, or the rank is larger than a matrix.
    """
    if tune.name == "full":
        return
    if tune.name == "prompt":
        model.encoder.add_prompts(tune.prompts)
    elif tune.name == "lora":
        for name, linear in _chosen(model.encoder, tune).items():
            model.encoder.set_submodule(name, LoRALinear(linear, tune.rank, tune.alpha))
    elif tune.name == "adapter":
        names = model.encoder.feed_forward_outputs()
        if not names:
            kind = type(model.encoder).__name__
            raise ValueError(f"tune.name=adapter: {kind} names no feed-forward parts; take lora, bias or head")
        for name in names:
            outer = model.encoder.get_submodule(name)
            assert isinstance(outer, nn.Linear)
            model.encoder.set_submodule(name, AdapterLinear(outer, tune.bottleneck))
    for name, parameter in model.named_parameters():
        learns = name.rpartition(".")[2] == "bias" if tune.name == "bias" else is_added(name)
        parameter.requires_grad_(learns)


def _chosen(encoder: nn.Module, tune: TuneConfig) -> dict[str, nn.Linear]:
    """Returns the linear layers that `tune.modules` names; those of the blocks that are large enough if it is empty.

    Raises:
        ValueError: a name has no layer, or the rank is larger than one of them allows, or than all of the blocks allow.
    """
    linear = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linear.items() if "blocks." in name} if not tune.modules else {}
    for wanted in tune.modules:
        fitting = {name: module for name, module in linear.items() if f".{name}".endswith(f".{wanted}")}
        if not fitting:
            known = sorted({name.partition("blocks.")[2].partition(".")[2] or name for name in linear})
            raise ValueError(
                f"tune.modules={list(tune.modules)}: there is no {wanted!r}; there are: {', '.join(known)}"
            )
        found |= fitting
    small = {name: module for name, module in found.items() if tune.rank > _least(module)}
    if small and (tune.modules or len(small) == len(found)):
        name, module = next(iter(small.items()))
        sides = f"{module.out_features} × {module.in_features}"
        raise ValueError(f"tune.rank={tune.rank}: must be at most {_least(module)}, since encoder.{name} is {sides}")
    return {name: module for name, module in found.items() if name not in small}


def _least(linear: nn.Linear) -> int:
    return min(linear.in_features, linear.out_features)


def learned_share(model: nn.Module) -> tuple[int, int]:
    """Returns the number of weights of front end and encoder that learn, and of all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)


def merge(model: nn.Module) -> None:
    """Replaces LoRA's layers by linear layers with the same outputs, in place; other layers stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
