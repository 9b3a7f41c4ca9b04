"""k-means++ seeding, shared by frame labels over shards and by code books fitted in training."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kmeans_plus_plus(points_ND: Tensor, first: int, draws_KC: Tensor) -> list[int]:
    """Chooses K + 1 starting centres of k-means among the points, by k-means++ (Arthur & Vassilvitskii 2007).

    Each further centre is drawn with a probability proportional to a point's squared distance to the nearest centre so
    far. With C > 1, C candidates are drawn each time and the one with the lowest sum of squared distances is used
    (greedy k-means++, section 7 of the paper).

    Args:
        points_ND: (N, D) points, float32.
        first: index of the point that is the first centre.
        draws_KC: (K, C) uniform draws in [0, 1), float64, that select the candidates.

    Returns:
        Indices of the K + 1 chosen points, in the order of their choice.
    """
    chosen = [first]
    distance_N = _squared_distance(points_ND, first)
    for draws_C in draws_KC.to(points_ND.device):
        cumulative_N = distance_N.double().cumsum(0)
        places_C = torch.searchsorted(cumulative_N, cumulative_N[-1] * draws_C).clamp(max=len(points_ND) - 1)
        candidates = places_C.tolist()
        after_CN = torch.stack([torch.minimum(distance_N, _squared_distance(points_ND, at)) for at in candidates])
        best = int(after_CN.sum(1, dtype=torch.float64).argmin())
        chosen.append(candidates[best])
        distance_N = after_CN[best]
    return chosen


def _squared_distance(points_ND: Tensor, center: int) -> Tensor:
    return (points_ND - points_ND[center]).square().sum(1)
