"""Draws masks and negatives on the host, keyed by (seed, step, segment), independent of ranks and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.models import Frontend
from pretrain.interfaces.objectives import MicroBatchPlan


@dataclass(frozen=True, slots=True)
class FrameMask:
    """The masked frames of a micro-batch.

    mask_BF: bool.  flat_N: the masked frames as indices into B·F, row by row.
    row_BM: the masked frames of each row as indices into N, padded with 0 to the longest row (M ≥ 1).
    valid_BM: True for entries of row_BM that are masked frames, False for padding.
    """

    mask_BF: Tensor
    flat_N: Tensor
    row_BM: Tensor
    valid_BM: Tensor

    @property
    def counts_B(self) -> Tensor:
        """Number of masked frames of each row."""
        return self.valid_BM.sum(1)

    @property
    def count(self) -> Tensor:
        """Total number of masked frames, a float64 scalar on the host."""
        return torch.tensor(float(len(self.flat_N)), dtype=torch.float64)


@dataclass
class MaskedPlan(MicroBatchPlan):
    """The draws of an objective that masks frames of each row once."""

    mask: FrameMask
    count: Tensor

    @property
    def masked_BF(self) -> Tensor:
        return self.mask.mask_BF


def span_mask(length: int, prob: float, span: int, rng: np.random.Generator, min_spans: int = 2) -> np.ndarray:
    """Draws the masked frames of one utterance, in spans that may overlap.

    int(prob · length / span + U[0, 1)) spans, at least `min_spans`; starts without replacement, overlap allowed
    (fairseq `compute_mask_indices`, "static"). fairseq then trims all rows of a batch to the shortest count; this
    function does not, because a row's mask must not depend on its neighbours. Spans that cover the whole utterance
    leave one frame visible, so an utterance of one frame has no mask.

    Args:
        length: number of frames.
        prob: share of frames in spans, counted before overlaps.
        span: frames per span.
        rng: generator of the draws.
        min_spans: least number of spans.

    Returns:
        bool (length,), True where masked.
    """
    mask = np.zeros(length, dtype=bool)
    span = min(span, max(length - 1, 0))
    if span == 0:
        return mask
    starts = length - span + 1
    n_spans = min(max(int(prob * length / span + rng.random()), min_spans), starts)
    first = rng.choice(starts, n_spans, replace=False)
    mask[(first[:, None] + np.arange(span)).ravel()] = True
    return keep_one_visible(mask, rng)


def keep_one_visible(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unmasks one frame, drawn from `rng`, if the mask covers the whole utterance; returns the mask.

    Without a visible frame the encoder has nothing to predict from. `rng` is not used for other masks.
    """
    if len(mask) and mask.all():
        mask[rng.integers(len(mask))] = False
    return mask


