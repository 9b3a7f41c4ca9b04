"""Viterbi alignment of a symbol sequence to CTC output (Kürzinger et al. 2020, arXiv 2007.09127, without its skips)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.interfaces.decoding import AlignedSymbol
from pretrain.nn.text_targets import BLANK


def align(log_probs_FV: np.ndarray, symbols: Sequence[int]) -> list[AlignedSymbol]:
    """Returns the frames of each symbol on the most probable path that spells `symbols`.

    Args:
        log_probs_FV: ln p of blank (0) and symbol i (class i + 1) per frame, (F, V).
        symbols: N symbols, 0 … V − 2.

    Raises:
        ValueError: F frames are too few for the symbols and the blanks between equal ones.
    """
    if not symbols:
        return []
    classes_S = np.full(2 * len(symbols) + 1, BLANK)
    classes_S[1::2] = np.asarray(symbols) + 1
    repeats = int((classes_S[3::2] == classes_S[1:-2:2]).sum())
    frames = len(log_probs_FV)
    if frames < len(symbols) + repeats:
        raise ValueError(f"{len(symbols)} symbols do not fit into {frames} frames")
    may_skip_S = np.zeros(len(classes_S), bool)
    may_skip_S[3::2] = classes_S[3::2] != classes_S[1:-2:2]
    best_S = np.full(len(classes_S), -np.inf)
    best_S[:2] = log_probs_FV[0, classes_S[:2]]
    back_FS = np.zeros((frames, len(classes_S)), np.int8)
    candidates_3S = np.full((3, len(classes_S)), -np.inf)
    for frame in range(1, frames):
        candidates_3S[0] = best_S
        candidates_3S[1, 1:] = best_S[:-1]
        candidates_3S[2, 2:] = np.where(may_skip_S[2:], best_S[:-2], -np.inf)
        back_FS[frame] = candidates_3S.argmax(0)
        best_S = candidates_3S.max(0) + log_probs_FV[frame, classes_S]
    state = len(classes_S) - 1 if best_S[-1] > best_S[-2] else len(classes_S) - 2
    states_F = np.zeros(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        states_F[frame] = state
        state -= int(back_FS[frame, state])
    aligned = []
    for number in range(len(symbols)):
        inside = np.flatnonzero(states_F == 2 * number + 1)
        log_prob = float(log_probs_FV[inside, classes_S[2 * number + 1]].mean())
        aligned.append(AlignedSymbol(int(inside[0]), int(inside[-1]) + 1, log_prob))
    return aligned
