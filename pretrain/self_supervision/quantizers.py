"""Vector quantisers: learned (Gumbel) and random. Look-ups run in full fp32, in chunks, also under autocast."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.numerics import full_precision


def nearest_codes(x_ND: Tensor, codebook_KD: Tensor, chunk: int = 2048) -> Tensor:
    """Returns the index of the nearest code by Euclidean distance, (N,) int64.

    Computed for `chunk` rows at a time, which bounds memory.
    """
    with full_precision(x_ND.device):
        codes_DK = codebook_KD.float().T.contiguous()
        half_norm_K = codes_DK.square().sum(0) / 2
        parts = [(part.float() @ codes_DK - half_norm_K).argmax(1) for part in torch.split(x_ND, chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x_ND.device)


class RandomProjectionQuantizer(nn.Module):
    """Frozen random projection and unit-norm random codebook (BEST-RQ, arXiv 2202.01855, §3.1). Has buffers only.

    The input should have mean 0 and deviation 1; otherwise most frames fall to a few codes.
    """

    def __init__(self, in_dim: int, code_dim: int = 16, n_codes: int = 8192) -> None:
        super().__init__()
        projection = nn.init.xavier_uniform_(torch.empty(in_dim, code_dim))
        self.register_buffer("projection_DC", projection)
        self.register_buffer("codebook_KC", F.normalize(torch.randn(n_codes, code_dim), dim=1))
        self.register_buffer("mean_D", torch.zeros(in_dim))
        self.mean_D: Tensor
        self.projection_DC: Tensor
        self.codebook_KC: Tensor

    def project(self, x_ND: Tensor) -> Tensor:
        """Projects (N, in_dim) features to unit-norm (N, code_dim)."""
        with full_precision(x_ND.device):
            return F.normalize((x_ND.float() - self.mean_D) @ self.projection_DC, dim=1)

    @torch.no_grad()
    def forward(self, x_ND: Tensor) -> Tensor:
        """Returns the (N,) codes of (N, in_dim) features."""
        return nearest_codes(self.project(x_ND), self.codebook_KC)

    @torch.no_grad()
    def whiten(self, x_ND: Tensor) -> None:
        """Replaces the random projection by the first principal axes of `x_ND`, each scaled to deviation 1.

        Random directions mostly mix the axes of largest variance; whitened axes have equal variance (arXiv 2606.30671).
        """
        with full_precision(x_ND.device):
            mean_D = x_ND.float().mean(0)
            centred_ND = (x_ND.float() - mean_D).double()
            variances_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / max(len(x_ND) - 1, 1))
            top = slice(-self.projection_DC.shape[1], None)
            scale_C = variances_D[top].clamp(min=1e-8).rsqrt()
            # the sign of an axis is arbitrary: make the largest entry positive, so that all machines agree
            axes_DC = axes_DD[:, top]
            axes_DC = axes_DC * axes_DC.gather(0, axes_DC.abs().argmax(0, keepdim=True)).sign()
            self.mean_D.copy_(mean_D)
            self.projection_DC.copy_((axes_DC * scale_C).float())


class Quantized(NamedTuple):
    """codes_ND: quantised vectors.  index_NG: chosen code of each group.  probs_NGV: softmax over codes, fp32."""

    codes_ND: Tensor
    index_NG: Tensor
    probs_NGV: Tensor


class GumbelQuantizer(nn.Module):
    """Product quantiser with straight-through Gumbel softmax (wav2vec 2.0, arXiv 2006.11477, §2 and eq. 1)."""

    def __init__(self, in_dim: int, code_dim: int, groups: int = 2, n_codes: int = 320) -> None:
        super().__init__()
        if code_dim % groups:
            raise ValueError(f"objective.code_dim={code_dim} is not a multiple of objective.groups={groups}")
        self.groups = groups
        self.logits = nn.Linear(in_dim, groups * n_codes)
        nn.init.normal_(self.logits.weight, mean=0.0, std=1.0)
        nn.init.zeros_(self.logits.bias)
        self.codebook_GVC = nn.Parameter(torch.rand(groups, n_codes, code_dim // groups))

    def forward(self, x_ND: Tensor, temperature: float) -> Quantized:
        """Quantises (N, in_dim) to (N, code_dim); draws Gumbel noise in training, takes the arg max otherwise."""
        logits_NGV = self.logits(x_ND).float().unflatten(-1, (self.groups, -1))
        probs_NGV = logits_NGV.softmax(-1)
        if not self.training:
            index_NG = logits_NGV.argmax(-1)
            return Quantized(self._look_up(index_NG), index_NG, probs_NGV)
        soft_NGV = ((logits_NGV + gumbel_noise(logits_NGV)) / temperature).softmax(-1)
        index_NG = soft_NGV.argmax(-1)
        # straight-through: the forward value is the chosen code, the gradient that of the soft mixture
        hard_NGV = torch.zeros_like(soft_NGV).scatter_(-1, index_NG[..., None], 1.0)
        weights_NGV = hard_NGV + (soft_NGV - soft_NGV.detach())
        with full_precision(x_ND.device):
            codes_GNC = torch.bmm(weights_NGV.transpose(0, 1), self.codebook_GVC)
        return Quantized(codes_GNC.transpose(0, 1).flatten(1), index_NG, probs_NGV)

    def _look_up(self, index_NG: Tensor) -> Tensor:
        groups = torch.arange(self.groups, device=index_NG.device)
        return self.codebook_GVC[groups[None], index_NG].flatten(1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Returns standard Gumbel noise from torch's generator."""
    return -torch.empty_like(like).exponential_().log()


def perplexity(probs_NGV: Tensor) -> Tensor:
    """Returns exp(entropy) of the mean distribution, summed over the groups; between groups and groups · codes.

    Without frames, the distribution is taken as 0, so that the result is finite.
    """
    mean_GV = probs_NGV.mean(0) if len(probs_NGV) else probs_NGV.sum(0)
    # clamped, because the gradient of x·log x at an underflowed 0 is NaN
    return torch.exp(-(mean_GV * mean_GV.clamp(min=1e-30).log()).sum(-1)).sum()
