"""Phone ABX: is X nearer to A, of the same phone, than to B, of another phone? Same results as fastabx (2505.02692).

Tokens are compared by dynamic time warping. A cell contains all triples for a pair of phones, a speaker of A and B, and
a speaker of X. Cells are averaged over speakers, then over phone pairs, so that frequent phones do not dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.evaluate.metrics import Interval95

Matrix = npt.NDArray[np.floating]
Token = tuple[str, str, Matrix]
"""(phone, speaker, (F, D) features)."""
CHUNK = 4_096
"""Number of pairs that are aligned at a time."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Error rate of a cell (ties count half). `speaker`: of A and B; `other`: of X, the same for within-speaker ABX."""

    phone: str
    against: str
    speaker: str
    other: str
    error: float


def distances(x_tokens: Sequence[Matrix], y_tokens: Sequence[Matrix], pairs: npt.NDArray[np.intp]) -> Matrix:
    """Returns the mean angles / π along the best alignments of token pairs, (P,).

    Args:
        x_tokens: (F, D) features of each token.
        y_tokens: the same for the tokens to compare with.
        pairs: (P, 2) indices into `x_tokens` and `y_tokens`.
    """
    xs, ys = [_unit(x) for x in x_tokens], [_unit(y) for y in y_tokens]
    sizes = np.array([(len(xs[i]), len(ys[j])) for i, j in pairs]).reshape(-1, 2)
    found = np.empty(len(pairs))
    order = np.lexsort((sizes[:, 1], sizes[:, 0]))  # group pairs of similar lengths, to reduce padding
    for start in range(0, len(order), CHUNK):
        chosen = order[start : start + CHUNK]
        width_M, width_N = sizes[chosen].max(0)
        cost_PMN = np.zeros((len(chosen), width_M, width_N))
        for row, (i, j) in enumerate(pairs[chosen]):
            cost_PMN[row, : len(xs[i]), : len(ys[j])] = np.arccos(np.clip(xs[i] @ ys[j].T, -1.0, 1.0)) / np.pi
        found[chosen] = _align(cost_PMN, sizes[chosen])
    return found


def _unit(x_FD: Matrix) -> Matrix:
    unit_FD: Matrix = x_FD / np.maximum(np.linalg.norm(x_FD, axis=1, keepdims=True), 1e-9)
    return unit_FD


def _align(cost_PMN: Matrix, sizes_P2: npt.NDArray[np.intp]) -> Matrix:
    """Returns the cost of each pair's best path divided by its steps; ties are resolved in favour of the diagonal."""
    P, M, N = cost_PMN.shape
    total_PN, steps_PN = np.full((P, N + 1), np.inf), np.zeros((P, N + 1))
    total_PN[:, 0] = 0.0
    found_P = np.empty(P)
    rows = np.arange(P)
    for i in range(M):
        new_PN, new_steps_PN = np.full((P, N + 1), np.inf), np.zeros((P, N + 1))
        for j in range(1, N + 1):
            before = np.stack([total_PN[:, j - 1], total_PN[:, j], new_PN[:, j - 1]])
            taken = np.stack([steps_PN[:, j - 1], steps_PN[:, j], new_steps_PN[:, j - 1]])
            best = before.argmin(0)
            new_PN[:, j] = before[best, rows] + cost_PMN[:, i, j - 1]
            new_steps_PN[:, j] = taken[best, rows] + 1
        total_PN, steps_PN = new_PN, new_steps_PN
        ended = np.flatnonzero(sizes_P2[:, 0] == i + 1)
        last = sizes_P2[ended, 1]
        found_P[ended] = total_PN[ended, last] / steps_PN[ended, last]
    return found_P


def cells(tokens: Sequence[Token], across: bool, others: int = 1, seed: int = 0) -> list[Cell]:
    """Returns all cells with at least one triple.

    Args:
        tokens: phone, speaker and (F, D) features of each token.
        across: whether X is of another speaker than A and B.
        others: number of speakers of X that are drawn for each speaker of A and B.
        seed: seed of this draw.

    Raises:
        ValueError: there is no triple.
    """
    rng = np.random.default_rng(seed)
    by: dict[str, list[int]] = {}
    for i, (_, speaker, _) in enumerate(tokens):
        by.setdefault(speaker, []).append(i)
    found: list[Cell] = []
    for speaker, own in sorted(by.items()):
        rest = [other for other in sorted(by) if other != speaker]
        drawn = rng.permutation(len(rest))[:others].tolist()
        for other in [rest[i] for i in drawn] if across else [speaker]:
            found += _cells_of(tokens, by[other], own, speaker, other)
    if not found:
        raise ValueError("abx: these utterances have no triple of two phones by one speaker")
    return found


def _cells_of(tokens: Sequence[Token], xs: list[int], own: list[int], speaker: str, other: str) -> list[Cell]:
    """Returns the cells with X among `xs`, and A and B among `own`."""
    pairs = np.array([(i, j) for i in range(len(xs)) for j in range(len(own))], dtype=np.intp).reshape(-1, 2)
    distance = distances([tokens[i][2] for i in xs], [tokens[i][2] for i in own], pairs).reshape(len(xs), len(own))
    x_phones, phones = (np.array([tokens[i][0] for i in part]) for part in (xs, own))
    itself = np.array([[i == j for j in own] for i in xs])
    found = []
    for phone in sorted(set(phones) & set(x_phones)):
        rows, columns = x_phones == phone, phones == phone
        to_a = distance[np.ix_(rows, columns)]
        counts = ~itself[np.ix_(rows, columns)]
        if not counts.any():
            continue
        for against in sorted(set(phones) - {phone}):
            to_b = distance[np.ix_(rows, phones == against)]
            wrong = (to_a[:, :, None] > to_b[:, None]) + 0.5 * (to_a[:, :, None] == to_b[:, None])
            found.append(Cell(phone, str(against), speaker, other, float(wrong[counts].mean())))
    return found


def error(found: Sequence[Cell], times: int = 0) -> Interval95:
    """Returns the mean over phone pairs of the means over speakers, with a 95 % interval from `times` bootstraps."""
    speakers = {name: i for i, name in enumerate(sorted({cell.speaker for cell in found}))}
    pairs = {pair: i for i, pair in enumerate(sorted({(cell.phone, cell.against) for cell in found}))}
    sums_PS, counts_PS = np.zeros((len(pairs), len(speakers))), np.zeros((len(pairs), len(speakers)))
    for cell in found:
        at = pairs[cell.phone, cell.against], speakers[cell.speaker]
        sums_PS[at] += cell.error
        counts_PS[at] += 1

    def value(weights_S: Matrix) -> float:
        counts_P = counts_PS @ weights_S
        kept = counts_P > 0
        return float(((sums_PS @ weights_S)[kept] / counts_P[kept]).mean())

    rng = np.random.default_rng(0)
    n = len(speakers)
    drawn = [value(np.bincount(rng.integers(0, n, n), minlength=n).astype(float)) for _ in range(times)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (float("nan"), float("nan"))
    return Interval95(value(np.ones(n)), float(low), float(high))


def thinned(tokens: Sequence[Token], per_phone: int) -> list[Token]:
    """Returns the first `per_phone` tokens of each phone and speaker; the cost grows with the cube of this number."""
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for token in tokens:
        key = token[:2]
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= per_phone:
            kept.append(token)
    return kept
