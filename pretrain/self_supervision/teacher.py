"""EMA teachers: frozen copies of a module that follow it after each optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.spectral import normalize_frames


class Teacher(nn.Module):
    """A copy of `source` without gradients, always in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(source).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, source: nn.Module, decay: float, averaged: Callable[[str], bool] = lambda name: True) -> None:
        """Updates the teacher: weight ← decay · weight + (1 − decay) · source's weight.

        Args:
            source: the trained module.
            decay: EMA decay, 0 … 1.
            averaged: whether the weight of this name is averaged; other weights and all buffers are copied.
        """
        theirs = dict(source.named_parameters())
        for name, weight in self.copy.named_parameters():
            mine, other = _local(weight), _local(theirs[name])
            if averaged(name):
                mine.lerp_(other.to(mine.dtype), 1 - decay)
            else:
                mine.copy_(other)
        for mine, other in zip(self.copy.buffers(), source.buffers(), strict=True):
            mine.copy_(other)


def all_but_positions(name: str) -> bool:
    """Returns whether data2vec and DinoSR average this weight of the encoder: all but positions (`ema_layers_only`)."""
    return not name.startswith("positions.")


def layer_teacher(model: SpeechModel) -> Teacher:
    """Returns a teacher of the encoder that also outputs the feed-forward part of every block."""
    teacher = Teacher(model.encoder)
    teacher.copy.keep_ffn = True  # type: ignore[assignment]
    return teacher


@torch.no_grad()
def averaged_layers(output: EncoderOutput, top: int) -> Tensor:
    """Returns data2vec's target (arXiv 2202.03555, §3.3): the average of the last `top` feed-forward outputs, each
    normalised over time per channel, (B, F, D) fp32."""
    chosen = output.ffn_layers[-top:]
    total = torch.zeros_like(chosen[0], dtype=torch.float32)
    for layer_BFD in chosen:
        total += normalize_frames(layer_BFD.float(), output.lengths_B)
    return total / len(chosen)


def deviation(x_ND: Tensor) -> Tensor:
    """Returns the standard deviation over frames, averaged over channels; near 0 for collapsed frames."""
    if len(x_ND) < 2:
        return torch.zeros((), device=x_ND.device)
    return x_ND.detach().float().std(0).mean()


def annealed_decay(step: int, start: float, end: float, over_steps: int) -> float:
    """Returns the decay of a step: linear from `start` at step 0 to `end` at `over_steps` (data2vec, §3.3)."""
    return end if step >= over_steps else start + (end - start) * step / over_steps


def _local(weight: Tensor) -> Tensor:
    """Returns the weight, or under ZeRO-3 this rank's partition; copies of one shape are partitioned alike."""
    part: Tensor = getattr(weight, "ds_tensor", weight.data)
    return part
