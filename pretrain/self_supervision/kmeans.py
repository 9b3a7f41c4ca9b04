"""k-means on one machine or over all ranks of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.labels.seeding import kmeans_plus_plus
from pretrain.nn.numerics import full_precision
from pretrain.self_supervision.quantizers import nearest_codes


@torch.no_grad()
def kmeans(x_ND: Tensor, n_codes: int, seed: int, iterations: int = 50) -> Tensor:
    """Returns the centres of k-means, (n_codes, D): k-means++ seeding, then Lloyd's iterations in fp32.

    Args:
        x_ND: points, N ≥ 1. With fewer points than centres, points are repeated as centres.
        n_codes: number of centres.
        seed: seed of the initial centres; all ranks and machines draw the same.
        iterations: maximum number of iterations; ends earlier when no centre moves. A centre without points moves to
            the point farthest from its own centre.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    x_ND = x_ND.float()
    if len(x_ND) <= n_codes:
        return x_ND[torch.arange(n_codes, device=x_ND.device) % len(x_ND)].clone()
    with full_precision(x_ND.device):
        centres_KD = _seed_centres(x_ND, n_codes, generator)
        for _ in range(iterations):
            index_N = nearest_codes(x_ND, centres_KD)
            sizes_K = torch.bincount(index_N, minlength=n_codes)
            moved_KD = torch.zeros_like(centres_KD).index_add_(0, index_N, x_ND) / sizes_K.clamp(min=1)[:, None]
            empty = (sizes_K == 0).nonzero()[:, 0]
            if len(empty):
                far = (x_ND - centres_KD[index_N]).square().sum(1).topk(len(empty)).indices
                moved_KD[empty] = x_ND[far]
            elif torch.equal(moved_KD, centres_KD):
                break
            centres_KD = moved_KD
    return centres_KD


def _seed_centres(x_ND: Tensor, n_codes: int, generator: torch.Generator) -> Tensor:
    first = int(torch.randint(len(x_ND), (1,), generator=generator))
    draws = torch.rand(n_codes - 1, generator=generator, dtype=torch.float64)
    return x_ND[kmeans_plus_plus(x_ND, first, draws[:, None])]


@torch.no_grad()
def gather_rows(parts: Mapping[int, Tensor]) -> Tensor:
    """Returns the (N, D) rows of all ranks in the order of their micro-batches, for any number of ranks."""
    rows_ND = torch.cat(list(parts.values()))
    numbers_N = torch.cat([torch.full((len(part),), number) for number, part in parts.items()]).to(rows_ND.device)
    rows_ND, numbers_N = _from_all_ranks(rows_ND), _from_all_ranks(numbers_N[:, None])[:, 0]
    return rows_ND[numbers_N.argsort(stable=True)]


def _from_all_ranks(x_ND: Tensor) -> Tensor:
    """Returns the concatenated rows of all ranks; `x_ND` itself outside a process group."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x_ND
    sizes = [torch.zeros(1, dtype=torch.int64, device=x_ND.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x_ND)], device=x_ND.device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, x_ND.shape[1], device=x_ND.device, dtype=x_ND.dtype)
    padded[: len(x_ND)] = x_ND
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


@torch.no_grad()
def from_first_rank(x: Tensor) -> Tensor:
    """Broadcasts rank 0's tensor into `x`, in place, and returns it."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x
