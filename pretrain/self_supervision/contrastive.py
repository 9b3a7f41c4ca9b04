"""InfoNCE over the masked frames of an utterance, without gathering a vector per negative; its monitoring record."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.interfaces.monitoring import CODE_COUNTS, MicroBatchRecord, MonitoringRecord, books_of
from pretrain.self_supervision.masking import FrameMask


def contrastive_record(sizes: tuple[int, ...], last: MicroBatchRecord | None) -> MonitoringRecord:
    """Returns the monitoring record of an objective with InfoNCE over masked frames.

    Args:
        sizes: number of codes or clusters of each book that the objective counts.
        last: the micro-batch recorded since `Objective.record_next`.
    """
    return MonitoringRecord(
        "loss/contrastive",
        "metric/accuracy",
        "metric/chance_loss",
        "metric/chance_accuracy",
        target_deviation="health/target_std",
        prediction_deviation="health/prediction_std",
        books=books_of(CODE_COUNTS, sizes),
        last=last,
    )


def contrast_logits(
    predictions_ND: Tensor,
    targets_ND: Tensor,
    cluster_N: Tensor,
    mask: FrameMask,
    negatives_BMK: Tensor,
    temperature: float,
) -> Tensor:
    """Returns the logits of InfoNCE (wav2vec 2.0, arXiv 2006.11477, eq. 3), (B, M, 1 + K) fp32.

    All pairs of an utterance's masked frames are compared in one matrix product, from which the negatives are selected;
    K vectors per frame are never gathered.

    Args:
        predictions_ND: predicted vectors of the N masked frames.
        targets_ND: their targets.
        cluster_N: int64 cluster or code of each frame; the logit of a negative from the positive's cluster is −∞.
        mask: positions of the N frames.
        negatives_BMK: int64 positions within M, as returned by `draw_negatives`.
        temperature: divisor of the cosine similarity.

    Returns:
        Entry 0 is the frame's own target; the rest are its negatives. Rows outside `mask.valid_BM` are undefined.
    """
    if len(predictions_ND) == 0:  # a micro-batch without a masked frame; one row of zeros keeps the graph connected
        predictions_ND, targets_ND = F.pad(predictions_ND, (0, 0, 0, 1)), F.pad(targets_ND, (0, 0, 0, 1))
        cluster_N = F.pad(cluster_N, (0, 1))
    rows_BM = mask.row_BM
    predicted_BMD = F.normalize(predictions_ND.float(), dim=-1)[rows_BM]
    target_BMD = F.normalize(targets_ND.float(), dim=-1)[rows_BM]
    cosine_BMM = predicted_BMD @ target_BMD.transpose(1, 2) / temperature
    cluster_BM = cluster_N[rows_BM]
    same_BMK = torch.gather(cluster_BM[:, None].expand_as(cosine_BMM), 2, negatives_BMK) == cluster_BM[:, :, None]
    negative_BMK = torch.gather(cosine_BMM, 2, negatives_BMK).masked_fill(same_BMK, float("-inf"))
    return torch.cat([cosine_BMM.diagonal(dim1=1, dim2=2)[:, :, None], negative_BMK], dim=2)


def contrastive_loss(logits_BMK: Tensor, valid_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the loss and the hits of InfoNCE.

    Ties do not count as correct, unlike in fairseq: a constant prediction would always be right.

    Args:
        logits_BMK: (B, M, 1 + K), from `contrast_logits`.
        valid_BM: True for rows that are masked frames.

    Returns:
        The summed cross-entropy of entry 0 over valid rows, and the number of valid rows in which it is the largest.
    """
    losses_BM = torch.logsumexp(logits_BMK, dim=2) - logits_BMK[:, :, 0]
    hits_BM = logits_BMK[:, :, 0] > logits_BMK[:, :, 1:].amax(2)
    return losses_BM.masked_fill(~valid_BM, 0.0).sum(), (hits_BM & valid_BM).sum().float()


@torch.no_grad()
def chance_levels(logits_BMK: Tensor, negatives_BMK: Tensor, valid_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the chance levels of InfoNCE.
    Both depend on a frame's remaining negatives: those of its own cluster are excluded, and a short utterance has fewer
    distinct ones than were drawn. The loss is log(1 + n) for n negatives as drawn, the probability 1 / (1 + d) for d
    distinct ones.

    Args:
        logits_BMK: (B, M, 1 + K), from `contrast_logits`.
        negatives_BMK: (B, M, K) positions within M.
        valid_BM: True for rows that are masked frames.

    Returns:
        The loss of equal logits, and the probability that a uniform guess is right, each summed over valid rows.
    """
    real_BMK = torch.isfinite(logits_BMK[:, :, 1:])
    B, M, _ = logits_BMK.shape
    distinct_BMM = real_BMK.new_zeros(B, M, M).scatter_(2, negatives_BMK, real_BMK)
    loss_BM = (1.0 + real_BMK.sum(2)).log()
    probability_BM = 1.0 / (1.0 + distinct_BMM.sum(2))
    return loss_BM.masked_fill(~valid_BM, 0.0).sum(), probability_BM.masked_fill(~valid_BM, 0.0).sum()


@torch.no_grad()
def nearest_units(predictions_ND: Tensor, targets_ND: Tensor, units_N: Tensor, mask: FrameMask) -> Tensor:
    """Finds the target nearest to each frame's prediction among the masked frames of its row.

    Args:
        predictions_ND: predicted vectors of the N masked frames.
        targets_ND: their targets.
        units_N: int64 unit or cluster of each target.
        mask: positions of the N frames.

    Returns:
        Units of the nearest targets, (N,) int64.
    """
    found_N = torch.full_like(units_N, -1)
    for row_M, valid_M in zip(mask.row_BM, mask.valid_BM, strict=True):
        frames = row_M[valid_M]
        if len(frames):
            predicted, targets = (F.normalize(x[frames].float(), dim=1) for x in (predictions_ND, targets_ND))
            found_N[frames] = units_N[frames[(predicted @ targets.T).argmax(1)]]
    return found_N
