"""InfoNCE over the masked frames of an utterance, without gathering a vector per negative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.self_supervision.masking import FrameMask


def contrast_logits(
    predictions_ND: Tensor,
    targets_ND: Tensor,
    cluster_N: Tensor,
    mask: FrameMask,
    negatives_BMK: Tensor,
    temperature: float,
) -> Tensor:
    """Cosines / temperature of each masked frame with its target (first) and its negatives, (B, M, 1 + K) fp32.

    All pairs of an utterance's masked frames are compared in one product, and the negatives picked from it: K vectors
    per frame are never gathered. A negative of the positive's own cluster becomes −∞.
    """
    rows_BM = mask.row_BM
    predicted_BMD = F.normalize(predictions_ND.float(), dim=-1)[rows_BM]
    target_BMD = F.normalize(targets_ND.float(), dim=-1)[rows_BM]
    cosine_BMM = predicted_BMD @ target_BMD.transpose(1, 2) / temperature
    cluster_BM = cluster_N[rows_BM]
    same_BMK = torch.gather(cluster_BM[:, None].expand_as(cosine_BMM), 2, negatives_BMK) == cluster_BM[:, :, None]
    negative_BMK = torch.gather(cosine_BMM, 2, negatives_BMK).masked_fill(same_BMK, float("-inf"))
    return torch.cat([cosine_BMM.diagonal(dim1=1, dim2=2)[:, :, None], negative_BMK], dim=2)


def contrastive_loss(logits_BMK: Tensor, valid_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of entry 0 over valid rows, and how often it is strictly the largest (ties are no hits)."""
    losses_BM = torch.logsumexp(logits_BMK, dim=2) - logits_BMK[:, :, 0]
    hits_BM = logits_BMK[:, :, 0] > logits_BMK[:, :, 1:].amax(2)
    return losses_BM.masked_fill(~valid_BM, 0.0).sum(), (hits_BM & valid_BM).sum().float()
