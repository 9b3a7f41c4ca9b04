"""Alignment of tokens and mel frames, learned with the synthesiser (Badlani et al. 2021, arXiv 2108.10447).

The distance between each token and each frame gives a soft alignment. It is trained by the sum over all monotonic
paths, which is CTC with one class per token; its best path gives the durations.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.synthesis.blocks import masked
from pretrain.models.synthesis.variance import token_of_frame
from pretrain.nn.convolution import TimeConv
from pretrain.nn.numerics import full_precision

BLANK_LOGIT = -1.0
"""Log probability of CTC's blank, as in the paper's implementation."""
OUTSIDE = -1e4
"""Log probability of tokens beyond a row's last one."""
TEMPERATURE = 0.0005
"""Factor of the squared distances, as in the paper's implementation."""


class Aligner(nn.Module):
    """Computes log probabilities of the tokens at each frame, from convolutions of token embeddings and mel frames.

    Args:
        text_dim: channels of token embeddings.
        n_mels: mel bands.
        dim: channels in which distances are measured.
    """

    def __init__(self, text_dim: int, n_mels: int, dim: int) -> None:
        super().__init__()
        self.text_in, self.text_out = TimeConv(text_dim, 2 * text_dim, 3, padding=1), nn.Linear(2 * text_dim, dim)
        self.mel_in, self.mel_inner = TimeConv(n_mels, 2 * n_mels, 3, padding=1), nn.Linear(2 * n_mels, n_mels)
        self.mel_out = nn.Linear(n_mels, dim)

    def forward(self, text_BND: Tensor, mel_BFD: Tensor, tokens_B: Tensor, frames_B: Tensor) -> Tensor:
        """Returns ln p(token | frame) with the prior, (B, F, N) fp32; `OUTSIDE` for tokens beyond a row's last one.

        Args:
            text_BND: token embeddings, zero beyond each row's tokens.
            mel_BFD: mel frames, zero beyond each row's frames.
            tokens_B, frames_B: valid tokens and frames of each row, int64.
        """
        inside_BN = torch.arange(text_BND.shape[1], device=tokens_B.device) < tokens_B[:, None]
        inside_BF = torch.arange(mel_BFD.shape[1], device=frames_B.device) < frames_B[:, None]
        keys_BND = self.text_out(F.relu(self.text_in(masked(text_BND, inside_BN))))
        queries_BFD = self.mel_out(F.relu(self.mel_inner(F.relu(self.mel_in(masked(mel_BFD, inside_BF))))))
        with full_precision(text_BND.device):
            squared_BFN = torch.cdist(queries_BFD.float(), keys_BND.float()).square()
            scores_BFN = (-TEMPERATURE * squared_BFN).masked_fill(~inside_BN[:, None], OUTSIDE)
            log_BFN = scores_BFN.log_softmax(2) + beta_binomial(frames_B, tokens_B, *scores_BFN.shape[1:])
            return log_BFN.masked_fill(~inside_BN[:, None], OUTSIDE)


def beta_binomial(frames_B: Tensor, tokens_B: Tensor, frames: int, tokens: int) -> Tensor:
    """Returns the log prior of tokens at frames, (B, frames, tokens): beta-binomial distributions along the diagonal.

    Token k of N at frame f of F (from 1): C(N−1, k) · B(k + f, N−1−k + F+1−f) / B(f, F+1−f), as in arXiv 2108.10447.

    Args:
        frames_B, tokens_B: valid frames and tokens of each row, int64.
        frames, tokens: size of the result; entries outside of a row's frames and tokens are finite and unused.
    """
    device = frames_B.device
    total_B11, last_B11 = (count.double()[:, None, None] for count in (frames_B, (tokens_B - 1).clamp(min=0)))
    f_BF1 = torch.minimum(torch.arange(1, frames + 1, device=device)[None, :, None].double(), total_B11.clamp(min=1))
    k_B1N = torch.minimum(torch.arange(tokens, device=device)[None, None].double(), last_B11)
    a_BF1, b_BF1 = f_BF1, (total_B11 + 1 - f_BF1).clamp(min=1)
    choices = torch.lgamma(last_B11 + 1) - torch.lgamma(k_B1N + 1) - torch.lgamma(last_B11 - k_B1N + 1)
    joint = _log_beta(k_B1N + a_BF1, last_B11 - k_B1N + b_BF1)
    return (choices + joint - _log_beta(a_BF1, b_BF1)).float()


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def forward_sum(log_BFN: Tensor, tokens_B: Tensor, frames_B: Tensor) -> Tensor:
    """Returns −ln of the sum over all monotonic paths through each row's alignment, (B,); 0 where there is none.

    Args:
        log_BFN: result of `Aligner`.
        tokens_B, frames_B: valid tokens and frames of each row, int64.
    """
    with_blank_BFC = F.pad(log_BFN, (1, 0), value=BLANK_LOGIT).log_softmax(2)
    classes_BN = torch.arange(1, log_BFN.shape[2] + 1, device=log_BFN.device).expand(len(log_BFN), -1)
    return F.ctc_loss(
        with_blank_BFC.transpose(0, 1), classes_BN, frames_B, tokens_B, reduction="none", zero_infinity=True
    )


def best_durations(log_BFN: Tensor, tokens_B: Tensor, frames_B: Tensor) -> Tensor:
    """Returns the frames of each token on the most probable monotonic path, (B, N) int64.

    A path starts with the first token, ends with the last one, and each frame has the token of the frame before or the
    next one, so that every token has a frame. Rows without tokens, or with fewer frames than tokens, are 0.

    Args:
        log_BFN: log probabilities of tokens at frames.
        tokens_B, frames_B: valid tokens and frames of each row, int64.
    """
    log = log_BFN.detach().float().cpu().numpy()
    tokens, frames = tokens_B.cpu().numpy(), frames_B.cpu().numpy()
    rows, length, width = log.shape
    best = np.full((rows, width), -np.inf, np.float64)
    best[:, :1] = log[:, 0, :1] if length else 0.0
    moved = np.zeros((length, rows, width), bool)
    for f in range(1, length):
        before = np.concatenate([np.full((rows, 1), -np.inf), best[:, :-1]], axis=1)
        moved[f] = before > best
        best = np.where(moved[f], before, best) + log[:, f]
    durations = np.zeros((rows, width), np.int64)
    for row in np.flatnonzero((tokens > 0) & (frames >= tokens)):
        token = tokens[row] - 1
        for f in range(frames[row] - 1, -1, -1):
            durations[row, token] += 1
            token -= moved[f, row, token]
    return torch.from_numpy(durations).to(log_BFN.device)


def off_path(log_BFN: Tensor, durations_BN: Tensor, frames_B: Tensor) -> Tensor:
    """Returns −ln of the soft alignment along the best path, summed over each row's frames, (B,).

    It pulls the soft alignment to the hard one (the binarisation loss of arXiv 2108.10447, eq. 6).
    """
    index_BF = token_of_frame(durations_BN, log_BFN.shape[1]).clamp(max=log_BFN.shape[2] - 1)
    outside_BF = torch.arange(log_BFN.shape[1], device=log_BFN.device) >= frames_B[:, None]
    on_path_BF = log_BFN.log_softmax(2).gather(2, index_BF[:, :, None])[:, :, 0]
    return -on_path_BF.masked_fill(outside_BF, 0.0).sum(1)
