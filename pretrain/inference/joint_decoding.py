"""Beam search with an attention decoder and CTC together (Watanabe et al. 2017, arXiv 1609.06773; Hori et al. 2017).

A hypothesis h scores (1 − λ) ln p_att(h) + λ ln p_ctc(h …) + bonus · |h|, where p_ctc(h …) is the probability that the
text begins with h. A prefix that the audio does not contain has a small p_ctc, which ends loops of the decoder.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from data_pipeline.core.schema import about, config
from pretrain.inference.ctc_decoding import beam_search
from pretrain.interfaces.models import Decoder, Memory
from pretrain.nn.text_targets import BLANK

CANDIDATES = 2
"""Tokens per hypothesis that CTC scores, in multiples of the beam: the likeliest ones by attention."""


@config
class JointConfig:
    """Beam search of an attention decoder with CTC."""

    beam: Annotated[int, about("hypotheses that are kept", ge=1)] = 8
    ctc_weight: Annotated[float, about("weight of CTC, 0: the decoder alone", ge=0, lt=1)] = 0.3
    bonus: Annotated[float, about("added per token, against the preference of short texts")] = 0.0
    tokens_per_second: Annotated[float, about("longest text, by the length of the audio", gt=0)] = 25.0
    compression_ratio: Annotated[
        float, about("a text that zlib compresses more than this is a loop: CTC alone decodes it then", gt=1)
    ] = 2.4


class Decoded(NamedTuple):
    """Decoded text.  tokens: ids without marks.  by: decoder, joint or attention, or ctc where a loop was found."""

    tokens: list[int]
    score: float
    by: str


class PrefixScores:
    """Probabilities that a CTC output begins with a prefix, in fp64 (Graves 2012, §7.5.3).

    Args:
        log_probs_FV: ln p of blank (class 0) and token i (class i + 1) per frame, (F, V), F ≥ 1; all finite.

    The state of a prefix h, (2, F + 1): ln p that the first f frames give h and end in its last token, or in a blank.
    """

    def __init__(self, log_probs_FV: Tensor) -> None:
        log_probs_FV = log_probs_FV.double().cpu()
        self._p_VF = log_probs_FV.T.contiguous()
        zero = torch.zeros(len(self._p_VF), 1, dtype=torch.float64)
        self._sum_VF1 = torch.cat([zero, self._p_VF.cumsum(1)], dim=1)

    def empty(self) -> Tensor:
        """Returns the state of the empty prefix."""
        blank_F1 = self._sum_VF1[BLANK]
        return torch.stack([torch.full_like(blank_F1, -torch.inf), blank_F1])

    def extend(self, state: Tensor, last: int, tokens_K: Tensor) -> tuple[Tensor, Tensor]:
        """Extends a prefix by each of K tokens.

        Args:
            state: of the prefix, (2, F + 1).
            last: its last token; -1 where it is empty.
            tokens_K: ids.

        Returns:
            ln p that the output begins with the longer prefix, (K,), and its states, (K, 2, F + 1).
        """
        classes_K = tokens_K + 1
        before_F1 = torch.logaddexp(state[0], state[1])
        before_KF = torch.where((tokens_K == last)[:, None], state[1, :-1], before_F1[:-1])
        begins_KF = before_KF + self._p_VF[classes_K]
        token_KF1 = _recursion(before_KF, self._sum_VF1[classes_K])
        blank_KF1 = _recursion(token_KF1[:, :-1], self._sum_VF1[BLANK].expand(len(tokens_K), -1))
        return begins_KF.logsumexp(1), torch.stack([token_KF1, blank_KF1], dim=1)

    @staticmethod
    def whole(state: Tensor) -> Tensor:
        """Returns ln p that the output is the prefix itself, of states (…, 2, F + 1)."""
        return torch.logaddexp(state[..., 0, -1], state[..., 1, -1])


def _recursion(entering_KF: Tensor, sums_KF1: Tensor) -> Tensor:
    """Solves r(0) = 0, r(f) = p(f) · (r(f − 1) + entering(f − 1)) in logarithms, for all f at once.

    With P(f) = ln p(1) + … + ln p(f): ln r(f) = P(f) + ln Σ_{s<f} exp(entering(s) − P(s)).
    """
    summed_KF = (entering_KF - sums_KF1[:, :-1]).logcumsumexp(1) + sums_KF1[:, 1:]
    return torch.nn.functional.pad(summed_KF, (1, 0), value=-torch.inf)


class _Beams(NamedTuple):
    """n hypotheses of equal length: tokens, ln p of attention, CTC states (n, 2, F + 1) and scores."""

    tokens: list[tuple[int, ...]]
    attention_n: Tensor
    ctc: Tensor | None
    score_n: Tensor


def joint_search(
    decoder: Decoder,
    memories: Sequence[Memory],
    log_probs_FV: Tensor | None,
    *,
    vocabulary: int,
    seconds: float,
    config: JointConfig,
) -> Decoded:
    """Returns the best text of one utterance.

    Args:
        decoder: over tokens 0 … vocabulary − 1, then the end and the start mark; in evaluation mode.
        memories: of one row, (1, M, D).
        log_probs_FV: CTC's ln p of blank (0) and token i (class i + 1), (F, V); None: the decoder alone.
        vocabulary: number of tokens.
        seconds: length of the audio.
        config: beam, weights and limits.
    """
    weight = config.ctc_weight if log_probs_FV is not None and len(log_probs_FV) else 0.0
    ctc = PrefixScores(log_probs_FV) if weight and log_probs_FV is not None else None
    longest = min(int(config.tokens_per_second * seconds) + 1, decoder.max_tokens - 1)
    end, device, zero = vocabulary, memories[0].x_BMD.device, torch.zeros(1, dtype=torch.float64)
    beams = _Beams([()], zero, None if ctc is None else ctc.empty()[None], zero)
    best_score, best = -math.inf, beams.tokens[0]
    with torch.inference_mode():
        state, read_n = decoder.start(memories), torch.full((1,), vocabulary + 1, device=device)
        for length in range(longest + 1):
            logits_nV, state = decoder.step(state, read_n)
            log_p_nV = logits_nV.double().log_softmax(-1).cpu()
            whole_n = 0.0 if beams.ctc is None else weight * PrefixScores.whole(beams.ctc)
            ended_n = (1 - weight) * (beams.attention_n + log_p_nV[:, end]) + whole_n + config.bonus * length
            at = int(ended_n.argmax())
            if float(ended_n[at]) > best_score:
                best_score, best = float(ended_n[at]), beams.tokens[at]
            if length == longest:
                break
            beams, rows_n = _extended(beams, log_p_nV[:, :end], ctc, weight, config)
            most_bonus = max(config.bonus, 0.0) * (longest - length - 1)
            if not beams.tokens or float(beams.score_n.max()) + most_bonus <= best_score:
                break  # longer texts score less, but for their bonus
            state = state.select(rows_n.to(device), memory=False)
            read_n = torch.tensor([tokens[-1] for tokens in beams.tokens], device=device)
    return Decoded(list(best), best_score, "joint" if weight else "attention")


def decode(
    decoder: Decoder,
    memories: Sequence[Memory],
    log_probs_FV: Tensor | None,
    *,
    vocabulary: int,
    seconds: float,
    config: JointConfig,
    text_of: Callable[[list[int]], str],
) -> Decoded:
    """Returns the best text of one utterance; where it is a loop, that of CTC alone.

    Args:
        decoder: as for `joint_search`, like the arguments that are not listed here.
        text_of: the text of tokens, whose compression shows a loop.
    """
    found = joint_search(decoder, memories, log_probs_FV, vocabulary=vocabulary, seconds=seconds, config=config)
    if log_probs_FV is None or compression_ratio(text_of(found.tokens)) <= config.compression_ratio:
        return found
    tokens = beam_search(log_probs_FV.double().cpu().numpy(), config.beam)
    return Decoded(tokens, found.score, "ctc")


def compression_ratio(text: str) -> float:
    """Returns the bytes of a text over those after zlib, as in Whisper; 0 without text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))


