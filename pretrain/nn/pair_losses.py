"""Contrastive losses of pairs of embeddings: the sigmoid loss of SigLIP and the softmax loss of CLIP.

Both allow several positives in a row, such as equal texts; with one positive each they are the published losses.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(logits_BM: Tensor, positive_BM: Tensor, valid_BM: Tensor) -> Tensor:
    """Returns Σ −ln σ(y · logit) over valid pairs, y = 1 for positives and −1 otherwise (arXiv 2303.15343, eq. 1).

    Args:
        logits_BM: t · cosine + b.
        positive_BM: bool.
        valid_BM: bool; other pairs do not count.
    """
    sign_BM = positive_BM.to(logits_BM.dtype) * 2 - 1
    return -F.logsigmoid(sign_BM * logits_BM).masked_fill(~valid_BM, 0.0).sum()


def softmax_loss(logits_BM: Tensor, positive_BM: Tensor, valid_BM: Tensor) -> Tensor:
    """Returns Σ over rows of −ln p, the mean over a row's positives (arXiv 2103.00020; 2004.11362, eq. 2).

    Args:
        logits_BM: t · cosine.
        positive_BM: bool; a row without a valid positive adds nothing.
        valid_BM: bool; other columns are left out of a row's softmax.
    """
    lowest = -0.5 * 3.4e38  # finite, so that a row without a valid column has finite gradients
    log_p_BM = logits_BM.masked_fill(~valid_BM, lowest).log_softmax(1)
    positive_BM = positive_BM & valid_BM
    return -(log_p_BM.masked_fill(~positive_BM, 0.0).sum(1) / positive_BM.sum(1).clamp(min=1)).sum()
