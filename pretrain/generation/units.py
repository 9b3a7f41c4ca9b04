"""Acoustic units of a text, and the text of units, by a trained head `units`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from pretrain.heads.units import Units
from pretrain.inference.sampling import Sampling, sample
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import Memory

SHORTEST, LONGEST = 0.3, 3.0
"""Bounds of the number of written ids, in parts of the predicted one."""


@torch.inference_mode()
def write(head: Units, ids: Sequence[int], prompt: EncoderOutput | None, sampling: Sampling) -> list[int]:
    """Returns what the head writes for a text's tokens, or for units: units without repetition, or tokens.

    Args:
        head: in evaluation mode.
        ids: what is read, one at least.
        prompt: the encoder's output for a recording of the voice, of which the first seconds are used; None: no prompt.
        sampling: the draws.

    Raises:
        ConfigError: there is nothing to read, or more than the head was trained with.
        NoEndError: the end mark was not written within three times the predicted length.
    """
    return _write(head, ids, prompt, sampling)[0]


@torch.inference_mode()
def unit_frames(
    head: Units, ids: Sequence[int], prompt: EncoderOutput | None, sampling: Sampling, speed: float = 1.0
) -> list[list[int]]:
    """Returns frame labels of every level for a text's tokens; arguments and errors as of `write`.

    Args:
        speed: rate of speech beside the learned one.

    Raises:
        ConfigError: also if the head writes text.
    """
    if not head.config.speaks:
        raise ConfigError("direction=units_to_text: this head writes text; train one with direction=text_to_units")
    written, memories = _write(head, ids, prompt, sampling)
    if not written:
        return [[] for _ in head.config.levels]
    first_1F = head.frames_of(torch.tensor([written], device=memories[0].x_BMD.device), speed)
    levels: list[Tensor] = head.refine(first_1F, memories)
    return [labels_1F[0].tolist() for labels_1F in levels]


@torch.inference_mode()
def read_units(head: Units, ids: Sequence[int], sampling: Sampling) -> tuple[list[int], float]:
    """Returns the tokens that the head writes for units, without a prompt, and the mean of their ln p.

    Arguments and errors as of `write`.
    """
    written, memories = _write(head, ids, None, sampling)
    device = memories[0].x_BMD.device
    read_1N = torch.tensor([[head.start, *written]], device=device)
    log_1NV = head.decoder(read_1N, memories).float().log_softmax(2)
    chosen_1N1 = torch.tensor([[*written, head.end]], device=device)[:, :, None]
    return written, float(log_1NV.gather(2, chosen_1N1).mean())


def _write(
    head: Units, ids: Sequence[int], prompt: EncoderOutput | None, sampling: Sampling
) -> tuple[list[int], tuple[Memory, Memory]]:
    if not 0 < len(ids) <= head.config.max_read:
        raise ConfigError(f"ids: there are {len(ids):,}, and 1 to max_read={head.config.max_read:,} are read; split it")
    read_1N = torch.tensor([list(ids)], device=head.from_prompt.weight.device)
    given = head.read(
        read_1N, torch.tensor([len(ids)]), head.no_prompt(1) if prompt is None else head.prompt_of(prompt)
    )
    predicted = math.expm1(min(float(given.log_length_B[0]), 12.0))
    bounds = max(1, math.floor(SHORTEST * predicted)), max(2, math.ceil(LONGEST * predicted))
    written = sample(head.decoder, given.memories, start=head.start, end=head.end, bounds=bounds, sampling=sampling)
    return written, given.memories
