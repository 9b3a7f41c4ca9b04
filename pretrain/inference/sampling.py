"""Writing by an attention decoder with random draws: temperature, nucleus, bounded length, no loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.models import Decoder, Memory

GRAM = 4
"""Length of the sequences of ids that are sampled again where they occurred before."""
REDRAWS = 4
"""Draws at a place; the last one stays, since speech does repeat itself."""


class NoEndError(RuntimeError):
    """The decoder did not write its end mark within the longest length."""


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    temperature: divides the logits; 0 takes the most probable id.  top_p: probability of the most probable ids among
    which is drawn.  seed: equal seeds give equal ids.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature:g}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p:g}: must be above 0 and at most 1")


@torch.inference_mode()
def sample(
    decoder: Decoder,
    memories: Sequence[Memory],
    *,
    start: int,
    end: int,
    bounds: tuple[int, int],
    sampling: Sampling,
) -> list[int]:
    """Returns the ids that the decoder writes for one row, without the marks.

    An id that completes a sequence of four that was written before is sampled again, up to four times.

    Args:
        decoder: reads `start` first, and gives logits of ids, `end` among them.
        memories: of one row each.
        start, end: the marks.
        bounds: fewest and most ids; the end mark cannot be drawn before the former.
        sampling: the draws.

    Raises:
        NoEndError: there is no end mark after the most ids.
    """
    least, most = bounds
    most = min(most, decoder.max_tokens - 1)
    state = decoder.start(memories)
    device = memories[0].x_BMD.device
    written: list[int] = []
    grams: set[tuple[int, ...]] = set()
    for place in range(most + 1):
        last = torch.tensor([written[-1] if written else start], device=device)
        logits_1V, state = decoder.step(state, last)
        scores_V = logits_1V[0].double().cpu().numpy()
        if place < least:
            scores_V[end] = -np.inf
        chosen = _draw(scores_V, written, grams, sampling)
        if chosen == end:
            return written
        written.append(chosen)
        grams.add(tuple(written[-GRAM:]))
    raise NoEndError(
        f"no end after {most} units, three times what the text suggests; take another seed, a lower temperature or "
        "top_p, or train longer"
    )


def _draw(
    scores_V: npt.NDArray[np.float64], written: list[int], grams: set[tuple[int, ...]], sampling: Sampling
) -> int:
    """Returns one id; draws are keyed by the seed and the place."""
    shares_V = nucleus(scores_V, sampling)
    rng = keyed_rng(sampling.seed, len(written), "sample")
    chosen = 0
    for _ in range(REDRAWS):
        chosen = int(np.searchsorted(shares_V.cumsum(), rng.random() * shares_V.sum(), side="right"))
        chosen = min(chosen, int(np.flatnonzero(shares_V)[-1]))
        gram = (*written[-GRAM + 1 :], chosen)
        if len(gram) < GRAM or gram not in grams:
            break
    return chosen


def nucleus(scores_V: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Returns probabilities of ids, (V,), 0 outside of the fewest most probable ones that reach `top_p` together.

    Args:
        scores_V: logits; −inf for ids that cannot be drawn.
        sampling: temperature and top_p.
    """
    made_V = np.zeros(len(scores_V), np.float64)
    if sampling.temperature == 0:
        made_V[scores_V.argmax()] = 1.0
        return made_V
    scaled_V = (scores_V - scores_V.max()) / sampling.temperature
    shares_V = np.exp(scaled_V)
    shares_V /= shares_V.sum()
    order_V = np.argsort(-shares_V, kind="stable")
    before_V = shares_V[order_V].cumsum() - shares_V[order_V]
    kept_V = order_V[before_V < sampling.top_p]
    made_V[kept_V] = shares_V[kept_V] / shares_V[kept_V].sum()
    return made_V