def block_mask(length: int, share: float, block: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the masked frames of one utterance, in blocks that do not overlap.

    int(share · length / block + U[0, 1)) blocks, at least one, on a grid of `block` frames (SpeechBrain's BEST-RQ
    `compute_mask`). A mask that would cover the whole utterance leaves one frame visible.

    Args:
        length: number of frames.
        share: share of masked frames.
        block: frames per block.
        rng: generator of the draws.

    Returns:
        bool (length,), True where masked.
    """
    mask = np.zeros(length, dtype=bool)
    block = min(block, max(length, 1))
    grid = length // block
    n_blocks = min(max(int(share * length / block + rng.random()), 1), grid)
    first = rng.permutation(grid)[:n_blocks] * block
    mask[(first[:, None] + np.arange(block)).ravel()] = True
    return keep_one_visible(mask, rng)


def adjusted_block_mask(
    length: int, prob: float, adjust: float, block: int, rng: np.random.Generator, inverse: bool = False
) -> np.ndarray:
    """Draws the masked frames of one utterance, in blocks that may overlap.

    Follows fairseq's `compute_block_mask_1d` (data2vec 2.0, arXiv 2212.07525, §3.2):

    int(length · (prob + adjust) / block) blocks around centres drawn with replacement, cut at the ends; then single
    frames are masked or unmasked until int(prob · length) are masked, at least one, and at least one is visible.
    `inverse`: the same for the visible frames, with 1 − prob.

    Args:
        length: number of frames.
        prob: share of masked frames.
        adjust: added to the share that blocks cover, against overlaps.
        block: frames per block.
        rng: generator of the draws.
        inverse: whether blocks are of visible frames.

    Returns:
        bool (length,), True where masked.
    """
    share = 1 - prob if inverse else prob
    covered = np.zeros(length, dtype=bool)
    if length == 0:
        return covered
    centres = rng.integers(0, length, max(1, int(length * (share + adjust) / block)))
    covered[np.clip(centres[:, None] + np.arange(block) - block // 2, 0, length - 1).ravel()] = True
    # at least one frame stays visible, even if the utterance has only one
    wanted = min(max(int(length * share), 1), max(length - 1, int(inverse)))
    surplus = int(covered.sum()) - wanted
    side = np.flatnonzero(covered if surplus > 0 else ~covered)
    covered[rng.choice(side, abs(surplus), replace=False)] = surplus < 0
    return ~covered if inverse else covered


def pack_masks(masks: Sequence[np.ndarray], width: int, device: torch.device) -> FrameMask:
    """Combines the masks of utterances to the mask of a micro-batch.

    Args:
        masks: bool (length,) for each of B utterances, of any lengths.
        width: number of frames F of the padded batch.
        device: where the result is stored.
    """
    mask_BF = np.zeros((len(masks), width), dtype=bool)
    for row, mask in enumerate(masks):
        mask_BF[row, : len(mask)] = mask
    counts = mask_BF.sum(1)
    valid_BM = np.arange(max(1, counts.max())) < counts[:, None]
    row_BM = np.zeros(valid_BM.shape, dtype=np.int64)
    row_BM[valid_BM] = np.arange(counts.sum())
    arrays = (mask_BF, np.flatnonzero(mask_BF), row_BM, valid_BM)
    return FrameMask(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def draw_frame_mask(
    frontend: Frontend,
    batch: Batch,
    ctx: StepContext,
    draw: Callable[[int, np.random.Generator], np.ndarray],
    purpose: str = "mask",
) -> FrameMask:
    """Draws masks over the encoder frames of `batch`.

    Args:
        frontend: for the number of frames of each utterance.
        batch: one micro-batch.
        ctx: seed and step.
        draw: returns the mask of one utterance, bool (length,), from its number of frames and a generator that is
            keyed by (seed, step, segment key, purpose).
        purpose: key of the draw, for objectives with several.
    """
    lengths = frontend.frame_lengths(batch.lengths_B).tolist()
    masks = [
        draw(length, keyed_rng(ctx.seed, ctx.step, key, purpose))
        for length, key in zip(lengths, batch.keys, strict=True)
    ]
    return pack_masks(masks, frame_width(frontend, batch), batch.wave_BT.device)


def frame_width(frontend: Frontend, batch: Batch) -> int:
    """Returns the number of encoder frames F of the padded batch."""
    return int(frontend.frame_lengths(torch.tensor([batch.wave_BT.shape[1]])))


def draw_negatives(mask: FrameMask, keys: Sequence[str], ctx: StepContext, n_negatives: int) -> Tensor:
    """Returns for each masked frame `n_negatives` other masked frames of its utterance, (B, M, K), positions within M.

    Drawn with replacement, without the frame itself (fairseq `sample_negatives`). Rows with one masked frame or none
    get position 0, the positive itself, which the loss excludes.

    Args:
        mask: the masked frames.
        keys: keys of the B segments.
        ctx: seed and step that key the draws.
        n_negatives: K.
    """
    counts = mask.counts_B.tolist()
    drawn = np.zeros((len(keys), mask.row_BM.shape[1], n_negatives), dtype=np.int64)
    for row, (count, key) in enumerate(zip(counts, keys, strict=True)):
        if count < 2:
            continue
        others = keyed_rng(ctx.seed, ctx.step, key, "negatives").integers(0, count - 1, (count, n_negatives))
        drawn[row, :count] = others + (others >= np.arange(count)[:, None])
    return torch.from_numpy(drawn).to(mask.mask_BF.device, non_blocking=True)


def draw_span_mask(
    frontend: Frontend, batch: Batch, ctx: StepContext, prob: float, span: int, least: int = 1
) -> FrameMask:
    """Draws masks of spans, see `span_mask`; rows with fewer than `least` masked frames are not masked.

    Args:
        frontend: for the number of frames of each utterance.
        batch: one micro-batch.
        ctx: seed and step that key the draws.
        prob: share of frames in spans, counted before overlaps.
        span: encoder frames per span.
        least: fewest masked frames of a row. A contrastive objective needs 2: a single one has no negative.
    """

    def draw(length: int, rng: np.random.Generator) -> np.ndarray:
        mask = span_mask(length, prob, span, rng)
        return mask if mask.sum() >= least else np.zeros_like(mask)

    return draw_frame_mask(frontend, batch, ctx, draw)
