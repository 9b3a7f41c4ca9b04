"""Teachers: frozen copies of a module, moved after the optimizer's step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.spectral import normalize_frames


class Teacher(nn.Module):
    """A copy of `source` that never trains and is always in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(source).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, source: nn.Module, decay: float, averaged: Callable[[str], bool] = lambda name: True) -> None:
        """weight ← decay · weight + (1 − decay) · source's; what is not `averaged`, and buffers, are copied."""
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
    """What of an encoder data2vec and DinoSR average: their positions are the student's (fairseq `ema_layers_only`)."""
    return not name.startswith("positions.")


def layer_teacher(model: SpeechModel) -> Teacher:
    """A teacher of the encoder that also gives the feed-forward output of every block."""
    teacher = Teacher(model.encoder)
    teacher.copy.keep_ffn = True  # type: ignore[assignment]
    return teacher


@torch.no_grad()
def averaged_layers(output: EncoderOutput, top: int) -> Tensor:
    """data2vec's target, (B, F, D) fp32: the last `top` feed-forward outputs, each normed over time, averaged."""
    chosen = output.ffn_layers[-top:]
    total = torch.zeros_like(chosen[0], dtype=torch.float32)
    for layer_BFD in chosen:
        total += normalize_frames(layer_BFD.float(), output.lengths_B)
    return total / len(chosen)


def deviation(x_ND: Tensor) -> Tensor:
    """Standard deviation over frames, averaged over channels: near 0 when all frames are alike, that is, collapsed."""
    if len(x_ND) < 2:
        return torch.zeros((), device=x_ND.device)
    return x_ND.detach().float().std(0).mean()


def annealed_decay(step: int, start: float, end: float, over_steps: int) -> float:
    """Linear from `start` at step 0 to `end` at `over_steps` (data2vec, §3.3)."""
    return end if step >= over_steps else start + (end - start) * step / over_steps


def _local(weight: Tensor) -> Tensor:
    """The weight, or under ZeRO-3 this rank's part of it: copies of one shape are cut alike."""
    part: Tensor = getattr(weight, "ds_tensor", weight.data)
    return part
