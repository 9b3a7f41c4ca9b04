"""Alignment of tokens and mel frames, learned with the synthesiser.

Each token predicts the mel frames at which it is spoken. The probability of a recording, given its text, is the sum
over all monotonic paths, as in a hidden Markov model; the best path gives the durations. Sum and prior are those of
Badlani et al. (2021, arXiv 2108.10447), frames of normal distributions around what tokens predict those of Glow-TTS
(arXiv 2005.11129).

The paper normalises over the tokens of each frame instead. That loss has solutions in which few tokens have all frames
of a word, and a blank that explains the rest: after 150 updates on digits of one speaker, ends of words are off by 5.1
frames in the mean, with normal distributions by 1.7 (docs/findings.md).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.synthesis.blocks import masked
from pretrain.nn.convolution import TimeConv
from pretrain.nn.numerics import full_precision

OUTSIDE = -1e4
"""Log probability of tokens beyond a row's last one, and of CTC's blank, which no path needs."""
SHARPNESS = 3.0
"""Factor of the mean squared distance over bands; bands that change together are no independent observations."""


class Aligner(nn.Module):
    """Computes log probabilities of mel frames and their change over time, given each token and its two neighbours.

    Args:
        text_dim: channels of token embeddings.
        n_mels: mel bands.
        inner: channels between the two layers.
    """

    def __init__(self, text_dim: int, n_mels: int, inner: int) -> None:
        super().__init__()
        self.take_in, self.out = TimeConv(text_dim, inner, 3, padding=1), nn.Linear(inner, 2 * n_mels)
        nn.init.zeros_(self.out.bias)

    def forward(self, text_BND: Tensor, mel_BFD: Tensor, tokens_B: Tensor, frames_B: Tensor) -> Tensor:
        """Returns ln p(frame | token) + ln prior, up to a constant, (B, F, N) fp32, at most 0.

        Args:
            text_BND: token embeddings, zero beyond each row's tokens.
            mel_BFD: mel frames, zero beyond each row's frames.
            tokens_B, frames_B: valid tokens and frames of each row, int64.
        """
        inside_BN = torch.arange(text_BND.shape[1], device=tokens_B.device) < tokens_B[:, None]
        expected_BND = self.out(F.relu(self.take_in(masked(text_BND, inside_BN))))
        with full_precision(text_BND.device):
            observed_BFD = torch.cat([mel_BFD, change(mel_BFD, frames_B)], dim=2).float()
            distance_BFN = torch.cdist(observed_BFD, expected_BND.float()).square() / mel_BFD.shape[2]
            log_BFN = beta_binomial(frames_B, tokens_B, *distance_BFN.shape[1:]) - SHARPNESS * distance_BFN
            return log_BFN.masked_fill(~inside_BN[:, None], OUTSIDE)


def change(mel_BFD: Tensor, frames_B: Tensor) -> Tensor:
    """Returns the next frame minus the one before, (B, F, D); the first and the last frame are repeated.

    Args:
        mel_BFD: mel frames.
        frames_B: valid frames of each row, int64; beyond them the result is finite.
    """
    places_F = torch.arange(mel_BFD.shape[1], device=frames_B.device)
    next_BF = torch.minimum(places_F + 1, (frames_B - 1).clamp(min=0)[:, None])
    following_BFD = mel_BFD.gather(1, next_BF[:, :, None].expand_as(mel_BFD))
    return following_BFD - torch.cat([mel_BFD[:, :1], mel_BFD[:, :-1]], dim=1)


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

    torch's CTC loss needs classes that sum to 1 at each frame; the sums are divided out before and added again.

    Args:
        log_BFN: result of `Aligner`.
        tokens_B, frames_B: valid tokens and frames of each row, int64.
    """
    with_blank_BFC = F.pad(log_BFN, (1, 0), value=OUTSIDE)
    sums_BF = with_blank_BFC.logsumexp(2)
    normalised_FBC = (with_blank_BFC - sums_BF[:, :, None]).transpose(0, 1)
    classes_BN = torch.arange(1, log_BFN.shape[2] + 1, device=log_BFN.device).expand(len(log_BFN), -1)
    ctc_B = F.ctc_loss(normalised_FBC, classes_BN, frames_B, tokens_B, reduction="none", zero_infinity=True)
    outside_BF = torch.arange(log_BFN.shape[1], device=log_BFN.device) >= frames_B[:, None]
    total_B: Tensor = ctc_B - sums_BF.masked_fill(outside_BF, 0.0).sum(1)
    return total_B.masked_fill((tokens_B > frames_B) | (tokens_B == 0), 0.0)


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