def _extended(
    beams: _Beams, log_p_nV: Tensor, ctc: PrefixScores | None, weight: float, config: JointConfig
) -> tuple[_Beams, Tensor]:
    """Extends each hypothesis by its likeliest tokens and keeps the best; also returns which one each comes from."""
    tried = min(log_p_nV.shape[1], CANDIDATES * config.beam if ctc is not None else config.beam)
    log_p_nK, tokens_nK = log_p_nV.topk(tried, dim=1)
    attention_nK = beams.attention_n[:, None] + log_p_nK
    score_nK, states = (1 - weight) * attention_nK + config.bonus * (len(beams.tokens[0]) + 1), []
    if ctc is not None and beams.ctc is not None:
        prefixes = []
        for tokens, state, tokens_K in zip(beams.tokens, beams.ctc, tokens_nK, strict=True):
            prefix_K, state_K = ctc.extend(state, tokens[-1] if tokens else -1, tokens_K)
            prefixes.append(prefix_K)
            states.append(state_K)
        score_nK = score_nK + weight * torch.stack(prefixes)
    score_m, at_m = score_nK.flatten().topk(min(config.beam, score_nK.numel()))
    at_m, score_m = at_m[score_m > -math.inf], score_m[score_m > -math.inf]
    rows_m = at_m // tried
    chosen = zip(rows_m.tolist(), tokens_nK.flatten()[at_m].tolist(), strict=True)
    kept = torch.cat(states)[at_m] if states else None
    longer = [(*beams.tokens[row], token) for row, token in chosen]
    return _Beams(longer, attention_nK.flatten()[at_m], kept, score_m), rows_m
